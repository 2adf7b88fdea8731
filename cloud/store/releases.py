"""Rows of the tables ``releases`` and ``rollouts``.

A release's row is written when everything else of it is in its place, so a release that was half published is nowhere
to be seen. Its records say to which devices it is offered; they change all at once, in one transaction. Base students
are signed again under the same lock, because the records' numbers and the students' versions form one order.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import sqlalchemy as sa

from isthmus.cloud.offers.offer import Offer
from isthmus.cloud.offers.rollout import Record
from isthmus.cloud.store import audit
from isthmus.cloud.store.audit import Entry
from isthmus.cloud.store.database import OURS, Database, Unusable
from isthmus.cloud.store.schema import devices, jobs, releases, rollouts, students
from isthmus.cloud.store.students import StudentRow, bases_in
from isthmus.cloud.store.tenants import DEFAULT
from isthmus.proto.errors import InvalidInput
from isthmus.proto.messages import SignedManifest, Stage

_ROLLING: Final = 4
"""Second half of the key of the lock of those who change the rollout, on PostgreSQL."""
_DIGEST_BYTES: Final = 32
_RECORDS: Final = sa.select(rollouts)
_ENDED: Final = tuple(stage.value for stage in Stage if stage.ended)


@dataclass(frozen=True)
class ReleaseFile:
    """A file of a release: its SHA-256 in hexadecimal and its size."""

    sha256: str
    size_bytes: int


@dataclass(frozen=True)
class ReleaseRow:
    """A published release. ``files``: by path below the release's folder. ``stored``: the artefacts hold them."""

    offer: Offer
    files: Mapping[str, ReleaseFile]
    stored: bool
    created_s: float

    @property
    def release_id(self) -> str:
        """The release's hash."""
        return self.offer.release_hash

    @property
    def size_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.size_bytes for file in self.files.values())


def put(database: Database, release: ReleaseRow) -> bool:
    """Write the release's row, in place of one of the same id. Returns whether it is new.

    A release whose files the artefacts hold goes on being one.
    """
    content = json.dumps({path: [file.sha256, file.size_bytes] for path, file in release.files.items()}).encode()
    values = {
        "offer": release.offer.to_json(),
        "files": hashlib.sha256(content).digest() + content,
        "created_s": release.created_s,
    }
    with database.writing() as connection:
        _alone(connection)
        mine = releases.c.id == release.release_id
        known = connection.execute(sa.select(releases.c.stored, releases.c.files).where(mine)).first()
        if known is None:
            connection.execute(releases.insert().values(id=release.release_id, stored=release.stored, **values))
        else:
            same = bytes(known.files) == values["files"]
            connection.execute(
                releases.update().where(mine).values(stored=release.stored or (known.stored and same), **values)
            )
        detail = "" if release.stored else "from the server's --release"
        if known is None or (release.stored and not known.stored):
            _note(connection, release.created_s, "published release", release.release_id, detail)
    return known is None


def listing(database: Database) -> list[ReleaseRow]:
    """Return all releases, oldest first. Raises Unusable if a row is damaged."""
    query = sa.select(releases).order_by(releases.c.created_s, releases.c.id)
    with database.reading() as connection:
        return [_release(database, row) for row in connection.execute(query)]


def get(database: Database, release_id: str) -> ReleaseRow | None:
    """Return the release, or None if there is none of this id. Raises Unusable if its row is damaged."""
    rows = database.read(sa.select(releases).where(releases.c.id == release_id))
    return _release(database, rows[0]) if rows else None


def stored_ids(database: Database) -> set[str]:
    """Return the ids of the releases whose files the artefacts hold."""
    return {row.id for row in database.read(sa.select(releases.c.id).where(releases.c.stored))}


def records(database: Database) -> list[Record]:
    """Return the records of the rollout, in no order."""
    return _recorded(database.read(_RECORDS))


def is_withdrawn(database: Database, release_id: str) -> bool:
    """Return whether the release was withdrawn."""
    rows = database.read(sa.select(rollouts.c.withdrawn_s).where(rollouts.c.release == release_id))
    return any(row.withdrawn_s is not None for row in rows)


def change(
    database: Database,
    release_id: str,
    now_s: float,
    decide: Callable[[Sequence[Record], Sequence[StudentRow]], Sequence[Record]],
) -> list[Record]:
    """Replace the records by what ``decide`` makes of them. Two changes at once wait for each other.

    ``decide`` also gets the base students of all releases. None of them is signed again meanwhile.

    Returns the records. Raises InvalidInput if there is no such release, and what ``decide`` raises; then nothing is
    changed.
    """
    with database.writing() as connection:
        _alone(connection)
        if connection.scalar(sa.select(releases.c.id).where(releases.c.id == release_id)) is None:
            known = ", ".join(connection.scalars(sa.select(releases.c.id).order_by(releases.c.created_s))) or "none"
            raise InvalidInput(
                f"no release {release_id[:64]} is published; these are: {known}. 'isthmus cloud release publish' adds "
                "one"
            )
        before = _records(connection)
        after = decide(before, bases_in(connection))
        connection.execute(rollouts.delete())
        for each in after:
            connection.execute(
                rollouts.insert().values(
                    release=each.release_id,
                    share=each.share,
                    devices=list(each.devices),
                    serial=each.serial,
                    withdrawn_s=each.withdrawn_s,
                )
            )
        now = next(each for each in after if each.release_id == release_id)
        action = "offered release" if now.withdrawn_s is None else "withdrew release"
        _note(connection, now_s, action, release_id, "" if now.withdrawn_s is not None else f"to {now.shown}")
    return list(after)


def sign_base(
    database: Database,
    student_id: str,
    sign: Callable[[StudentRow, Sequence[StudentRow], Sequence[Record]], SignedManifest],
) -> SignedManifest | None:
    """Replace the manifest of a base student by what ``sign`` makes of its row, of all base students and the records.

    Whoever signs base students or changes the records at the same time waits. So versions never go back, although two
    servers sign the same student at once. Returns the manifest; None if there is no such student. Raises what ``sign``
    raises; then nothing is changed.
    """
    with database.writing() as connection:
        _alone(connection)
        bases = bases_in(connection)
        row = next((each for each in bases if each.student_id == student_id), None)
        if row is None:
            return None
        signed = sign(row, bases, _records(connection))
        changed = {"manifest": signed.manifest_bytes, "signature": signed.signature}
        connection.execute(students.update().where(students.c.id == student_id).values(**changed))
    return signed


def remove(database: Database, release_id: str, now_s: float) -> None:
    """Remove a release that nobody is offered and nobody uses, and its record. Raises InvalidInput otherwise."""
    with database.writing() as connection:
        _alone(connection)
        row = connection.execute(sa.select(releases.c.id).where(releases.c.id == release_id)).first()
        record = next((each for each in _records(connection) if each.release_id == release_id), None)
        if row is None:
            raise InvalidInput(f"no release {release_id[:64]} is published; 'isthmus cloud release list' lists them")
        if record is not None and record.withdrawn_s is None:
            raise InvalidInput(f"release {release_id} is offered to {record.shown}: withdraw it first")
        users = _count(connection, devices.c.release == release_id, devices.c.revoked_s.is_(None))
        if users:
            raise InvalidInput(
                f"{users} devices use a student of release {release_id}: they must move first, or be revoked; "
                "'isthmus cloud release list' counts them"
            )
        mine = (jobs.c.release_hash == release_id, jobs.c.stage.not_in(_ENDED))
        waiting = connection.scalar(sa.select(sa.func.count()).select_from(jobs).where(*mine))
        if waiting:
            raise InvalidInput(f"{waiting} personalisations on release {release_id} have not ended: wait for them")
        connection.execute(rollouts.delete().where(rollouts.c.release == release_id))
        connection.execute(releases.delete().where(releases.c.id == release_id))
        connection.execute(students.delete().where(students.c.release == release_id, students.c.device_id.is_(None)))
        _note(connection, now_s, "removed release", release_id)


def uses(database: Database, device_id: str, release_id: str) -> None:
    """Record of which release the student is that a device has fetched or asked with."""
    with database.writing() as connection:
        connection.execute(devices.update().where(devices.c.id == device_id).values(release=release_id))


def users(database: Database) -> dict[str, int]:
    """Return the number of devices that use each release. "": devices of which it is unknown."""
    query = sa.select(devices.c.release, sa.func.count()).where(devices.c.revoked_s.is_(None))
    with database.reading() as connection:
        rows = connection.execute(query.group_by(devices.c.release)).all()
    return {release: count for release, count in rows if count}


def _alone(connection: sa.Connection) -> None:
    """Wait until nobody else changes releases. A writing transaction of SQLite is alone anyway."""
    if connection.dialect.name == "postgresql":
        connection.execute(sa.text("SELECT pg_advisory_xact_lock(:ours, :key)"), {"ours": OURS, "key": _ROLLING})


def _records(connection: sa.Connection) -> list[Record]:
    return _recorded(connection.execute(sa.select(rollouts)).all())


def _recorded(rows: Sequence[Any]) -> list[Record]:
    return [Record(row.release, row.share, tuple(row.devices), row.serial, row.withdrawn_s) for row in rows]


def _release(database: Database, row: sa.Row[tuple[object, ...]]) -> ReleaseRow:
    digest, content = bytes(row.files)[:_DIGEST_BYTES], bytes(row.files)[_DIGEST_BYTES:]
    if hashlib.sha256(content).digest() != digest:
        raise Unusable(f"the database {database.shown} is damaged: restore a backup ('isthmus cloud restore')")
    files = {path: ReleaseFile(sha256, size) for path, (sha256, size) in json.loads(content).items()}
    return ReleaseRow(Offer.from_json(row.offer), files, row.stored, row.created_s)


def _note(connection: sa.Connection, now_s: float, action: str, release_id: str, detail: str = "") -> None:
    audit.write(connection, Entry(now_s, DEFAULT, "operator", action, release_id, detail))


def _count(connection: sa.Connection, *conditions: sa.ColumnElement[bool]) -> int:
    return connection.scalar(sa.select(sa.func.count()).select_from(devices).where(*conditions)) or 0
