"""Rows of the table ``audit``: what was enrolled, published, removed and refused, by whom and when.

Rows are only added. One thing changes them: what is erased of a device includes its id here.
"""

from dataclasses import dataclass
from typing import Final

import sqlalchemy as sa

from isthmus.cloud.store.database import Database
from isthmus.cloud.store.schema import audit

ERASED: Final = "erased"
_MOST: Final = 1_000_000
_DETAIL_CHARS: Final = 300


@dataclass(frozen=True)
class Entry:
    """One event. ``actor``: a device's id, a kind of key, or "operator"; ``subject``: what it was done to."""

    at_s: float
    tenant: str
    actor: str
    action: str
    subject: str = ""
    detail: str = ""


def write(connection: sa.Connection, entry: Entry) -> None:
    """Add an entry in the caller's transaction, so that there is none without what it is about, and the reverse."""
    values = {name: getattr(entry, name) for name in ("at_s", "tenant", "actor", "action", "subject", "detail")}
    values["detail"] = entry.detail[:_DETAIL_CHARS]
    connection.execute(audit.insert().values(values))


def note(database: Database, entry: Entry) -> None:
    """Add an entry in a transaction of its own. The oldest go when there are a million."""
    with database.writing() as connection:
        write(connection, entry)
        newest = connection.scalar(sa.select(sa.func.max(audit.c.id))) or 0
        if newest % 1_000 == 0:
            connection.execute(audit.delete().where(audit.c.id <= newest - _MOST))


def erase(connection: sa.Connection, device_id: str) -> None:
    """Replace the id of a device that is erased."""
    for column in (audit.c.actor, audit.c.subject):
        connection.execute(audit.update().where(column == device_id).values({column.name: ERASED}))


def listing(database: Database, *, tenant: str | None = None, since_s: float = 0.0, most: int = 1_000) -> list[Entry]:
    """Return the newest ``most`` entries, of one tenant or all, oldest first."""
    query = sa.select(audit).where(audit.c.at_s >= since_s).order_by(audit.c.id.desc()).limit(most)
    if tenant is not None:
        query = query.where(audit.c.tenant == tenant)
    with database.reading() as connection:
        rows = connection.execute(query).all()
    return [Entry(row.at_s, row.tenant, row.actor, row.action, row.subject, row.detail) for row in reversed(rows)]
