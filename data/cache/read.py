"""Decoded clips as two memory-mapped arrays in a cache keyed by content.

A finished folder of the cache:

    <cache>/<key>/clips.json         spec, classes, and per clip: name, label, actor, content key; the skipped ones
    <cache>/<key>/spectrograms.f32   (N, F, T) float32, row by row
    <cache>/<key>/frames.u8          (N, K, H, W, 3) uint8, row by row

``build`` writes it.

Axes: N clips, F frequency bins, T columns, K frames, H W pixels, C channels.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from isthmus.data.cache.keys import digest
from isthmus.data.clip import Damage
from isthmus.data.transforms import InputSpec

FORMAT: Final = 1
INDEX: Final = "clips.json"
SPECTROGRAMS: Final = "spectrograms.f32"
FRAMES: Final = "frames.u8"

S = TypeVar("S", bound=np.generic)


class PickedRows(Generic[S]):
    """Some rows of an array, in any order. They are read when indexed and never copied as a whole.

    Accepts any index of a first axis (a number, a slice, an array of numbers or of truth values) and returns plain
    arrays.
    """

    def __init__(self, array_N: npt.NDArray[S], rows: npt.NDArray[np.int64]) -> None:
        self._array_N = array_N
        self._rows = rows

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self._rows), *self._array_N.shape[1:])

    @property
    def dtype(self) -> np.dtype[S]:
        return self._array_N.dtype

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> npt.NDArray[S]:
        first, *rest = index if isinstance(index, tuple) else (index,)
        picked: npt.NDArray[S] = self._array_N[(self._rows[first], *rest)]
        return picked

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        if copy is False:
            raise ValueError("these rows are not an array of their own: they must be copied")
        return self._array_N[self._rows].astype(dtype or self.dtype, copy=False)

    def pick(self, rows: npt.NDArray[np.int64]) -> "PickedRows[S]":
        return PickedRows(self._array_N, self._rows[rows])


Rows = npt.NDArray[S] | PickedRows[S]
"""A memory map, a view of one, or some of its rows: all are indexed in the same way."""


@dataclass(frozen=True, eq=False)
class ClipArrays:
    """Clips ready for training and inference. Row i of every array and tuple belongs to clip i.

    ``labels_N``: int64, -1 if unknown. ``actors``: empty text if unknown. ``keys``: content key of each clip.
    ``skipped``: the clips that could not be decoded, with the reason; they have no row.

    >>> release.public.subset([0, 2]).names
    ('clip00', 'clip02')
    """

    names: tuple[str, ...]
    labels_N: npt.NDArray[np.int64]
    actors: tuple[str, ...]
    keys: tuple[str, ...]
    spectrograms_NFT: Rows[np.float32]
    frames_NKHWC: Rows[np.uint8]
    spec: InputSpec
    classes: tuple[str, ...]
    skipped: tuple[Damage, ...]
    source: Path | None
    """The folder that holds exactly these clips; None for a subset."""

    def __len__(self) -> int:
        return len(self.names)

    @property
    def folder(self) -> Path:
        """The folder that ``open`` takes. Raises ValueError for a subset, which has none."""
        if self.source is None:
            raise ValueError("a subset of clips has no folder of its own: build arrays of just these clips")
        return self.source

    @property
    def content_hash(self) -> str:
        """SHA-256 in hex over the clips' content keys, in order, and the spec. Names and labels do not matter."""
        return digest([self.spec.to_json(), *self.keys])

    @property
    def identity(self) -> tuple[str, ...]:
        """Content hash, names and labels, as parts of a hash over what was made of these clips."""
        return self.content_hash, *self.names, ",".join(map(str, np.asarray(self.labels_N)))

    @staticmethod
    def open(folder: Path) -> "ClipArrays":
        """Map a finished folder of the cache, read-only.

        Raises ValueError if it is no such folder, or if its arrays are not as long as its index says.
        """
        index = read_index(folder)
        spec = InputSpec.from_json(json.dumps(index["spec"]))
        clips = index["clips"]
        return ClipArrays(
            names=tuple(clip["name"] for clip in clips),
            labels_N=np.array([clip["label"] for clip in clips], np.int64),
            actors=tuple(clip["actor"] for clip in clips),
            keys=tuple(clip["key"] for clip in clips),
            spectrograms_NFT=_mapped(folder / SPECTROGRAMS, np.float32, (len(clips), *spectrogram_shape(spec))),
            frames_NKHWC=_mapped(folder / FRAMES, np.uint8, (len(clips), *frames_shape(spec))),
            spec=spec,
            classes=tuple(index["classes"]),
            skipped=tuple(Damage(each["name"], each["reason"]) for each in index["skipped"]),
            source=folder,
        )

    def subset(self, indices: Sequence[int] | npt.NDArray[np.integer[Any]]) -> "ClipArrays":
        """Return the clips at ``indices``, in that order; nothing is copied.

        Raises IndexError for an index out of range and ValueError for no indices.
        """
        rows = np.asarray(indices, np.int64).reshape(-1)
        if rows.size == 0:
            raise ValueError("a subset needs at least one clip")
        if rows.min() < 0 or rows.max() >= len(self):
            raise IndexError(f"index {rows.min()} or {rows.max()} is outside 0..{len(self) - 1}")
        return ClipArrays(
            names=tuple(self.names[row] for row in rows),
            labels_N=self.labels_N[rows],
            actors=tuple(self.actors[row] for row in rows),
            keys=tuple(self.keys[row] for row in rows),
            spectrograms_NFT=_picked(self.spectrograms_NFT, rows),
            frames_NKHWC=_picked(self.frames_NKHWC, rows),
            spec=self.spec,
            classes=self.classes,
            skipped=self.skipped,
            source=None,
        )

    def indices(self, names: Sequence[str]) -> npt.NDArray[np.int64]:
        """Return the rows of the named clips, in the given order, without clips that were skipped.

        Raises KeyError for a name that is neither here nor among the skipped.
        """
        row_of = {name: row for row, name in enumerate(self.names)}
        skipped = {damage.name for damage in self.skipped}
        return np.array([row_of[name] for name in names if name in row_of or name not in skipped], np.int64)


def spectrogram_shape(spec: InputSpec) -> tuple[int, int]:
    return spec.spectrogram_bins, spec.spectrogram_columns


def frames_shape(spec: InputSpec) -> tuple[int, int, int, int]:
    return spec.frames_stored, spec.stored_px, spec.stored_px, 3


def read_index(folder: Path) -> dict[str, Any]:
    """Return the index of a finished folder. Raises ValueError if there is none that this version reads."""
    try:
        index = json.loads((folder / INDEX).read_text())
    except FileNotFoundError:
        raise ValueError(f"{folder} holds no decoded clips ({INDEX} is missing)") from None
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise ValueError(f"{folder}: {INDEX} is of another format; delete the folder to have it made again")
    return index


def _mapped(path: Path, dtype: type, shape: tuple[int, ...]) -> Any:
    expected = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    found = path.stat().st_size if path.is_file() else 0
    if found != expected or expected == 0:
        raise ValueError(f"{path} has {found} bytes instead of {expected}; delete its folder to have it made again")
    return np.memmap(path, dtype, "r", shape=shape)


def _picked(array_N: Rows[S], rows: npt.NDArray[np.int64]) -> Rows[S]:
    if isinstance(array_N, PickedRows):
        return array_N.pick(rows)
    if np.array_equal(rows, np.arange(rows[0], rows[0] + len(rows))):
        view: npt.NDArray[S] = array_N[rows[0] : rows[0] + len(rows)]
        return view
    return PickedRows(array_N, rows)
