"""Rows of the table ``pins``: facts that must not change unnoticed."""

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from isthmus.cloud.store.database import Database
from isthmus.cloud.store.schema import pins


def get(database: Database, name: str) -> bytes | None:
    """Return what is pinned under ``name``, or None if nothing is."""
    with database.reading() as connection:
        value = connection.scalar(sa.select(pins.c.value).where(pins.c.name == name))
    return None if value is None else bytes(value)


def put_once(database: Database, name: str, value: bytes) -> bytes:
    """Pin ``value`` under ``name`` unless something is pinned there. Returns what is pinned from then on."""
    with database.writing() as connection:
        known = connection.scalar(sa.select(pins.c.value).where(pins.c.name == name))
        if known is None:
            insert = postgresql.insert if database.shared else sqlite.insert
            connection.execute(insert(pins).values(name=name, value=value).on_conflict_do_nothing())
            known = connection.execute(sa.select(pins.c.value).where(pins.c.name == name)).scalar_one()
    return bytes(known)


def put(database: Database, name: str, value: bytes) -> None:
    """Pin ``value`` under ``name``, in place of what was pinned before."""
    put_once(database, name, value)
    with database.writing() as connection:
        connection.execute(pins.update().where(pins.c.name == name).values(value=value))
