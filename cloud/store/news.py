"""News between machines: PostgreSQL's NOTIFY wakes the waiting side. A notice may be missed: that side also polls."""

import logging
import threading
from collections.abc import Callable
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError

from isthmus.cloud.store.database import OLD_WORKERS, OURS, POSTGRES_CONNECT, Database

log = logging.getLogger(__name__)

_AGAIN_S: Final = 5.0
_LOOK_S: Final = 1.0


def listen(database: Database, channel: str, tell: Callable[[], None]) -> threading.Event:
    """Call ``tell`` for each notification on ``channel``, in a thread of its own, until the returned event is set.

    On SQLite there is nobody else, so nothing is done. The connection also holds, with all other listeners, the lock
    that keeps a worker of version 0.1 from starting: it knows no leases.
    """
    stop = threading.Event()
    if not database.shared:
        return stop
    engine = sa.create_engine(
        database.url, poolclass=sa.NullPool, isolation_level="AUTOCOMMIT", connect_args=POSTGRES_CONNECT
    )

    def run() -> None:
        while not stop.is_set():
            try:
                with engine.connect() as connection:
                    connection.exec_driver_sql(f"LISTEN {channel}")
                    connection.exec_driver_sql(f"SELECT pg_try_advisory_lock_shared({OURS}, {OLD_WORKERS})")
                    tell()
                    driver: Any = connection.connection.driver_connection
                    while not stop.is_set():
                        for _ in driver.notifies(timeout=_LOOK_S):
                            tell()
            except DBAPIError as error:
                log.info("no news from the database: %s", str(error.orig).strip().splitlines()[:1])
            except Exception as error:  # The driver's own errors, which come around SQLAlchemy.
                log.info("no news from the database: %s", error)
            stop.wait(_AGAIN_S)

    threading.Thread(target=run, daemon=True, name=f"news of {channel}").start()
    return stop
