"""Finished stages and their wall times, kept in the output folder so that the next run can reuse them."""

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
    """One finished stage. ``key`` hashes everything it depends on. ``reused``: an earlier run did it."""

    name: str
    key: str
    seconds: float
    reused: bool = False


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Lock ``folder`` until the block is left or this process ends. Raises ValueError if another run holds it."""
    with (folder / "in-use").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another run uses {folder}; wait until it ends, or choose another --out") from error
        yield


def key_of(*parts: Any) -> str:
    """Return 16 hex digits that hash any JSON values."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class StageLedger:
    """Runs stages in order. A stage whose key and result already exist is reused."""

    def __init__(self, path: Path):
        self._path = path
        self._finished = _read(path)
        self.records: list[StageRecord] = []

    def run(self, name: str, key: str, result: Path, action: Callable[[], None]) -> StageRecord:
        """Run ``action``, which makes ``result``, unless an earlier run with the same ``key`` did.

        Exceptions of ``action`` propagate; the stage then counts as not done.
        """
        before = self._finished.get(name)
        if before is not None and before.key == key and result.exists():
            record = StageRecord(name, key, before.seconds, reused=True)
        else:
            if before is not None:  # from here on the result may be incomplete
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
        """Record the time of a stage that is never reused."""
        self.records.append(StageRecord(name, "", seconds))

    def _save(self) -> None:
        write_atomically(self._path, json.dumps([asdict(record) for record in self._finished.values()], indent=1))


def _read(path: Path) -> dict[str, StageRecord]:
    """Read the ledger. An unreadable one counts as empty: everything runs again, which is slow but correct."""
    try:
        records = [StageRecord(**record) for record in json.loads(path.read_text())]
    except (FileNotFoundError, ValueError, TypeError):
        return {}
    return {record.name: record for record in records}
