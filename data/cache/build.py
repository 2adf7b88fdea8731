"""Decoded clips in a cache keyed by content: filling it is resumable and atomic; ``stored`` says how it lies there.

While a folder of the cache is filled it is called <key>.partial and holds journal.jsonl beside the two arrays: a line
for every clip whose row is on the disk. Rows are appended and synced before they are journalled, so a process killed
at any moment loses at most one batch; the next one cuts the arrays back to the journal and goes on. The folder gets
its final name in one rename. Rows that another finished folder of the cache already holds are copied, not decoded.
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
"""Clips between two syncs: what a kill can cost."""
WORKERS: Final = 2
"""Threads that decode; FFmpeg, OpenCV and the Fourier transform run outside the interpreter's lock."""
_JOURNAL: Final = "journal.jsonl"


class CacheFull(Exception):
    """The disk under the cache is full. What was decoded so far is kept; says how much more is needed."""


_Rows = tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8]]
"""A clip's spectrogram_FT and frames_KHWC."""


@dataclass(frozen=True)
class _Plan:
    """What is to be built: the clips, their content keys, and the folder that stands for exactly them."""

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
    """Decodes clips into the cache, or opens them where it already holds them.

    Clips that cannot be decoded get no row and are named in ``skipped`` with the reason, after those that the listing
    itself calls damaged. Row order is that of the given clips. A second process building the same clips waits for the
    first and then finds them done.
    Raises ValueError where no clip at all can be decoded, CacheFull when the disk is full (what was decoded is kept),
    and OSError where the cache cannot be written.
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
    """The clip's rows, from another folder of the cache where it has them; or the reason why it cannot be had."""
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
    """Entries of the clips already done. A last line cut short, and all from a changed key on, do not count."""
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
    """Whether both arrays are at least as long as the journal says."""
    files = (partial / SPECTROGRAMS, partial / FRAMES)
    return all(
        path.is_file() and path.stat().st_size >= rows * size for path, size in zip(files, plan.row_bytes, strict=True)
    )


def _known_rows(plan: _Plan) -> dict[str, tuple[ClipArrays, int]]:
    """Where finished folders of the same preparation hold the plan's content."""
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
            continue  # made by another version, or taken away meanwhile: the clips are decoded again
        known.update({key: (source, row) for row, key in enumerate(source.keys) if key in wanted})
    return known


@contextmanager
def _opened_at(path: Path, length_bytes: int) -> Iterator[BinaryIO]:
    """A file opened for appending after its first ``length_bytes`` bytes; what lay behind is dropped."""
    with path.open("ab") as file:
        os.ftruncate(file.fileno(), length_bytes)
        yield file


def _sync(descriptor: int) -> None:
    os.fsync(descriptor)


def _check_room(plan: _Plan, clips: int) -> None:
    """Says before hours of decoding, rather than after, that the disk is too small."""
    status = os.statvfs(plan.cache_dir)
    if status.f_bavail * status.f_frsize < clips * sum(plan.row_bytes):
        raise _full(plan, clips)


def _full(plan: _Plan, clips: int) -> CacheFull:
    needed_gb = clips * sum(plan.row_bytes) / 1e9
    return CacheFull(
        f"the disk under {plan.cache_dir} is full: {clips} of {len(plan.refs)} clips still need {needed_gb:.2f} GB. "
        "What is decoded is kept. Free some space, or choose another cache folder, and run the same command again."
    )
