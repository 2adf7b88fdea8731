"""Rows of the table ``devices``. Only the hash of a token is stored, never the token."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import sqlalchemy as sa

from isthmus.cloud.store import audit
from isthmus.cloud.store.audit import Entry
from isthmus.cloud.store.database import Database
from isthmus.cloud.store.schema import devices, jobs, students, tenants, uploads
from isthmus.cloud.store.tenants import DEFAULT, OverQuota
from isthmus.proto.errors import Busy

_BY_ID: Final = sa.select(devices).where(devices.c.id == sa.bindparam("device_id"))


@dataclass(frozen=True)
class Device:
    """An enrolled device. Times are Unix seconds. ``revoked_s`` is None while the device may call."""

    device_id: str
    name: str
    token_hash: bytes
    created_s: float
    revoked_s: float | None = None
    seen_s: float | None = None
    """When it last called, to about an hour; None if it has not called since it enrolled."""
    tenant: str = DEFAULT
    certificate: str | None = None
    """Identity in the TLS certificate that its calls need, if it enrolled with one."""
    release: str = ""
    """The release of the student that it fetched or asked with last; "" if that is unknown."""

    def __repr__(self) -> str:
        return f"Device(device_id={self.device_id!r}, name={self.name!r})"


def add(
    database: Database,
    device: Device,
    *,
    at_most: int,
    at_most_per_hour: int | None = None,
    unseen_s: float = 3_600.0,
    at_most_of_tenant: int | None = None,
) -> None:
    """Add the device.

    If there are ``at_most`` devices, those make room that enrolled more than ``unseen_s`` ago and never called since.
    Raises Busy if there is still no room, if ``at_most_per_hour`` devices enrolled within the last hour, or if the
    tenant has ``at_most_of_tenant`` devices.
    """
    with database.writing() as connection:
        if at_most_per_hour is not None:
            lately = _count(connection, devices.c.created_s > device.created_s - 3_600.0)
            if lately >= at_most_per_hour:
                raise Busy("too many devices enrolled within the last hour; try again later", retry_after_s=60.0)
        if _count(connection, devices.c.revoked_s.is_(None)) >= at_most:
            unseen = (devices.c.seen_s.is_(None), devices.c.created_s < device.created_s - unseen_s)
            has_job = sa.exists().where(jobs.c.device_id == devices.c.id)
            connection.execute(devices.delete().where(*unseen, ~has_job))
        if _count(connection, devices.c.revoked_s.is_(None)) >= at_most:
            raise Busy("this server accepts no more devices; ask the operator")
        mine = (devices.c.tenant == device.tenant, devices.c.revoked_s.is_(None))
        if at_most_of_tenant is not None and _count(connection, *mine) >= at_most_of_tenant:
            raise OverQuota("your quota of devices is used up; revoke some, or ask the operator for a higher one")
        connection.execute(
            devices.insert().values(
                id=device.device_id,
                name=device.name,
                token_hash=device.token_hash,
                created_s=device.created_s,
                tenant=device.tenant,
                certificate=device.certificate,
            )
        )
        entry = Entry(device.created_s, device.tenant, device.device_id, "enrolled", device.device_id)
        audit.write(connection, entry)


def saw(database: Database, device_id: str, now_s: float) -> None:
    """Record that a device has called."""
    with database.writing() as connection:
        connection.execute(devices.update().where(devices.c.id == device_id).values(seen_s=now_s))


def remove(database: Database, device_id: str) -> bool:
    """Remove a device with its jobs, uploads and rows of students. Returns whether there was such a device.

    The audit log then says that a device was erased, but of none of its entries which.
    """
    with database.writing() as connection:
        tenant = connection.scalar(sa.select(devices.c.tenant).where(devices.c.id == device_id))
        if tenant is not None:
            audit.write(connection, Entry(database.now_s(), tenant, audit.ERASED, "erased", audit.ERASED))
        audit.erase(connection, device_id)
        mine = sa.select(jobs.c.id).where(jobs.c.device_id == device_id)
        connection.execute(uploads.delete().where(uploads.c.job_id.in_(mine)))
        connection.execute(jobs.delete().where(jobs.c.device_id == device_id))
        connection.execute(students.delete().where(students.c.device_id == device_id))
        return connection.execute(devices.delete().where(devices.c.id == device_id)).rowcount == 1


def get(database: Database, device_id: str) -> Device | None:
    """Return the device, or None if there is none of this id."""
    rows = database.read(_BY_ID, {"device_id": device_id})
    return _device(rows[0]) if rows else None


def of_certificate(database: Database, certificate: str) -> Device | None:
    """Return the device that enrolled with a certificate of this identity; None if none or several did."""
    query = sa.select(devices).where(devices.c.certificate == certificate, devices.c.revoked_s.is_(None)).limit(2)
    rows = database.read(query)
    return _device(rows[0]) if len(rows) == 1 else None


def listing(database: Database, tenant: str | None = None) -> list[Device]:
    """Return the devices of a tenant, or all, oldest first."""
    query = sa.select(devices).order_by(devices.c.created_s, devices.c.id)
    with database.reading() as connection:
        rows = connection.execute(query if tenant is None else query.where(devices.c.tenant == tenant)).all()
    return [_device(row) for row in rows]


def count(database: Database) -> int:
    """Return how many devices are enrolled and not revoked."""
    with database.reading() as connection:
        return _count(connection, devices.c.revoked_s.is_(None))


def revoke(database: Database, device_id: str, now_s: float) -> bool:
    """Refuse a device from its next call on. Returns whether there was such a device."""
    with database.writing() as connection:
        mine = (devices.c.id == device_id, devices.c.revoked_s.is_(None))
        return _revoke(connection, now_s, *mine) == 1


def revoke_enrolled_since(database: Database, since_s: float, now_s: float) -> int:
    """Refuse all devices that enrolled at ``since_s`` or later. Returns how many there were."""
    with database.writing() as connection:
        return _revoke(connection, now_s, devices.c.created_s >= since_s, devices.c.revoked_s.is_(None))


def revoked_among(database: Database, device_ids: Iterable[str]) -> list[str]:
    """Return those of the devices that have been revoked, or deleted, or whose tenant was closed."""
    asked = set(device_ids)
    closed = sa.select(tenants.c.name).where(tenants.c.closed_s.is_not(None))
    with database.reading() as connection:
        query = sa.select(devices.c.id).where(
            devices.c.id.in_(asked), devices.c.revoked_s.is_(None), devices.c.tenant.not_in(closed)
        )
        return sorted(asked - set(connection.scalars(query)))


def _device(row: sa.Row[tuple[object, ...]]) -> Device:
    return Device(
        row.id,
        row.name,
        bytes(row.token_hash),
        row.created_s,
        row.revoked_s,
        row.seen_s,
        row.tenant,
        row.certificate,
        row.release,
    )


def _revoke(connection: sa.Connection, now_s: float, *which: sa.ColumnElement[bool]) -> int:
    rows = connection.execute(sa.select(devices.c.id, devices.c.tenant).where(*which).with_for_update()).all()
    connection.execute(devices.update().where(*which).values(revoked_s=now_s))
    for row in rows:
        audit.write(connection, Entry(now_s, row.tenant, "operator", "revoked", row.id))
    return len(rows)


def _count(connection: sa.Connection, *conditions: sa.ColumnElement[bool]) -> int:
    return connection.scalar(sa.select(sa.func.count()).select_from(devices).where(*conditions)) or 0
