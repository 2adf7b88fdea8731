"""Rows of the table ``students``: the owner and the signed manifest of each student."""

from dataclasses import dataclass
from typing import Final

import sqlalchemy as sa

from isthmus.cloud.store import audit
from isthmus.cloud.store.audit import Entry
from isthmus.cloud.store.database import Database
from isthmus.cloud.store.schema import devices, students
from isthmus.proto.messages import SignedManifest

_BY_ID: Final = sa.select(students).where(students.c.id == sa.bindparam("student_id"))
_OWN: Final = students.c.device_id == sa.bindparam("device_id")
_BASE: Final = (students.c.id == sa.bindparam("base_id")) & students.c.device_id.is_(None)
_NEWEST: Final = (
    sa.select(students)
    .where(_OWN | _BASE)
    .order_by(students.c.device_id.is_(None), students.c.created_s.desc(), students.c.id.desc())
    .limit(1)
)


@dataclass(frozen=True)
class StudentRow:
    """A student. ``device_id`` is None for a base student, which is open to every device."""

    student_id: str
    device_id: str | None
    kind: str
    signed: SignedManifest
    created_s: float
    heads_sha256: bytes | None = None
    """SHA-256 of the heads' file, if the student has heads and this was recorded."""
    release: str = ""
    """Id of the release that it is of; "" if that is unknown."""


def put(database: Database, student: StudentRow) -> None:
    """Add the student, or replace the one with the same id."""
    with database.writing() as connection:
        owner = sa.select(devices.c.tenant).where(devices.c.id == student.device_id)
        if student.kind != "interim":
            tenant = connection.scalar(owner) or ""
            entry = Entry(student.created_s, tenant, student.device_id or "server", "published", student.student_id)
            audit.write(connection, entry)
        connection.execute(students.delete().where(students.c.id == student.student_id))
        connection.execute(
            students.insert().values(
                id=student.student_id,
                device_id=student.device_id,
                kind=student.kind,
                manifest=student.signed.manifest_bytes,
                signature=student.signed.signature,
                created_s=student.created_s,
                heads_sha256=student.heads_sha256,
                release=student.release,
            )
        )


def get(database: Database, student_id: str) -> StudentRow | None:
    """Return the student, or None if there is none of this id."""
    rows = database.read(_BY_ID, {"student_id": student_id})
    return _student(rows[0]) if rows else None


def newest(database: Database, device_id: str, base_id: str) -> StudentRow | None:
    """Return a device's newest student; the base student of this id if it has none, and None without that."""
    rows = database.read(_NEWEST, {"device_id": device_id, "base_id": base_id})
    return _student(rows[0]) if rows else None


def of_device(database: Database, device_id: str) -> list[StudentRow]:
    """Return a device's own students, newest first."""
    query = (
        sa.select(students)
        .where(students.c.device_id == device_id)
        .order_by(students.c.created_s.desc(), students.c.id.desc())
    )
    return [_student(row) for row in database.read(query)]


def bases(database: Database) -> list[StudentRow]:
    """Return the base students of all releases."""
    with database.reading() as connection:
        return bases_in(connection)


def bases_in(connection: sa.Connection) -> list[StudentRow]:
    """Return the base students of all releases, as a transaction sees them."""
    return [_student(row) for row in connection.execute(sa.select(students).where(students.c.device_id.is_(None)))]


def sign_anew(database: Database, student_id: str, signed: SignedManifest) -> None:
    """Replace a student's manifest and signature, if there is such a student."""
    changed = {"manifest": signed.manifest_bytes, "signature": signed.signature}
    with database.writing() as connection:
        connection.execute(students.update().where(students.c.id == student_id).values(**changed))


def remove(database: Database, student_id: str) -> None:
    """Remove the student's row, if there is one."""
    with database.writing() as connection:
        connection.execute(students.delete().where(students.c.id == student_id))


def _student(row: sa.Row[tuple[object, ...]]) -> StudentRow:
    signed = SignedManifest(bytes(row.manifest), bytes(row.signature))
    return StudentRow(row.id, row.device_id, row.kind, signed, row.created_s, row.heads_sha256, row.release)
