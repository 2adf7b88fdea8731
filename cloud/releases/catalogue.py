"""Which release a device is offered, and what the release of a job offers: asked of the database at each call.

So several servers agree at once, and a change needs no signal. What a release offers never changes, so that is kept.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from isthmus.cloud.offers import rollout
from isthmus.cloud.offers.offer import Offer
from isthmus.cloud.offers.rollout import Record
from isthmus.cloud.store import releases
from isthmus.cloud.store.database import Database
from isthmus.cloud.store.students import StudentRow
from isthmus.proto.convert_student import manifest_from_bytes
from isthmus.proto.errors import Unavailable, WrongState


@dataclass(frozen=True)
class Offered:
    """What a device is offered. ``least_version``: the version that the release's base student must have by now."""

    offer: Offer
    least_version: int


@dataclass(frozen=True)
class Catalogue:
    """The releases of a database. Safe to use from several threads."""

    database: Database
    _offers: dict[str, Offer] = field(default_factory=dict, repr=False, compare=False)

    def offered(self, device_id: str) -> Offered:
        """Return what the device is offered. Raises Unavailable if nothing is, which a sound database never has."""
        record = rollout.offered(device_id, releases.records(self.database))
        offer = None if record is None else self._of(record.release_id)
        if record is None or offer is None:
            raise Unavailable("this cloud offers no release at the moment; try again later")
        return Offered(offer, record.serial)

    def of(self, release_id: str) -> Offer:
        """Return what the release of a job offers. Raises WrongState if it is gone."""
        offer = self._of(release_id)
        if offer is None:
            raise WrongState("the cloud no longer has the release of this job; start again")
        return offer

    def _of(self, release_id: str) -> Offer | None:
        known = self._offers.get(release_id)
        if known is None:
            row = releases.get(self.database, release_id)
            if row is None:
                return None
            known = self._offers[release_id] = row.offer
        return known


def offer_to(database: Database, release_id: str, share: float, devices: tuple[str, ...], now_s: float) -> list[Record]:
    """Offer a release to a share of the devices and to named ones.

    Raises InvalidInput if there is no such release, and as ``rollout.changed``.
    """

    def decide(known: Sequence[Record], bases: Sequence[StudentRow]) -> Sequence[Record]:
        return rollout.changed(known, release_id, share, devices, above=newest_version(bases))

    return releases.change(database, release_id, now_s, decide)


def withdraw(database: Database, release_id: str, now_s: float) -> list[Record]:
    """Withdraw a release. Raises InvalidInput as ``rollout.withdrawn``, and if there is no such release."""

    def decide(known: Sequence[Record], bases: Sequence[StudentRow]) -> Sequence[Record]:
        return rollout.withdrawn(known, release_id, now_s, above=newest_version(bases))

    return releases.change(database, release_id, now_s, decide)


def newest_version(rows: Iterable[StudentRow]) -> int:
    """Return the highest version among students; 0 if there are none."""
    # Version 0.1 signed no version: then it is the time of signing.
    return max(
        (manifest_from_bytes(row.signed.manifest_bytes).version or int(row.created_s) for row in rows), default=0
    )
