"""Cells of a long measurement that several processes share. Each cell is locked while it is made, and saved as JSON."""

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isthmus.data.files import write_atomically


@dataclass(frozen=True)
class Cells:
    """A folder of cells. ``key`` identifies the measurement: a cell of another measurement is refused."""

    folder: Path
    key: str

    def get(self, name: str) -> dict[str, Any] | None:
        """Returns the cell, or None if it is not made. Raises ValueError if it is damaged or of another measurement."""
        path = self.folder / f"{name}.json"
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} is damaged ({error}): remove it, and it will be made again") from error
        if not isinstance(raw, dict) or raw.get("key") != self.key:
            raise ValueError(f"{path} belongs to another measurement: name another folder, or remove this one")
        value: dict[str, Any] = raw["value"]
        return value

    def make(self, name: str, made: Callable[[], dict[str, Any]]) -> bool:
        """Makes the cell if it is missing; False if another process is making it. Raises what ``made`` raises."""
        if self.get(name) is not None:
            return True
        with self._claimed(name) as mine:
            if not mine:
                return False
            if self.get(name) is None:  # another process may have made it meanwhile
                value = {"key": self.key, "value": made()}
                write_atomically(self.folder / f"{name}.json", json.dumps(value, indent=1))
        return True

    @contextmanager
    def _claimed(self, name: str) -> Iterator[bool]:
        with _opened(self.folder / f"{name}.lock") as fd:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True


@contextmanager
def in_turn(path: Path) -> Iterator[None]:
    """Lets one process at a time run the block; the others wait. ``path`` is the lock file."""
    with _opened(path) as fd:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    """Opens a file to lock. The system releases the lock when the process ends, so no stale lock is left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)
