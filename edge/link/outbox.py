"""What has been made and not yet acknowledged by the cloud: a durable, bounded queue in SQLite.

An entry survives a kill between its making and its acknowledgement, under one idempotency key, so that a retry sends
the very same bytes. (With noise that also keeps the privacy budget from being spent twice for one upload.)
"""

import errno
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from isthmus.proto.errors import StorageFull, TooLarge
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
    """``name`` says what it is (such as "prototypes/0") and is unique; ``created_s`` is Unix time."""

    name: str
    idempotency_key: str
    payload: bytes
    created_s: float


class Outbox:
    """Opened by one process at a time. Raises StorageFull where the disk or the queue is full."""

    def __init__(self, path: Path, *, max_entries: int = 256, max_bytes: int = 16 << 20) -> None:
        self._max_entries = max_entries
        self._max_bytes = max_bytes
        self._database = sqlite3.connect(path, isolation_level=None)
        with _disk_errors():
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.execute("PRAGMA synchronous=FULL")
            self._database.execute(_SCHEMA)

    def put(self, entry: Entry) -> None:
        """Adds the entry, durably; one of the same name that waits already is replaced.

        Raises TooLarge for a payload that no message could carry.
        """
        if len(entry.payload) > MAX_MESSAGE_BYTES:
            raise TooLarge(f"an entry of {len(entry.payload)} bytes can never be sent")
        with _disk_errors(), self._transaction():
            self._database.execute("DELETE FROM outbox WHERE name = ?", (entry.name,))
            entries, waiting_bytes = self._extent()
            if entries >= self._max_entries or waiting_bytes + len(entry.payload) > self._max_bytes:
                raise StorageFull(f"the outbox is full: {entries} entries, {waiting_bytes} bytes await the cloud")
            self._database.execute(
                "INSERT INTO outbox (name, idempotency_key, payload, created_s) VALUES (?, ?, ?, ?)",
                (entry.name, entry.idempotency_key, entry.payload, entry.created_s),
            )

    def get(self, name: str) -> Entry | None:
        row = self._database.execute(
            "SELECT name, idempotency_key, payload, created_s FROM outbox WHERE name = ?", (name,)
        ).fetchone()
        return None if row is None else Entry(*row)

    def waiting(self) -> list[Entry]:
        """Every entry, oldest first."""
        rows = self._database.execute("SELECT name, idempotency_key, payload, created_s FROM outbox ORDER BY position")
        return [Entry(*row) for row in rows]

    def acknowledge(self, name: str) -> None:
        """Drops the entry; nothing happens where there is none."""
        with _disk_errors():
            self._database.execute("DELETE FROM outbox WHERE name = ?", (name,))

    def clear(self) -> None:
        with _disk_errors():
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


@contextmanager
def _disk_errors() -> Iterator[None]:
    try:
        yield
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode == sqlite3.SQLITE_FULL:
            raise StorageFull("the disk is full") from error
        raise
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise StorageFull("the disk is full") from error
        raise
