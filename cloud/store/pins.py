"""Rows of the table ``pins``: facts that must not change unnoticed."""

from collections.abc import Mapping

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


def put_all(database: Database, values: Mapping[str, bytes]) -> None:
    """Pin several facts in one transaction, in place of what was pinned before."""
    with database.writing() as connection:
        for name, value in values.items():
            connection.execute(pins.delete().where(pins.c.name == name))
            connection.execute(pins.insert().values(name=name, value=value))


def beginning_with(database: Database, prefix: str) -> list[bytes]:
    """Return what is pinned under the names that begin with ``prefix``, in the order of the names."""
    query = sa.select(pins.c.value).where(pins.c.name.startswith(prefix, autoescape=True)).order_by(pins.c.name)
    with database.reading() as connection:
        return [bytes(value) for value in connection.scalars(query)]
