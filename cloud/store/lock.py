"""Locks against a second process: one server per database and state folder, and one worker per database.

For SQLite, and for a folder, the lock is ``flock`` on a file. On PostgreSQL it is an advisory lock held by a connection
of its own. The system drops either lock when its process dies, even by ``kill -9``, so no stale lock remains.

A connection can also be lost while the process lives: the network breaks, or the database restarts. Then

- the lock looks at its connection every second, so the loss is noticed within 5 s;
- from then on ``Database.writing`` raises Unavailable, until the lock is held again;
- a write that began before is fenced: each holder raises the epoch in the table ``fences``, and a transaction of
  a holder whose epoch is not the newest raises Unavailable too.
"""

import fcntl
import logging
import os
import socket
import threading
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, NoReturn, Protocol

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError

from isthmus.cloud.store.database import POSTGRES_CONNECT, Database, as_ours
from isthmus.cloud.store.schema import fences
from isthmus.proto.errors import IsthmusError, Locked, Unavailable

log = logging.getLogger(__name__)

# Keys of PostgreSQL's advisory locks: the first half identifies us, the second the purpose.
_OURS: Final = 0x15_7A_05
_PURPOSES: Final = {"server": 1, "worker": 2}
_LOOK_S: Final = 1.0
_STATEMENT_MS: Final = 3_000
_MOST_HOLDER_BYTES: Final = 200


class Lock(Protocol):
    """A lock that is held until it is released, its process ends, or its connection is lost."""

    @property
    def held(self) -> bool:
        """Whether the lock is held at the moment."""
        ...

    @property
    def epoch(self) -> int | None:
        """The epoch of this holder, for ``Fence`` in other processes; None if the lock cannot be lost."""
        ...

    def fence(self, database: Database) -> None:
        """Let ``database`` write only while the lock is held. Call it once, after migrating. Raises Unavailable."""
        ...

    def release(self) -> None: ...


@dataclass(frozen=True)
class Fence:
    """A guard of ``Database``: refuses writes for a holder of ``purpose`` that is no longer the newest."""

    purpose: str
    epoch: int

    def __call__(self, connection: sa.Connection) -> None:
        # FOR SHARE: the next holder raises the epoch only when this transaction has ended.
        query = sa.select(fences.c.epoch).where(fences.c.purpose == self.purpose).with_for_update(read=True)
        if connection.scalar(query) != self.epoch:
            raise Locked(f"another {self.purpose} has taken over this database")


class _FileLock:
    """The lock on an open file. It cannot be lost while the process lives."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    @property
    def held(self) -> bool:
        return self._fd >= 0

    @property
    def epoch(self) -> int | None:
        return None

    def fence(self, database: Database) -> None:
        pass

    def release(self) -> None:
        if self._fd >= 0:
            os.ftruncate(self._fd, 0)
            os.close(self._fd)
            self._fd = -1


class _AdvisoryLock:
    """The lock of a connection to PostgreSQL, watched by a thread of its own."""

    def __init__(self, url: sa.URL, purpose: str) -> None:
        self._purpose = purpose
        self._engine = sa.create_engine(
            url,
            poolclass=sa.NullPool,
            isolation_level="AUTOCOMMIT",
            connect_args={**POSTGRES_CONNECT, "options": f"-c statement_timeout={_STATEMENT_MS}"},
        )
        self._connection: sa.Connection | None = None
        self._epoch: int | None = None
        self._fences = False
        self._using = threading.Lock()
        """A connection is for one thread at a time."""
        self._released = threading.Event()
        self._watch = threading.Thread(target=self._look, daemon=True, name=f"isthmus-{purpose}-lock")

    @property
    def held(self) -> bool:
        return self._connection is not None

    @property
    def epoch(self) -> int | None:
        return self._epoch

    def take(self) -> None:
        """Take the lock and begin to watch it. Raises Locked, and Unavailable if the database cannot be reached."""
        try:
            if not self._try():
                _refuse(self._purpose, "")
        except DBAPIError as error:
            raise as_ours(error) from error
        finally:
            if not self.held:
                self._engine.dispose()
        self._watch.start()

    def fence(self, database: Database) -> None:
        database.guard = self._check
        self._fences = True
        try:
            with self._using:
                if self._connection is None:
                    raise Unavailable("the lock on the database was lost; try again")
                self._raise_epoch(self._connection)
        except DBAPIError as error:
            raise as_ours(error) from error

    def release(self) -> None:
        self._released.set()
        if self._watch.is_alive():
            self._watch.join(2 * _LOOK_S + _STATEMENT_MS / 1e3)
        self._drop()
        self._engine.dispose()

    def _try(self) -> bool:
        connection = self._engine.connect()
        try:
            query = sa.text("SELECT pg_try_advisory_lock(:ours, :purpose)")
            got = bool(connection.scalar(query, {"ours": _OURS, "purpose": _PURPOSES[self._purpose]}))
            if got and self._fences:
                self._raise_epoch(connection)
            if got:
                self._connection = connection
            return got
        finally:
            if self._connection is not connection:
                connection.close()

    def _raise_epoch(self, connection: sa.Connection) -> None:
        """Make all earlier holders unable to write. Waits for their writes in progress to end."""
        mine = fences.c.purpose == self._purpose
        if connection.execute(fences.update().where(mine).values(epoch=fences.c.epoch + 1)).rowcount == 0:
            connection.execute(fences.insert().values(purpose=self._purpose, epoch=1))
        self._epoch = connection.scalar(sa.select(fences.c.epoch).where(mine))

    def _check(self, connection: sa.Connection) -> None:
        if not self.held or self._epoch is None:
            raise Unavailable(f"the {self._purpose} has lost its lock on the database; try again later")
        try:
            Fence(self._purpose, self._epoch)(connection)
        except Locked as error:
            raise Unavailable(f"{error}; try again later") from error

    def _look(self) -> None:
        while not self._released.wait(_LOOK_S):
            try:
                if self._connection is not None:
                    with self._using:
                        self._connection.scalar(sa.text("SELECT 1"))
                elif self._try():
                    log.warning("the %s holds its lock on the database again", self._purpose)
            except (DBAPIError, IsthmusError) as error:
                if self._connection is not None:
                    log.error("the %s has lost its lock on the database: %s", self._purpose, _short(error))
                self._drop()

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(DBAPIError):
                connection.invalidate()
                connection.close()


def acquire(database: Database, purpose: str) -> Lock:
    """Take the lock of a database for ``purpose`` ("server" or "worker") without waiting.

    Raises Locked if another process (or another Server of this process) holds it.
    """
    if database.sqlite_path is not None:
        path = database.sqlite_path.with_name(f"{database.sqlite_path.name}.{purpose}.lock")
        return _acquire_file(path, purpose, "this database")
    lock = _AdvisoryLock(database.url, purpose)
    lock.take()
    return lock


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
    return _FileLock(fd)


def _refuse(purpose: str, holder: str, what: str = "this database") -> NoReturn:
    by = f" ({holder})" if holder else ""
    raise Locked(f"another {purpose}{by} is using {what}. Stop it, or give this one its own --state or --database.")


def _short(error: Exception) -> str:
    text = str(error.orig) if isinstance(error, DBAPIError) else str(error)
    return (text.strip().splitlines() or [type(error).__name__])[0]
