"""The work of ``isthmus cloud release``."""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import typer

from isthmus.cloud import continuity, own_release
from isthmus.cloud.offers.offer import offer_of
from isthmus.cloud.offers.rollout import EVERYONE, Record
from isthmus.cloud.personalise import signing, students
from isthmus.cloud.personalise.students import Shelf
from isthmus.cloud.releases import catalogue, files
from isthmus.cloud.store import devices as device_rows
from isthmus.cloud.store import releases
from isthmus.cloud.store.artefacts import Artefacts
from isthmus.cloud.store.database import Database
from isthmus.command_line import print_table
from isthmus.proto.errors import InvalidInput


def publish(database: Database, artefacts: Artefacts, signing_key: Path, folder: Path) -> None:
    """Publish the release in ``folder``: its files first, then its base student, and last the row that shows it.

    Raises InvalidInput for a release or a signing key that does not fit this cloud, ReleaseError for one that is
    incomplete, StorageFull and Unavailable. It is then published again from where it stopped.
    """
    from isthmus.distill.release import Release

    artefacts.check()
    if database.shared:
        continuity.check_joining(database, signing_key, artefacts)
    signer = signing.load(signing_key)
    continuity.check_key(database, signer, signing_key)
    shelf = Shelf(database, artefacts)
    release = Release.open(folder)
    offer = offer_of(release)
    own_release.check_fits(database, offer)
    row = own_release.row_of(release, offer, stored=True, now_s=now_of(database))
    before = releases.get(database, row.release_id)
    if before is not None and before.files != row.files:
        differing = sorted(
            path for path in before.files.keys() | row.files.keys() if before.files.get(path) != row.files.get(path)
        )
        raise InvalidInput(
            f"release {row.release_id} is published already, with another {differing[0]}: restore that file, or train "
            "a release of its own"
        )
    typer.echo(f"publishing {len(row.files)} files, {row.size_bytes / 1e6:.1f} MB", err=True)
    files.store(artefacts, row.release_id, folder, row.files)
    students.publish_base(shelf, signer, offer, release.base_dir, now_of(database))
    releases.put(database, row)
    typer.echo(f"release {row.release_id} is published; it is offered to: {_whom(database, row.release_id)}")


def offer(
    database: Database, release_id: str, *, percent: float | None, devices: Sequence[str], everyone: bool
) -> None:
    """Offer a release to some devices or to everyone. Raises InvalidInput."""
    if everyone == (percent is not None or bool(devices)):
        raise InvalidInput("give --everyone, or --percent or --device or both")
    for device_id in devices:
        found = device_rows.get(database, device_id)
        if found is None or found.revoked_s is not None:
            raise InvalidInput(f"no enrolled device {device_id}; 'isthmus cloud devices' lists them")
    share = EVERYONE if everyone else (percent or 0.0) / 100
    catalogue.offer_to(database, release_id, share, tuple(devices), now_of(database))
    typer.echo(f"release {release_id} is offered to: {_whom(database, release_id)}")


def withdraw(database: Database, release_id: str) -> None:
    """Withdraw a release. Raises InvalidInput."""
    catalogue.withdraw(database, release_id, now_of(database))
    users = releases.users(database).get(release_id, 0)
    typer.echo(
        f"release {release_id} is withdrawn. {users} devices use a student of it: they go back by themselves when they "
        "next look, and are answered until then"
    )


def remove(database: Database, artefacts: Artefacts, release_id: str) -> None:
    """Remove a release that nobody uses, with its files. Raises InvalidInput."""
    row = releases.get(database, release_id)
    releases.remove(database, release_id, now_of(database))
    artefacts.remove(files.owner_of(release_id))
    if row is not None:
        artefacts.remove(students.base_student_id(row.offer))
    typer.echo(f"release {release_id} is removed")


def show(database: Database) -> None:
    """Print the releases."""
    by_id = {record.release_id: record for record in releases.records(database)}
    users = releases.users(database)
    rows = [
        (
            row.release_id,
            _shown(by_id.get(row.release_id)),
            str(users.get(row.release_id, 0)),
            "artefacts" if row.stored else "--release of a server",
            f"{row.size_bytes / 1e6:.1f} MB",
            datetime.fromtimestamp(row.created_s, UTC).strftime("%Y-%m-%d %H:%M:%SZ"),
        )
        for row in sorted(releases.listing(database), key=lambda row: -_serial(by_id.get(row.release_id)))
    ]
    print_table(("release", "offered to", "devices", "files in", "size", "published"), rows, tabs_in_pipes=True)


def now_of(database: Database) -> float:
    """Return the database's clock in Unix seconds."""
    with database.reading() as connection:
        return database.clock_s(connection)


def _whom(database: Database, release_id: str) -> str:
    return _shown(next((each for each in releases.records(database) if each.release_id == release_id), None))


def _shown(record: Record | None) -> str:
    return "nobody" if record is None else record.shown


def _serial(record: Record | None) -> int:
    return -1 if record is None else record.serial
