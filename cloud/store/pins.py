"""Rows of the table ``pins``: facts that must not change unnoticed."""

import sqlalchemy as sa

from isthmus.cloud.store.database import Database
from isthmus.cloud.store.schema import pins


def get(database: Database, name: str) -> bytes | None:
    """Return what is pinned under ``name``, or None if nothing is."""
    with database.reading() as connection:
        value = connection.scalar(sa.select(pins.c.value).where(pins.c.name == name))
    return None if value is None else bytes(value)


def put(database: Database, name: str, value: bytes) -> None:
    """Pin ``value`` under ``name``, in place of what was pinned before."""
    with database.writing() as connection:
        connection.execute(pins.delete().where(pins.c.name == name))
        connection.execute(pins.insert().values(name=name, value=value))
