"""The database: SQLite beside the server, or PostgreSQL by URL. One short transaction at a time.

``reading`` and ``writing`` are the only ways in. A writing transaction takes SQLite's write lock at its start
(``BEGIN IMMEDIATE``); on PostgreSQL the row is read ``FOR UPDATE``. On both databases, reading a row, deciding and
writing it back is therefore one step.
"""

import errno
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy.exc import DataError, DBAPIError, InvalidatePoolError

from isthmus.proto.errors import Busy, InvalidInput, IsthmusError, StorageFull, Unavailable

_BUSY_TIMEOUT_S = 15.0
_CONNECTIONS: Final = 16
"""Connections to PostgreSQL that a process keeps. A server's threads use about as many; ten more are made at need."""
_IDLE_S: Final = 1.0
"""A connection that was not used for so long is tried before it is used: the database may have restarted."""
_DAMAGED: Final = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_FORBIDDEN: Final = (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM)
OURS: Final = 0x15_7A_05
"""First half of the keys of our advisory locks on PostgreSQL."""
OLD_WORKERS: Final = 2
"""Second half of the key of the lock that the one worker of version 0.1 holds."""
_MIGRATING: Final = 3
_MIGRATION_WAIT: Final = "10s"
_STATEMENT_WAIT: Final = "60s"
_LOCK_TIMEOUT: Final = "55P03"
_TRY_AGAIN: Final = ("40001", "40P01", _LOCK_TIMEOUT)
_NO_RIGHTS: Final = "42501"
_REFUSALS: Final = {
    "does not exist": "create the database or its user first, or correct the URL",
    "authentication failed": "correct the user or the password",
    "no password supplied": "give the password, in the environment variable and not on the command line",
    "pg_hba.conf": "let this machine and user in, in the database's pg_hba.conf",
    "resolve": "correct the host's name",
}
"""What an operator can do about refused connections, by a part of PostgreSQL's message: it has no code for them."""
POSTGRES_CONNECT: Final = {
    "connect_timeout": 4,
    "keepalives_idle": 2,
    "keepalives_interval": 1,
    "keepalives_count": 2,
    "tcp_user_timeout": 4_000,
}
"""libpq notices within about 4 s that the database's machine or the network is gone."""


class Unusable(InvalidInput):
    """The database cannot be used as it is. The message is for the operator: it names the file and the way out."""


class Database:
    """An engine with our transaction rules. Safe to use from several threads and processes."""

    def __init__(self, url: str) -> None:
        """Raises InvalidInput for a URL that is neither SQLite (in a file) nor PostgreSQL."""
        self.url = _normalised(url)
        sqlite = self.url.get_backend_name() == "sqlite"
        if sqlite and self.url.database in (None, "", ":memory:"):
            raise InvalidInput("the database must be a file, because the worker is another process")
        self.sqlite_path: Path | None = Path(str(self.url.database)) if sqlite else None
        self.guard: Callable[[sa.Connection], None] | None = None
        """Called at the start of each writing transaction; it raises if this process may not write (see leases.py)."""
        self._ahead_s = 0.0
        connect_args: dict[str, Any] = {"timeout": _BUSY_TIMEOUT_S} if sqlite else POSTGRES_CONNECT
        try:
            pool = {} if sqlite else {"pool_size": _CONNECTIONS}
            self._engine = sa.create_engine(self.url, connect_args=connect_args, **pool)
            alone = {"isthmus_alone": True} if sqlite else {"isolation_level": "AUTOCOMMIT"}
            self._alone = self._engine.execution_options(**alone)
        except ModuleNotFoundError as error:
            hint = f"the database needs the package '{error.name}': pip install 'psycopg[binary]'"
            raise InvalidInput(hint) from None
        if sqlite:
            sa.event.listen(self._engine, "connect", _prepare_sqlite)
            sa.event.listen(self._engine, "begin", _begin_sqlite)
        else:
            sa.event.listen(self._engine, "checkin", _note_return)
            sa.event.listen(self._engine, "checkout", _ping)

    @contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """Open a transaction that sees one state of the database."""
        with self._translated(), self._engine.connect() as connection, connection.begin():
            yield connection

    def read(self, query: sa.Select[Any], values: Mapping[str, Any] | None = None) -> Sequence[Any]:
        """Return the rows of one query. ``values``: those of its bound parameters.

        It is answered without a transaction around it: by PostgreSQL in one turn instead of three. A query that is
        asked often is best made once, with bound parameters: making one costs as much as asking it.
        """
        with self._translated(), self._alone.connect() as connection:
            return connection.execute(query, values).all()

    @contextmanager
    def writing(self) -> Iterator[sa.Connection]:
        """Open a transaction that is committed at the end of the block, or rolled back if the block raises.

        Raises StorageFull if the disk is full, Busy if another transaction takes too long, and whatever ``guard``
        raises.
        """
        with (
            self._translated(),
            self._engine.connect().execution_options(isthmus_writing=True) as connection,
            connection.begin(),
        ):
            if self.guard is not None:
                self.guard(connection)
            yield connection

    @property
    def shared(self) -> bool:
        """Whether any number of servers and workers may use the database: PostgreSQL."""
        return self.sqlite_path is None

    def clock_s(self, connection: sa.Connection) -> float:
        """Return the database's clock in Unix seconds: one clock for all machines. SQLite's is this machine's."""
        if not self.shared:
            return time.time()
        at_s = float(connection.execute(sa.text("SELECT extract(epoch FROM clock_timestamp())")).scalar_one())
        self._ahead_s = at_s - time.time()
        return at_s

    def now_s(self) -> float:
        """Return the database's clock as it is by this machine's clock, since ``clock_s`` was last asked."""
        return time.time() + self._ahead_s

    def connect(self) -> None:
        """Connect for the first time. Raises Unusable for a refusal that will last, with its reason and the way out."""
        try:
            with self._engine.connect() as connection:
                self.clock_s(connection)
        except DBAPIError as error:
            reason = " ".join(str(error.orig).split())
            for part, way_out in _REFUSALS.items():
                if self.shared and part in reason:
                    raise Unusable(f"the database {self.shown} refuses: {reason[-160:]}; {way_out}") from error
            with self._translated():
                raise

    def is_empty(self) -> bool:
        """Return whether the database has no tables of ours yet."""
        with self.reading() as connection:
            return not sa.inspect(connection).has_table("alembic_version")

    def forget_free_pages(self) -> None:
        """Remove what was deleted from SQLite's write-ahead log too, as far as other connections let us."""
        if self.sqlite_path is not None:
            with self._engine.connect() as connection:
                connection.connection.cursor().execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def migrate(self) -> None:
        """Upgrade the schema to the newest version. Of several servers that start at once, one does it.

        Raises Busy if the tables are in use for so long that the upgrade would keep others waiting.
        """
        config = _migrations()
        try:
            with self.writing() as connection:
                if self.shared:
                    connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({OURS}, {_MIGRATING})")
                    connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{_MIGRATION_WAIT}'")
                    connection.exec_driver_sql(f"SET LOCAL statement_timeout = '{_STATEMENT_WAIT}'")
                    self.clock_s(connection)
                config.attributes["connection"] = connection
                command.upgrade(config, "head")
        except CommandError as error:
            raise self._newer() from error
        except DBAPIError as error:
            if getattr(error.orig, "sqlstate", None) != _NO_RIGHTS:
                raise
            raise Unusable(
                f"the user of the database {self.shown} may not make its tables: let it own the database, or grant it "
                "CREATE on the schema"
            ) from error

    def check_schema(self) -> None:
        """Check that this version reads the database as it is, and change nothing.

        Raises Unusable for the schema of a newer version, and for an older one that the server has yet to upgrade.
        """
        scripts = ScriptDirectory.from_config(_migrations())
        with self.reading() as connection:
            found = MigrationContext.configure(connection).get_current_revision()
        if found == scripts.get_current_head():
            return
        if found is not None and found not in {script.revision for script in scripts.walk_revisions()}:
            raise self._newer()
        raise Unusable(
            f"the database {self.shown} was made by an older version of Isthmus. Start 'isthmus cloud serve' on it "
            "once, which upgrades it"
        )

    def _newer(self) -> Unusable:
        return Unusable(
            f"the database {self.shown} was made by a newer version of Isthmus. Run that version, restore a backup "
            "of this one's time, or give another --state or --database"
        )

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except DBAPIError as error:
            code = _sqlite_code(error)
            # All our statements fit the schema that was migrated to, so a missing column is a damaged schema.
            if code in _DAMAGED or (code == sqlite3.SQLITE_ERROR and "no such" in str(error.orig)):
                raise Unusable(
                    f"{self.shown} is damaged, or no SQLite database. Restore it ('isthmus cloud restore'), or move it "
                    "away to start over: every device must then enrol again"
                ) from error
            if code in _FORBIDDEN:
                raise Unusable(
                    f"{self.shown} cannot be opened for writing: check that the file and its folder belong to the user "
                    "that runs this command, and that the disk is not mounted read-only"
                ) from error
            known = as_ours(error)
            if known is error:
                raise
            raise known from error

    @property
    def shown(self) -> str:
        """The database's file or URL, without a password."""
        return str(self.sqlite_path or self.url.render_as_string(hide_password=True))

    def close(self) -> None:
        self._engine.dispose()


def _migrations() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    return config


def _normalised(url: str) -> sa.URL:
    try:
        parsed = sa.make_url(url)
    except sa.exc.ArgumentError:
        raise InvalidInput("the database URL cannot be parsed; try sqlite:///FILE or postgresql://HOST/NAME") from None
    backend = parsed.get_backend_name()
    if backend not in ("sqlite", "postgresql"):
        raise InvalidInput(f"{backend!r} databases are not supported; use sqlite:///FILE or postgresql://HOST/NAME")
    return parsed.set(drivername="postgresql+psycopg") if parsed.drivername == "postgresql" else parsed


def _note_return(_connection: object, record: Any) -> None:
    record.info["returned_s"] = time.monotonic()


def _ping(connection: Any, record: Any, _proxy: object) -> None:
    """Try a connection that was idle for a while. If it does not work any more, all are replaced."""
    if time.monotonic() - record.info.get("returned_s", time.monotonic()) < _IDLE_S:
        return
    try:
        connection.execute("")
        connection.rollback()
    except Exception as error:
        raise InvalidatePoolError("the database has ended an idle connection") from error


def _prepare_sqlite(connection: sqlite3.Connection, _record: object) -> None:
    # The driver's implicit BEGIN would be sent too late; _begin_sqlite sends it.
    connection.isolation_level = None
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "secure_delete=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: sa.Connection) -> None:
    options = connection.get_execution_options()
    if not options.get("isthmus_alone", False):
        connection.exec_driver_sql("BEGIN IMMEDIATE" if options.get("isthmus_writing", False) else "BEGIN")


def as_ours(error: DBAPIError) -> IsthmusError | DBAPIError:
    """Return the error of our tree, if a client or an operator can act on this failure; else the same error."""
    cause = error.orig
    if isinstance(cause, sqlite3.Error):
        code = _sqlite_code(error)
        if code == sqlite3.SQLITE_FULL:
            return StorageFull("the server's disk is full; try again later")
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            return Busy("the database is busy; try again", retry_after_s=1.0)
        return error
    if isinstance(error, DataError):
        return InvalidInput("the request holds a value that the database cannot store")
    state = getattr(cause, "sqlstate", None)
    if state == "53100":
        return StorageFull("the server's disk is full; try again later")
    if state in _TRY_AGAIN:
        return Busy("the database is busy; try again", retry_after_s=1.0)
    if error.connection_invalidated or state is None:
        return Unavailable("the database cannot be reached; try again later")
    return error


def _sqlite_code(error: DBAPIError) -> int:
    code: int = getattr(error.orig, "sqlite_errorcode", 0)
    return code & 0xFF


def disk_is_full(error: OSError) -> bool:
    """Return whether an error of the file system means that no space or quota is left."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)
