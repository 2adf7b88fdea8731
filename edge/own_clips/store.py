"""The clips that this device has captured of its user: a bounded store in a folder of mode 0700.

    <name>.wav    sound, if there is any
    <name>.mp4    pictures (and the sound), if there are any, for any player
    <name>.json   what the clip has; written last, so a clip without it does not exist and is swept away
    paused        capture is paused as long as this file is there

Nothing of it is ever sent. Prototypes are made of these clips. A clip is deleted when it is too old, or when there are
too many clips or bytes, oldest first, unless a person asked to keep it.
"""

import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, overload

import numpy as np
import numpy.typing as npt

from isthmus.data.clip import ClipRef
from isthmus.data.files import make_folder, remove, write_atomically
from isthmus.data.media.encode import write_mp4, write_wav
from isthmus.data.transforms import InputSpec
from isthmus.edge.student.disk import disk_errors
from isthmus.proto.errors import InvalidInput

_NAME: Final = re.compile(r"[0-9]{8}T[0-9]{6}-[0-9]{3}[a-z]?")
_PAUSED: Final = "paused"


@dataclass(frozen=True)
class Limits:
    """The most that the store keeps."""

    clips: int = 200
    bytes: int = 200 << 20
    age_s: float = 7 * 86_400.0


@dataclass(frozen=True)
class StoredClip:
    """A clip of the store. ``captured_s`` is Unix time. ``kept``: a person asked to keep it beyond its time."""

    name: str
    captured_s: float
    sound: bool
    picture: bool
    kept: bool
    size_bytes: int


class ClipStore:
    """The store in ``folder``, which is made if it is missing. ``clock`` returns Unix time.

    Several processes may use it: one adds clips, and others list and delete them. Raises StorageFull on a full disk.

    >>> ClipStore(folder / "clips").clips()
    []
    """

    def __init__(self, folder: Path, limits: Limits | None = None, *, clock: Callable[[], float] = time.time) -> None:
        self.folder = folder
        self.limits = limits or Limits()
        self._clock = clock
        with disk_errors():
            make_folder(folder, 0o700)
            folder.chmod(0o700)

    def add(
        self,
        waveform_T: npt.NDArray[np.float32] | None,
        pictures: Sequence[npt.NDArray[np.uint8]] | None,
        spec: InputSpec,
        name: str = "",
    ) -> str:
        """Store a clip, delete what is then too much, and return the clip's name.

        ``waveform_T``: mono at the spec's rate. ``name``: of ``free_name``; "" takes one. Raises StorageFull on a full
        disk.
        """
        if waveform_T is None and pictures is None:
            raise InvalidInput("a clip has sound or pictures")
        now_s = self._clock()
        name = name or self.free_name()
        with disk_errors():
            if waveform_T is not None:
                write_wav(self.folder / f"{name}.wav", waveform_T, spec.sample_rate_hz, durable=True)
            if pictures is not None:
                silence_T = np.zeros(spec.samples, np.float32)
                side = min(min(each.shape[:2]) for each in pictures) // 2 * 2  # the codec needs even sides
                frames_KHWC = np.stack([each[:side, :side] for each in pictures])
                fps = max(1, round(len(pictures) / spec.duration_s))
                sound_T = silence_T if waveform_T is None else waveform_T
                write_mp4(self.folder / f"{name}.mp4", frames_KHWC, fps, sound_T, spec.sample_rate_hz, durable=True)
            for path in (self.folder / f"{name}.wav", self.folder / f"{name}.mp4"):
                if path.exists():
                    path.chmod(0o600)
            facts = {"captured_s": now_s, "sound": waveform_T is not None, "picture": pictures is not None}
            write_atomically(self.folder / f"{name}.json", json.dumps({**facts, "kept": False}), mode=0o600)
        self.tidy()
        return name

    def clips(self) -> list[StoredClip]:
        """Return the clips, oldest first."""
        found = []
        for path in self.folder.glob("*.json"):
            facts = _read(path)
            if facts is None or not _NAME.fullmatch(path.stem):
                continue
            files = [self.folder / f"{path.stem}{end}" for end in (".wav", ".mp4", ".json")]
            size = sum(each.stat().st_size for each in files if each.is_file())
            found.append(StoredClip(path.stem, facts[0], facts[1], facts[2], facts[3], size))
        return sorted(found, key=lambda clip: (clip.captured_s, clip.name))

    def refs(self) -> list[ClipRef]:
        """Return the clips as references to their files, oldest first."""
        return [
            ClipRef(
                clip.name,
                self.folder / f"{clip.name}.wav" if clip.sound else None,
                self.folder / f"{clip.name}.mp4" if clip.picture else None,
                None,
                None,
            )
            for clip in self.clips()
        ]

    def check(self, names: Sequence[str]) -> None:
        """Raises InvalidInput for a name that is no clip's."""
        known = {clip.name for clip in self.clips()}
        for name in names:
            if name not in known:
                raise InvalidInput(f"there is no clip {name[:64]!r} here")

    def delete(self, names: Sequence[str]) -> int:
        """Delete clips; return how many there were. Raises InvalidInput for a name that is no clip's."""
        self.check(names)
        for name in names:
            self._remove(name)
        return len(names)

    def delete_all(self) -> int:
        """Delete every clip and everything that is left of one; return how many clips there were."""
        count = len(self.clips())
        remove(*self.folder.glob("*.json"))
        remove(*(path for path in self.folder.iterdir() if path.name != _PAUSED and path.is_file()))
        return count

    def keep(self, name: str) -> None:
        """Keep a clip beyond its time. Raises InvalidInput for a name that is no clip's."""
        clip = next((each for each in self.clips() if each.name == name), None)
        if clip is None:
            raise InvalidInput(f"there is no clip {name[:64]!r} here")
        facts = {"captured_s": clip.captured_s, "sound": clip.sound, "picture": clip.picture, "kept": True}
        with disk_errors():
            write_atomically(self.folder / f"{name}.json", json.dumps(facts), mode=0o600)

    @property
    def paused(self) -> bool:
        return (self.folder / _PAUSED).exists()

    def pause(self) -> None:
        with disk_errors():
            write_atomically(self.folder / _PAUSED, b"", mode=0o600)

    def resume(self) -> None:
        remove(self.folder / _PAUSED)

    def tidy(self) -> None:
        """Delete what is too old or too much, and the rest of clips that were not finished. Kept clips stay."""
        now_s = self._clock()
        clips = self.clips()
        passing = [clip for clip in clips if not clip.kept]
        count, size = len(clips), sum(clip.size_bytes for clip in clips)
        for clip in passing:
            too_old = now_s - clip.captured_s > self.limits.age_s
            if too_old or count > self.limits.clips or size > self.limits.bytes:
                self._remove(clip.name)
                count, size = count - 1, size - clip.size_bytes
        whole = {clip.name for clip in self.clips()}
        for path in self.folder.iterdir():
            stale = path.stem not in whole and path.name != _PAUSED and path.is_file()
            if stale and abs(now_s - path.stat().st_mtime) > 60.0:  # another process may just be writing it
                path.unlink(missing_ok=True)

    def free_name(self) -> str:
        """Return the name of a clip that is stored now."""
        now_s = self._clock()
        stamp: str = time.strftime("%Y%m%dT%H%M%S", time.gmtime(now_s)) + f"-{int(now_s * 1000) % 1000:03d}"
        for letter in ["", *"abcdefghijklmnopqrstuvwxyz"]:
            if not (self.folder / f"{stamp}{letter}.json").exists():
                return f"{stamp}{letter}"
        raise InvalidInput("the clock stands still")

    def _remove(self, name: str) -> None:
        # The description first: from then on the clip does not exist.
        remove(self.folder / f"{name}.json")
        remove(*(self.folder / f"{name}{end}" for end in (".mp4", ".wav")))


class StoredSelection(Sequence[ClipRef]):
    """The store's clips of this moment, as a sequence: each pass over it sees what is there when it begins."""

    def __init__(self, store: ClipStore) -> None:
        self._store = store

    def __len__(self) -> int:
        return len(self._store.clips())

    @overload
    def __getitem__(self, place: int) -> ClipRef: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[ClipRef]: ...
    def __getitem__(self, place: int | slice) -> ClipRef | Sequence[ClipRef]:
        return self._store.refs()[place]

    def __iter__(self) -> Iterator[ClipRef]:
        return iter(self._store.refs())


def people_in(state: Path) -> tuple[str, ...]:
    """Return the names of the people who share the device in ``state``; none if nobody was ever named."""
    folder = state / "people"
    return tuple(sorted(path.name for path in folder.iterdir() if path.is_dir())) if folder.is_dir() else ()


def person_folder(state: Path, person: str) -> Path:
    """Return the state folder of a person on a shared device. Raises InvalidInput for a name that is no plain word.

    Each person has a device of their own below the shared one: identity, students, clips, habits and corrections.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,31}", person):
        raise InvalidInput(
            f"--person {person[:40]!r}: use up to 32 letters without accents, digits, - and _, such as 'anna'"
        )
    return state / "people" / person


def _read(path: Path) -> tuple[float, bool, bool, bool] | None:
    """Return (time, sound, picture, kept) of a clip; None for a file that is no description of one."""
    try:
        raw: Any = json.loads(path.read_text(encoding="utf-8"))
        facts = float(raw["captured_s"]), raw["sound"], raw["picture"], raw.get("kept", False)
    except (OSError, ValueError, KeyError, TypeError, RecursionError, AttributeError):
        return None
    sound, picture, kept = facts[1:]
    if not np.isfinite(facts[0]) or not all(type(each) is bool for each in (sound, picture, kept)):
        return None
    return facts[0], sound, picture, kept
