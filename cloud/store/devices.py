"""Rows of the table ``devices``. Only the hash of a token is stored, never the token."""

from collections.abc import Iterable
from dataclasses import dataclass

import sqlalchemy as sa

from isthmus.cloud.store.database import Database
from isthmus.cloud.store.schema import devices


@dataclass(frozen=True)
class Device:
    """An enrolled device. Times are Unix seconds; ``revoked_s`` is None while the device may call."""

    device_id: str
    name: str
    token_hash: bytes
    created_s: float
    revoked_s: float | None = None

    def __repr__(self) -> str:
        return f"Device(device_id={self.device_id!r}, name={self.name!r})"


def add(database: Database, device: Device, *, at_most: int) -> bool:
    """Add the device and return True, or return False if there are ``at_most`` devices already."""
    with database.writing() as connection:
        count = connection.scalar(sa.select(sa.func.count()).select_from(devices).where(devices.c.revoked_s.is_(None)))
        if (count or 0) >= at_most:
            return False
        connection.execute(
            devices.insert().values(
                id=device.device_id, name=device.name, token_hash=device.token_hash, created_s=device.created_s
            )
        )
        return True


def get(database: Database, device_id: str) -> Device | None:
    """Return the device, or None if there is none of this id."""
    with database.reading() as connection:
        row = connection.execute(sa.select(devices).where(devices.c.id == device_id)).first()
    return None if row is None else _device(row)


def listing(database: Database) -> list[Device]:
    """Return all devices, oldest first."""
    with database.reading() as connection:
        rows = connection.execute(sa.select(devices).order_by(devices.c.created_s, devices.c.id)).all()
    return [_device(row) for row in rows]


def revoke(database: Database, device_id: str, now_s: float) -> bool:
    """Refuse a device from its next call on. Returns whether there was such a device."""
    with database.writing() as connection:
        result = connection.execute(
            devices.update().where(devices.c.id == device_id, devices.c.revoked_s.is_(None)).values(revoked_s=now_s)
        )
    return result.rowcount == 1


def revoked_among(database: Database, device_ids: Iterable[str]) -> list[str]:
    """Return those of the devices that have been revoked, or deleted."""
    asked = set(device_ids)
    with database.reading() as connection:
        query = sa.select(devices.c.id).where(devices.c.id.in_(asked), devices.c.revoked_s.is_(None))
        return sorted(asked - set(connection.scalars(query)))


def _device(row: sa.Row[tuple[object, ...]]) -> Device:
    return Device(row.id, row.name, bytes(row.token_hash), row.created_s, row.revoked_s)
