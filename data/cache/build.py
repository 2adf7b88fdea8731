"""Decode clips into a cache keyed by content; ``read`` describes its layout.

Building is resumable and atomic. While a folder of the cache is filled it is called <key>.partial and holds
journal.jsonl beside the two arrays: one line per clip whose row is on the disk. Rows are appended and synced before
they are journalled, so a process killed at any moment loses at most one batch; the next one cuts the arrays back to the
journal and goes on. The folder gets its final name in one rename. Rows that another finished folder of the cache
already holds are copied, not decoded.
"""

import errno
import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
import numpy.typing as npt

from isthmus.data.cache.keys import ContentHasher, digest, preparation
from isthmus.data.cache.read import (
    FORMAT,
    FRAMES,
    INDEX,
    SPECTROGRAMS,
    ClipArrays,
    PickedRows,
    Rows,
    frames_shape,
    read_index,
    spectrogram_shape,
)
from isthmus.data.clip import ClipError, ClipRef, Damage, Listing
from isthmus.data.media.decode import decode
from isthmus.data.progress import progress_bar
from isthmus.data.transforms import InputSpec

__all__ = ["CacheFull", "ClipArrays", "PickedRows", "Rows", "build_arrays"]

BATCH: Final = 32
"""Clips between two syncs: the most that a kill can lose."""
WORKERS: Final = 2
"""Threads that decode; FFmpeg, OpenCV and the Fourier transform run outside the interpreter's lock."""
_JOURNAL: Final = "journal.jsonl"


class CacheFull(Exception):
    """The disk under the cache is full. What was decoded so far is kept; the message says how much more is needed."""


_Rows = tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8]]
"""A clip's spectrogram_FT and frames_KHWC."""


@dataclass(frozen=True)
class _Plan:
    """The clips to build, their content keys, and the folder for exactly these clips."""

    refs: tuple[ClipRef, ...]
    keys: tuple[str, ...]
    classes: tuple[str, ...]
    spec: InputSpec
    damaged: tuple[Damage, ...]
    cache_dir: Path

    @property
    def folder(self) -> Path:
        facts = [
            str(FORMAT),
            preparation(self.spec),
            self.spec.to_json(),
            json.dumps(self.classes),
            json.dumps([[ref.name, ref.label, ref.actor] for ref in self.refs]),
            json.dumps(self.keys),
            json.dumps([asdict(damage) for damage in self.damaged]),
        ]
        return self.cache_dir / digest(facts)[:32]

    @property
    def row_bytes(self) -> tuple[int, int]:
        return 4 * int(np.prod(spectrogram_shape(self.spec))), int(np.prod(frames_shape(self.spec)))


def build_arrays(
    clips: Listing | Sequence[ClipRef],
    classes: Sequence[str],
    spec: InputSpec,
    cache_dir: Path,
    progress: bool = True,
    *,
    workers: int = WORKERS,
) -> ClipArrays:
    """Decode clips into the cache, or open them if it already holds them.

    Clips that cannot be decoded get no row. They are named in ``skipped`` with the reason, after those that the listing
    itself calls damaged. Row order is that of the given clips. A second process that builds the same clips waits for
    the first and then finds them done.

    Raises ValueError if no clip at all can be decoded, CacheFull if the disk is full (what was decoded is kept), and
    OSError if the cache cannot be written.

    >>> clips = build_arrays(listing, listing.classes, recipe.input, folder, progress=False)
    >>> len(clips) == len(listing.refs), clips.skipped
    (True, ())
    """
    refs = clips.refs if isinstance(clips, Listing) else tuple(clips)
    damaged = clips.damaged if isinstance(clips, Listing) else ()
    hasher = ContentHasher()
    keys = tuple(hasher.clip(ref) for ref in refs)
    plan = _Plan(refs, keys, tuple(classes), spec, damaged, Path(cache_dir))
    folder = plan.folder
    if not folder.is_dir():
        plan.cache_dir.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_suffix(".lock")):
            if not folder.is_dir():
                _fill(plan, progress=progress, workers=workers)
    return ClipArrays.open(folder)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fill(plan: _Plan, *, progress: bool, workers: int) -> None:
    partial = plan.folder.with_suffix(".partial")
    partial.mkdir(exist_ok=True)
    done = _read_journal(partial / _JOURNAL, plan.keys)
    rows = sum(entry["reason"] is None for entry in done)
    if done and not _holds_rows(partial, plan, rows):
        (partial / _JOURNAL).unlink()
        done, rows = [], 0
    known = _known_rows(plan)
    try:
        _check_room(plan, len(plan.refs) - len(done))
        with (
            _opened_at(partial / SPECTROGRAMS, rows * plan.row_bytes[0]) as spectrograms,
            _opened_at(partial / FRAMES, rows * plan.row_bytes[1]) as frames,
            (partial / _JOURNAL).open("a") as journal,
            progress_bar(enabled=progress) as bar,
            ThreadPoolExecutor(max(1, workers), thread_name_prefix="decode") as pool,
        ):
            task = bar.add_task("decoding clips", total=len(plan.refs), completed=len(done))
            for start in range(len(done), len(plan.refs), BATCH):
                batch = range(start, min(start + BATCH, len(plan.refs)))
                lines: list[dict[str, Any]] = []
                for position, outcome in zip(batch, pool.map(lambda i: _obtain(plan, i, known), batch), strict=True):
                    if not isinstance(outcome, str):
                        spectrogram_FT, frames_KHWC = outcome
                        spectrograms.write(np.ascontiguousarray(spectrogram_FT).data)
                        frames.write(np.ascontiguousarray(frames_KHWC).data)
                    reason = outcome if isinstance(outcome, str) else None
                    lines.append({"key": plan.keys[position], "reason": reason})
                    bar.advance(task)
                for file in (spectrograms, frames):
                    file.flush()
                    _sync(file.fileno())
                journal.write("".join(json.dumps(line) + "\n" for line in lines))
                journal.flush()
                _sync(journal.fileno())
                done += lines
        _finish(plan, partial, done)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise _full(plan, len(plan.refs) - len(done)) from error


def _obtain(plan: _Plan, position: int, known: dict[str, tuple[ClipArrays, int]]) -> _Rows | str:
    """Return the clip's rows, from another folder of the cache if it has them; or the reason why there are none."""
    if plan.keys[position] in known:
        source, row = known[plan.keys[position]]
        return source.spectrograms_NFT[row], source.frames_NKHWC[row]
    try:
        clip = decode(plan.refs[position], plan.spec)
    except ClipError as error:
        return error.reason
    if clip.spectrogram_FT is None or clip.frames_KHWC is None:
        return f"it has no {'sound' if clip.spectrogram_FT is None else 'picture'}: the cache holds whole clips"
    return clip.spectrogram_FT, clip.frames_KHWC


def _finish(plan: _Plan, partial: Path, done: list[dict[str, Any]]) -> None:
    outcomes = list(zip(plan.refs, done, strict=True))
    skipped = [*plan.damaged, *(Damage(ref.name, entry["reason"]) for ref, entry in outcomes if entry["reason"])]
    kept = [(ref, entry["key"]) for ref, entry in outcomes if entry["reason"] is None]
    if not kept:
        reasons = "; ".join(f"{damage.name}: {damage.reason}" for damage in skipped[:3]) or "the listing is empty"
        raise ValueError(f"none of {len(skipped)} clips can be decoded ({reasons})")
    index = {
        "format": FORMAT,
        "preparation": preparation(plan.spec),
        "spec": asdict(plan.spec),
        "classes": plan.classes,
        "clips": [
            {"name": ref.name, "label": -1 if ref.label is None else ref.label, "actor": ref.actor or "", "key": key}
            for ref, key in kept
        ],
        "skipped": [asdict(damage) for damage in skipped],
    }
    with (partial / INDEX).open("w") as file:
        json.dump(index, file)
        file.flush()
        _sync(file.fileno())
    (partial / _JOURNAL).unlink()
    partial.rename(plan.folder)


def _read_journal(path: Path, keys: tuple[str, ...]) -> list[dict[str, Any]]:
    """Return the entries of the clips already done, without a last line cut short and without all from a changed key
    on.
    """
    if not path.is_file():
        return []
    done: list[dict[str, Any]] = []
    whole_bytes = 0
    for line, key in zip(path.read_bytes().splitlines(keepends=True), keys, strict=False):
        try:
            entry = json.loads(line)
        except ValueError:
            break
        if not line.endswith(b"\n") or entry["key"] != key:
            break
        done.append(entry)
        whole_bytes += len(line)
    os.truncate(path, whole_bytes)
    return done


def _holds_rows(partial: Path, plan: _Plan, rows: int) -> bool:
    """Return whether both arrays are at least as long as the journal says."""
    files = (partial / SPECTROGRAMS, partial / FRAMES)
    return all(
        path.is_file() and path.stat().st_size >= rows * size for path, size in zip(files, plan.row_bytes, strict=True)
    )


def _known_rows(plan: _Plan) -> dict[str, tuple[ClipArrays, int]]:
    """Return the folder and row of each of the plan's keys that a finished folder of the same preparation holds."""
    wanted = set(plan.keys)
    known: dict[str, tuple[ClipArrays, int]] = {}
    for path in sorted(plan.cache_dir.glob(f"*/{INDEX}")):
        if path.parent.suffix:
            continue
        try:
            if read_index(path.parent).get("preparation") != preparation(plan.spec):
                continue
            source = ClipArrays.open(path.parent)
        except (ValueError, OSError):
            continue  # made by another version, or removed in the meantime: the clips are decoded again
        known.update({key: (source, row) for row, key in enumerate(source.keys) if key in wanted})
    return known


@contextmanager
def _opened_at(path: Path, length_bytes: int) -> Iterator[BinaryIO]:
    """Open a file for appending after its first ``length_bytes`` bytes; anything after them is dropped."""
    with path.open("ab") as file:
        os.ftruncate(file.fileno(), length_bytes)
        yield file


def _sync(descriptor: int) -> None:
    os.fsync(descriptor)


def _check_room(plan: _Plan, clips: int) -> None:
    """Raise CacheFull if the disk is too small, before hours of decoding rather than after."""
    status = os.statvfs(plan.cache_dir)
    if status.f_bavail * status.f_frsize < clips * sum(plan.row_bytes):
        raise _full(plan, clips)


def _full(plan: _Plan, clips: int) -> CacheFull:
    needed_gb = clips * sum(plan.row_bytes) / 1e9
    return CacheFull(
        f"the disk under {plan.cache_dir} is full: {clips} of {len(plan.refs)} clips still need {needed_gb:.2f} GB. "
        "What is decoded is kept. Free some space, or choose another cache folder, and run the same command again."
    )
