"""The clips that one device has seen last, as features: what its user's offset is estimated from. Never sent.

A window belongs to one student, whose features it holds. Clips that the person has corrected are kept as long as the
corrections count; of the others only the newest. The file is a NumPy archive without pickle.
"""

import io
import zipfile
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from isthmus.proto.limits import MAX_CLASSES, MAX_FEATURE_WIDTH
from isthmus.proto.messages import Features, FloatArray
from isthmus.proto.person import MODALITIES

MOST_CLIPS: Final = 200
"""The newest clips that are kept beside the corrected ones."""

MOST_NAME_CHARS: Final = 256

_MOST_ROWS: Final = 1_000


@dataclass(frozen=True, eq=False)
class Seen:
    """One clip: its features, and the answer (C,) of the student's ordinary head."""

    name: str
    features: Features
    raw_C: FloatArray


@dataclass(frozen=True, eq=False)
class Window:
    """The clips, oldest first; each name occurs once.

    ``features_MND`` has zeros for an absent modality, ``present_NM`` is 1 if clip n has modality m.
    """

    names: tuple[str, ...]
    features_MND: FloatArray
    present_NM: FloatArray
    raw_NC: FloatArray

    def __len__(self) -> int:
        return len(self.names)

    @classmethod
    def of(cls, seen: Iterable[Seen], *, pinned: Collection[str] = ()) -> "Window":
        """Return a window of these clips, oldest first. Raises ValueError without any."""
        rows = _bounded({each.name[:MOST_NAME_CHARS]: each for each in seen}, pinned)
        if not rows:
            raise ValueError("a window needs a clip")
        return cls(
            tuple(rows),
            np.stack([np.stack(each.features.filled()) for each in rows.values()], axis=1).astype(np.float32),
            np.stack([each.features.present_2() for each in rows.values()]),
            np.stack([each.raw_C for each in rows.values()]).astype(np.float32),
        )

    def with_clip(self, seen: Seen, *, pinned: Collection[str]) -> "Window":
        """Return the window after another clip. A new clip replaces the old one of its name, unless that is pinned."""
        if seen.name in pinned and seen.name in self.names:
            return self
        others = (each for each in self.clips() if each.name != seen.name)
        return Window.of((*others, seen), pinned=pinned)

    def without(self, names: Collection[str]) -> "Window | None":
        """Return the window without these clips; None if none is left."""
        left = [each for each in self.clips() if each.name not in names]
        return Window.of(left, pinned=self.names) if left else None

    def clips(self) -> Iterator[Seen]:
        """Yield the clips, oldest first."""
        for row, name in enumerate(self.names):
            audio_D, visual_D = (
                self.features_MND[modality, row] if self.present_NM[row, modality] else None for modality in range(2)
            )
            yield Seen(name, Features(audio_D, visual_D), self.raw_NC[row])

    def to_bytes(self) -> bytes:
        """Return the content of a file."""
        file = io.BytesIO()
        np.savez(
            file,
            names=np.array(self.names),
            features_MND=self.features_MND,
            present_NM=self.present_NM,
            raw_NC=self.raw_NC,
        )
        return file.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes) -> "Window":
        """Read what ``to_bytes`` wrote. Raises ValueError for anything else."""
        try:
            with np.load(io.BytesIO(content), allow_pickle=False) as file:
                names = tuple(str(name) for name in file["names"])
                arrays = tuple(np.asarray(file[name], np.float32) for name in ("features_MND", "present_NM", "raw_NC"))
        except (EOFError, KeyError, OSError, TypeError, zipfile.BadZipFile) as error:
            raise ValueError("this is no window of clips") from error
        window = cls(names, *arrays)
        _check(window)
        return window


def _bounded(rows: dict[str, Seen], pinned: Collection[str]) -> dict[str, Seen]:
    free = [name for name in rows if name not in pinned]
    gone = set(free[: max(0, len(free) - MOST_CLIPS)])
    return {name: each for name, each in rows.items() if name not in gone}


def _check(window: Window) -> None:
    clips, shape = len(window.names), window.features_MND.shape
    sound = (
        0 < clips <= _MOST_ROWS
        and len(set(window.names)) == clips
        and len(shape) == 3
        and shape[:2] == (MODALITIES, clips)
        and shape[2] <= MAX_FEATURE_WIDTH
        and window.present_NM.shape == (clips, MODALITIES)
        and window.raw_NC.ndim == 2
        and len(window.raw_NC) == clips
        and 2 <= window.raw_NC.shape[1] <= MAX_CLASSES
        and np.isin(window.present_NM, (0, 1)).all()
        and (window.present_NM.sum(axis=1) > 0).all()
        and all(_finite(array) for array in (window.features_MND, window.raw_NC))
    )
    if not sound:
        raise ValueError("this window of clips is damaged")


def _finite(array: npt.NDArray[np.float32]) -> bool:
    return bool(np.isfinite(array).all())
