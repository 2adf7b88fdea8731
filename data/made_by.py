"""Which code has measured the cells of a results folder.

A run that was stopped goes on, perhaps with another version of Isthmus. Its tables then have rows of both, and must say
so.
"""

import fcntl
import hashlib
import importlib.util
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Final

import isthmus
from isthmus.data.files import read_text, write_atomically

FILE: Final = "made-by.json"
LOCK: Final = "made-by.lock"
UNKNOWN: Final = "code that left no name"
_ROOMS: Final = ("cloud", "data", "distill", "edge", "proto")


@cache
def code() -> str:
    """Returns the version with a hash of all Python files of Isthmus. Any change of code changes it.

    A clone and what was installed from it have the same: there the rooms lie beside ``isthmus``, here within it.
    """
    found = hashlib.sha256()
    for name in ("isthmus", *(f"isthmus.{room}" for room in _ROOMS)):
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.origin is not None, f"{name} is a part of every installation"
        root = Path(spec.origin).parent
        for path in sorted(root.rglob("*.py")):
            if name == "isthmus" and path.relative_to(root).parts[0] in _ROOMS:
                continue
            found.update(f"{name}/{path.relative_to(root).as_posix()}".encode() + b"\0" + path.read_bytes() + b"\0")
    return f"{isthmus.__version__}, sources {found.hexdigest()[:12]}"


def made_by(out: Path, report: Callable[[str], None]) -> list[str]:
    """Adds this code to those that have worked in ``out``, reports if there are others, and returns all, oldest first.

    It is called before the first cell is measured, so that a run that was stopped is recorded, too. A folder that holds
    files without such a record counts as one of unknown code. Several processes may call it for one folder. Raises
    ValueError if the record is not a list of names.
    """
    out.mkdir(parents=True, exist_ok=True)
    with _alone(out / LOCK):
        return _noted(out, report)


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Let one process at a time run the block. The system releases the lock when a process ends."""
    fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _noted(out: Path, report: Callable[[str], None]) -> list[str]:
    path = out / FILE
    if path.is_file():
        try:
            names = json.loads(read_text(path))
        except json.JSONDecodeError:
            names = None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{path} is not a list of names: delete it, and the folder counts as one of unknown code")
    else:
        names = [UNKNOWN] if any(each.name != LOCK for each in out.iterdir()) else []
    if code() not in names:
        names.append(code())
        write_atomically(path, json.dumps(names, indent=1) + "\n")
        if len(names) > 1:
            report(
                f"{out} has cells of other code ({'; '.join(names[:-1])}), so its tables will mix them with those of "
                f"{names[-1]}. With an empty folder as --out all are measured anew."
            )
    return list(names)
