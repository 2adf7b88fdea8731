"""Locks against a second process: one server per database, and one worker per database.

For SQLite the lock is ``flock`` on a file beside the database. On PostgreSQL it is an advisory lock held by a
connection of its own. The system drops either lock when its process dies, even by ``kill -9``, so no stale lock
remains.
"""

import fcntl
import os
from pathlib import Path
from typing import Final, Protocol

import sqlalchemy as sa

from isthmus.cloud.store.database import Database
from isthmus.proto.errors import Locked

# Keys of PostgreSQL's advisory locks: the first half identifies us, the second the purpose.
_OURS: Final = 0x15_7A_05
_PURPOSES: Final = {"server": 1, "worker": 2}


class Lock(Protocol):
    """A lock that is held until it is released or its process ends."""

    def release(self) -> None: ...


class _FileLock:
    def __init__(self, fd: int) -> None:
        self._fd = fd

    def release(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class _AdvisoryLock:
    def __init__(self, engine: sa.Engine, connection: sa.Connection) -> None:
        self._engine = engine
        self._connection = connection

    def release(self) -> None:
        self._connection.close()
        self._engine.dispose()


def acquire(database: Database, purpose: str) -> Lock:
    """Take the lock for ``purpose`` ("server" or "worker") without waiting.

    Raises Locked if another process (or another Server of this process) holds it.
    """
    held = Locked(f"another {purpose} is using this database. Stop it, or give this one its own --state or --database.")
    if database.sqlite_path is not None:
        return _acquire_file(database.sqlite_path.with_name(f"{database.sqlite_path.name}.{purpose}.lock"), held)
    return _acquire_advisory(database, _PURPOSES[purpose], held)


def _acquire_file(path: Path, held: Locked) -> Lock:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise held from None
    except BaseException:
        os.close(fd)
        raise
    return _FileLock(fd)


def _acquire_advisory(database: Database, purpose: int, held: Locked) -> Lock:
    engine = sa.create_engine(database.url, poolclass=sa.NullPool, isolation_level="AUTOCOMMIT")
    connection = engine.connect()
    query = sa.text("SELECT pg_try_advisory_lock(:ours, :purpose)")
    got = connection.scalar(query, {"ours": _OURS, "purpose": purpose})
    if not got:
        connection.close()
        engine.dispose()
        raise held
    return _AdvisoryLock(engine, connection)
