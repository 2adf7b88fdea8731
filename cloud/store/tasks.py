"""Rows of the table ``tasks``: the tasks registered for elastic serving. Their weights are artefacts."""

from dataclasses import dataclass

import sqlalchemy as sa

from isthmus.cloud.store import audit
from isthmus.cloud.store.audit import Entry
from isthmus.cloud.store.database import Database
from isthmus.cloud.store.schema import tasks
from isthmus.cloud.store.tenants import DEFAULT, OverQuota
from isthmus.proto.errors import Busy


@dataclass(frozen=True)
class TaskRow:
    """A registered task. ``version`` counts the name's registrations from 1; ``artefact_id`` names its weights."""

    name: str
    version: int
    spec_json: str
    artefact_id: str
    created_s: float


def put(
    database: Database,
    name: str,
    spec_json: str,
    artefact_id: str,
    created_s: float,
    *,
    at_most: int,
    at_most_of_tenant: int | None = None,
) -> tuple[TaskRow, str | None]:
    """Add the task, or replace the one with the same name. Returns it, and the artefact that is now unused, if any.

    Raises Busy if the name is new and there are ``at_most`` tasks already, or ``at_most_of_tenant`` of its tenant.
    """
    with database.writing() as connection:
        before = connection.execute(sa.select(tasks).where(tasks.c.name == name).with_for_update()).first()
        if before is None:
            count = connection.scalar(sa.select(sa.func.count()).select_from(tasks)) or 0
            if count >= at_most:
                raise Busy(f"{at_most} tasks are registered already; remove one first")
        if at_most_of_tenant is not None:
            names = connection.scalars(sa.select(tasks.c.name).where(tasks.c.name != name))
            if sum(owner(each) == owner(name) for each in names) >= at_most_of_tenant:
                raise OverQuota("your quota of tasks is used up; remove one, or ask the operator for a higher one")
        version = 1 if before is None else before.version + 1
        row = TaskRow(name, version, spec_json, artefact_id, created_s)
        connection.execute(tasks.delete().where(tasks.c.name == name))
        connection.execute(
            tasks.insert().values(
                name=name, version=version, spec=spec_json, artefact_id=artefact_id, created_s=created_s
            )
        )
        orphan = None if before is None else _unused(connection, before.artefact_id)
        audit.write(connection, Entry(created_s, owner(name), "query key", "registered", name, f"version {version}"))
    return row, orphan


def describe(database: Database, name: str, version: int, spec_json: str) -> bool:
    """Change the description of this version of a task. Returns whether it is still registered."""
    with database.writing() as connection:
        of = (tasks.c.name == name) & (tasks.c.version == version)
        return connection.execute(tasks.update().where(of).values(spec=spec_json)).rowcount == 1


def owner(name: str) -> str:
    """Return the tenant of a task, from its name inside: TENANT/NAME."""
    return name.rpartition("/")[0] or DEFAULT


def remove(database: Database, name: str) -> tuple[bool, str | None]:
    """Remove a task. Returns whether it existed, and the artefact that is now unused, if any."""
    with database.writing() as connection:
        before = connection.execute(sa.select(tasks).where(tasks.c.name == name).with_for_update()).first()
        if before is None:
            return False, None
        connection.execute(tasks.delete().where(tasks.c.name == name))
        audit.write(connection, Entry(database.now_s(), owner(name), "query key", "removed", name))
        return True, _unused(connection, before.artefact_id)


def listing(database: Database) -> list[TaskRow]:
    """Return all tasks, sorted by name."""
    with database.reading() as connection:
        rows = connection.execute(sa.select(tasks).order_by(tasks.c.name)).all()
    return [TaskRow(row.name, row.version, row.spec, row.artefact_id, row.created_s) for row in rows]


def named(database: Database, artefact_id: str) -> bool:
    """Return whether some task uses these weights."""
    with database.reading() as connection:
        return _unused(connection, artefact_id) is None


def _unused(connection: sa.Connection, artefact_id: str) -> str | None:
    uses = connection.scalar(sa.select(sa.func.count()).select_from(tasks).where(tasks.c.artefact_id == artefact_id))
    return None if uses else artefact_id
