"""What a run has finished, with its wall time, kept in the output folder so that the next run can take it over."""

import fcntl
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from isthmus.data.files import write_atomically


@dataclass(frozen=True)
class StageRecord:
    """One finished stage. ``key`` hashes all it depended on; ``reused`` says that an earlier run had done it."""

    name: str
    key: str
    seconds: float
    reused: bool = False


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Keeps a second run out of ``folder`` until the block is left or this process ends. Raises ValueError for it."""
    with (folder / "in-use").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another run is at work in {folder}; wait for it, or choose another --out") from error
        yield


def key_of(*parts: Any) -> str:
    """16 hex digits over anything JSON can hold."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class StageLedger:
    """Runs stages in order; one whose key and result are there already is taken over, not run again."""

    def __init__(self, path: Path):
        self._path = path
        self._finished = _read(path)
        self.records: list[StageRecord] = []

    def run(self, name: str, key: str, result: Path, action: Callable[[], None]) -> StageRecord:
        """Runs ``action``, which makes ``result``, unless a run with the same ``key`` has.

        Whatever ``action`` raises passes through, and the stage then counts as not done.
        """
        before = self._finished.get(name)
        if before is not None and before.key == key and result.exists():
            record = StageRecord(name, key, before.seconds, reused=True)
        else:
            if before is not None:  # from here on its result is neither the old nor the new one
                del self._finished[name]
                self._save()
            began_s = time.perf_counter()
            action()
            record = StageRecord(name, key, time.perf_counter() - began_s)
            self._finished[name] = record
            self._save()
        self.records.append(record)
        return record

    def add(self, name: str, seconds: float) -> None:
        """Notes the time of a stage that every run does anew."""
        self.records.append(StageRecord(name, "", seconds))

    def _save(self) -> None:
        write_atomically(self._path, json.dumps([asdict(record) for record in self._finished.values()], indent=1))


def _read(path: Path) -> dict[str, StageRecord]:
    """An unreadable ledger counts as empty: then everything is done again, which is slow and right."""
    try:
        records = [StageRecord(**record) for record in json.loads(path.read_text())]
    except (FileNotFoundError, ValueError, TypeError):
        return {}
    return {record.name: record for record in records}
