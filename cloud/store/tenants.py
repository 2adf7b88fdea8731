"""Rows of the tables ``tenants``, ``tenant_keys`` and ``usage``. Only hashes of keys are stored."""

from dataclasses import asdict, dataclass, fields
from typing import Final, Literal

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from isthmus.cloud.store.database import Database
from isthmus.cloud.store.schema import tenant_keys, tenants, usage
from isthmus.proto.errors import Busy

DEFAULT: Final = "default"
"""The tenant of all that was there before there were others. It needs no row; with one it has quotas."""
DAY_S: Final = 86_400.0


class OverQuota(Busy):
    """A tenant has used up a quota. On the wire it is Busy."""


Purpose = Literal["enrol", "query"]
"""What a key is for: to enrol devices, or to register and ask image tasks and language models."""


@dataclass(frozen=True)
class Quotas:
    """Limits of a tenant; None: no limit, 0: nothing. ``queries_per_s`` counts calls, frames and images per server."""

    most_devices: int | None = None
    most_tasks: int | None = None
    jobs_per_day: int | None = None
    queries_per_s: float | None = None
    bytes_per_day: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and not 0 <= value <= 2**53:
                raise ValueError(f"{field.name}: a quota is at least 0 and at most 2^53")


@dataclass(frozen=True)
class Tenant:
    """Who shares the service. ``closed_s``: since when none of its keys and devices is accepted; None: it is open."""

    name: str
    created_s: float
    quotas: Quotas = Quotas()
    closed_s: float | None = None


@dataclass(frozen=True)
class Usage:
    """What a tenant used on one day (days since 1970, UTC)."""

    jobs: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class Key:
    """A key of a tenant: the SHA-256 of it, and what it is for."""

    key_hash: bytes
    tenant: str
    purpose: str
    created_s: float

    def __repr__(self) -> str:
        return f"Key(tenant={self.tenant!r}, purpose={self.purpose!r})"


def put(database: Database, tenant: Tenant) -> bool:
    """Add a tenant, or change the one of the same name. Returns whether it is new."""
    values = {"closed_s": tenant.closed_s, **asdict(tenant.quotas)}
    with database.writing() as connection:
        if connection.execute(tenants.update().where(tenants.c.name == tenant.name).values(values)).rowcount:
            return False
        connection.execute(tenants.insert().values(name=tenant.name, created_s=tenant.created_s, **values))
    return True


def listing(database: Database) -> list[Tenant]:
    """Return all tenants, by name."""
    with database.reading() as connection:
        return [_tenant(row) for row in connection.execute(sa.select(tenants).order_by(tenants.c.name))]


def add_key(database: Database, key: Key) -> None:
    """Add a key of a tenant that exists."""
    with database.writing() as connection:
        connection.execute(tenant_keys.insert().values(asdict(key)))


def keys(database: Database) -> list[Key]:
    """Return all keys, oldest first."""
    with database.reading() as connection:
        rows = connection.execute(sa.select(tenant_keys).order_by(tenant_keys.c.created_s, tenant_keys.c.key_hash))
        return [Key(bytes(row.key_hash), row.tenant, row.purpose, row.created_s) for row in rows]


def remove_keys(database: Database, tenant: str, *, before_s: float, purpose: str | None = None) -> int:
    """Remove a tenant's keys made before ``before_s``, of one purpose or all. Returns how many there were."""
    with database.writing() as connection:
        old = (tenant_keys.c.tenant == tenant, tenant_keys.c.created_s < before_s)
        of = () if purpose is None else (tenant_keys.c.purpose == purpose,)
        return connection.execute(tenant_keys.delete().where(*old, *of)).rowcount


def used(database: Database, day: int) -> dict[str, Usage]:
    """Return what each tenant used on a day."""
    with database.reading() as connection:
        rows = connection.execute(sa.select(usage).where(usage.c.day == day))
        return {row.tenant: Usage(row.jobs, row.bytes) for row in rows}


def count(connection: sa.Connection, tenant: str, day: int, *, jobs: int = 0, bytes: int = 0) -> Usage:
    """Add to what a tenant used on a day, in the caller's transaction. Returns the sums."""
    insert = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
    new = insert(usage).values(tenant=tenant, day=day, jobs=jobs, bytes=bytes)
    sums = {"jobs": usage.c.jobs + jobs, "bytes": usage.c.bytes + bytes}
    row = connection.execute(
        new.on_conflict_do_update(index_elements=["tenant", "day"], set_=sums).returning(usage.c.jobs, usage.c.bytes)
    ).one()
    return Usage(row.jobs, row.bytes)


def day_of(unix_s: float) -> int:
    """Return the day of a time, counted from 1970 (UTC)."""
    return int(unix_s // DAY_S)


def _tenant(row: sa.Row[tuple[object, ...]]) -> Tenant:
    quotas = Quotas(**{field.name: getattr(row, field.name) for field in fields(Quotas)})
    return Tenant(row.name, row.created_s, quotas, row.closed_s)
