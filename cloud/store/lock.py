"""Locks against a second process: one server and one worker per SQLite database, and one server per state folder.

The lock is ``flock`` on a file. The system drops it when its process dies, even by ``kill -9``, so no stale lock
remains. A PostgreSQL database has no such lock: any number of servers write to it in short transactions, and workers
hold leases of jobs (``personalise/leases.py``).
"""

import fcntl
import os
import socket
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, NoReturn

from isthmus.cloud.store.database import Database
from isthmus.proto.errors import Locked

_MOST_HOLDER_BYTES: Final = 200


class Lock:
    """The lock on an open file, held until it is released or the process ends. Without a file there is none to hold."""

    def __init__(self, fd: int | None = None) -> None:
        self._fd = fd

    def release(self) -> None:
        if self._fd is not None:
            os.ftruncate(self._fd, 0)
            os.close(self._fd)
            self._fd = None


def acquire(database: Database, purpose: str) -> Lock:
    """Take the lock of an SQLite database for ``purpose`` ("server" or "worker") without waiting.

    Raises Locked if another process (or another Server of this process) holds it.
    """
    if database.sqlite_path is None:
        return Lock()
    path = database.sqlite_path.with_name(f"{database.sqlite_path.name}.{purpose}.lock")
    return _acquire_file(path, purpose, "this database")


def acquire_folder(folder: Path, purpose: str) -> Lock:
    """Take the lock of a folder for ``purpose`` without waiting. Raises Locked, naming the holder."""
    return _acquire_file(folder / f"{purpose}.lock", purpose, "this folder")


def _acquire_file(path: Path, purpose: str, what: str) -> Lock:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        holder = f"process {os.getpid()} on {socket.gethostname()}, since {datetime.now(UTC):%Y-%m-%d %H:%M:%SZ}"
        # A full disk must not keep a server from starting for want of this line.
        with suppress(OSError):
            os.ftruncate(fd, 0)
            os.pwrite(fd, holder.encode()[:_MOST_HOLDER_BYTES], 0)
    except BlockingIOError:
        holder = os.pread(fd, _MOST_HOLDER_BYTES, 0).decode(errors="replace")
        os.close(fd)
        _refuse(purpose, holder if holder.isprintable() else "", what)
    except BaseException:
        os.close(fd)
        raise
    return Lock(fd)


def _refuse(purpose: str, holder: str, what: str) -> NoReturn:
    by = f" ({holder})" if holder else ""
    raise Locked(f"another {purpose}{by} is using {what}. Stop it, or give this one its own --state or --database.")
