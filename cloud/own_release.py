"""The release that a server is started with: known already, or registered and offered to everyone."""

from pathlib import Path
from typing import TYPE_CHECKING

from isthmus.cloud.offers.offer import Offer, offer_of
from isthmus.cloud.offers.rollout import EVERYONE
from isthmus.cloud.personalise import students
from isthmus.cloud.personalise.signing import Signer
from isthmus.cloud.personalise.students import Shelf
from isthmus.cloud.releases import catalogue, files
from isthmus.cloud.store import releases
from isthmus.cloud.store.database import Database
from isthmus.cloud.store.releases import ReleaseRow

if TYPE_CHECKING:
    from isthmus.distill.release import Release


def open_own(shelf: Shelf, signer: Signer, folder: Path, now_s: float, *, accept: bool) -> str:
    """Make the release in ``folder`` one of the database's, and return the id of its base student.

    The first release of a database is offered to everyone. A release that is known changes nothing of who is offered
    what. ``accept``: one that is not known is offered to everyone, too; without it, it is refused.

    Raises Unusable for files that were changed, InvalidInput for a release that the devices here cannot use, and
    ReleaseError for one that is incomplete.
    """
    from isthmus.distill.release import Release

    known = None if accept else files.check(shelf.database, folder)
    release = Release.open(folder)
    offer = offer_of(release)
    check_fits(shelf.database, offer)
    base_student_id = students.publish_base(shelf, signer, offer, release.base_dir, now_s)
    if known is None:
        releases.put(shelf.database, row_of(release, offer, stored=False, now_s=now_s))
    records = releases.records(shelf.database)
    newest = max(records, key=lambda each: each.serial, default=None)
    everyones = newest is not None and newest.release_id == offer.release_hash and newest.share >= EVERYONE
    if not records or (accept and not everyones):
        catalogue.offer_to(shelf.database, offer.release_hash, EVERYONE, (), now_s)
    return base_student_id


def check_fits(database: Database, offer: Offer) -> None:
    """Check that the devices of this database can use a release. Raises InvalidInput."""
    for row in releases.listing(database):
        offer.check_serves(row.offer)


def row_of(release: "Release", offer: Offer, *, stored: bool, now_s: float) -> ReleaseRow:
    """Return the row of an opened release. Raises ReleaseError if it is incomplete."""
    return ReleaseRow(offer, files.described(release.root, release.files()), stored, now_s)
