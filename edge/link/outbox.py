"""Prototypes that the cloud has not yet acknowledged: a durable, bounded queue in SQLite.

An entry survives a kill before its acknowledgement and keeps its idempotency key, so a retry sends the same bytes.
With noise, this also prevents that one upload spends the privacy budget twice.
"""

import errno
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from isthmus.data.files import move
from isthmus.proto.errors import Corrupt, StorageFull, TooLarge
from isthmus.proto.limits import MAX_MESSAGE_BYTES

_SCHEMA = """
CREATE TABLE IF NOT EXISTS outbox (
    position INTEGER PRIMARY KEY AUTOINCREMENT,
    name TEXT NOT NULL UNIQUE,
    idempotency_key TEXT NOT NULL,
    payload BLOB NOT NULL,
    created_s REAL NOT NULL
)
"""


@dataclass(frozen=True)
class Entry:
    """One queued upload. ``name`` is unique (such as "prototypes/0"); ``created_s`` is Unix time."""

    name: str
    idempotency_key: str
    payload: bytes
    created_s: float


class Outbox:
    """The queue; one process opens it, and one thread at a time uses it.

    A damaged database is set aside as ``<name>.damaged`` and replaced by an empty one: its entries can be made again.
    Raises StorageFull if the disk or the queue is full, Corrupt for damage that appears later.
    """

    def __init__(self, path: Path, *, max_entries: int = 256, max_bytes: int = 16 << 20) -> None:
        self._max_entries = max_entries
        self._max_bytes = max_bytes
        self._path = path
        with _disk_errors(path):
            try:
                self._database = _opened(path)
            except sqlite3.DatabaseError as error:
                if _is_full(error) or not path.exists():
                    raise
                for suffix in ("", "-wal", "-shm"):
                    beside = path.with_name(path.name + suffix)
                    if beside.exists():
                        move(beside, path.with_name(f"{path.name}.damaged{suffix}"))
                self._database = _opened(path)

    def put(self, entry: Entry) -> None:
        """Add the entry durably; it replaces a waiting one of the same name.

        Raises TooLarge for a payload that no message can carry.
        """
        if len(entry.payload) > MAX_MESSAGE_BYTES:
            raise TooLarge(f"an entry of {len(entry.payload)} bytes can never be sent")
        with _disk_errors(self._path), self._transaction():
            self._database.execute("DELETE FROM outbox WHERE name = ?", (entry.name,))
            entries, waiting_bytes = self._extent()
            if entries >= self._max_entries or waiting_bytes + len(entry.payload) > self._max_bytes:
                raise StorageFull(f"the outbox is full: {entries} entries, {waiting_bytes} bytes await the cloud")
            self._database.execute(
                "INSERT INTO outbox (name, idempotency_key, payload, created_s) VALUES (?, ?, ?, ?)",
                (entry.name, entry.idempotency_key, entry.payload, entry.created_s),
            )

    def get(self, name: str) -> Entry | None:
        """Return the entry; None if there is none."""
        with _disk_errors(self._path):
            row = self._database.execute(
                "SELECT name, idempotency_key, payload, created_s FROM outbox WHERE name = ?", (name,)
            ).fetchone()
        return None if row is None else Entry(*row)

    def waiting(self) -> list[Entry]:
        """Return every entry, oldest first."""
        query = "SELECT name, idempotency_key, payload, created_s FROM outbox ORDER BY position"
        with _disk_errors(self._path):
            return [Entry(*row) for row in self._database.execute(query)]

    def acknowledge(self, name: str) -> None:
        """Delete the entry, if there is one."""
        with _disk_errors(self._path):
            self._database.execute("DELETE FROM outbox WHERE name = ?", (name,))

    def clear(self) -> None:
        """Delete every entry."""
        with _disk_errors(self._path):
            self._database.execute("DELETE FROM outbox")

    def close(self) -> None:
        self._database.close()

    def __enter__(self) -> "Outbox":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _extent(self) -> tuple[int, int]:
        entries, waiting_bytes = self._database.execute(
            "SELECT COUNT(*), COALESCE(SUM(LENGTH(payload)), 0) FROM outbox"
        ).fetchone()
        return int(entries), int(waiting_bytes)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._database.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            if self._database.in_transaction:  # A full disk has rolled back already.
                self._database.execute("ROLLBACK")
            raise
        self._database.execute("COMMIT")


def _opened(path: Path) -> sqlite3.Connection:
    database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    try:
        database.execute("PRAGMA journal_mode=WAL")
        database.execute("PRAGMA synchronous=FULL")
        database.execute(_SCHEMA)
        (verdict,) = database.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise sqlite3.DatabaseError(verdict)
        database.execute("SELECT name, idempotency_key, payload, created_s, position FROM outbox LIMIT 1").fetchone()
    except sqlite3.Error:
        database.close()
        raise
    return database


def _is_full(error: sqlite3.Error) -> bool:
    code = getattr(error, "sqlite_errorcode", None)
    # SQLite reports a full disk as FULL; where it maps its shared memory, as IOERR.
    return code is not None and code & 0xFF in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR)


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        if _is_full(error):
            raise StorageFull("the disk is full; free some space and it goes on") from error
        raise Corrupt(f"{path} cannot be used ({error}); move it away and run again") from error
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise StorageFull("the disk is full; free some space and it goes on") from error
        raise Corrupt(f"{path} cannot be used ({error.strerror}); move it away and run again") from error
