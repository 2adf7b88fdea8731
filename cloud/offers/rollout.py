"""PURE. Which release a device is offered: a function of its id and of the rollout's records, and of nothing else.

Each release has at most one record: a share of the devices, named devices besides, or that it was withdrawn. A record
of a higher serial number goes before the others. A device gets the release of the first record that includes it, so a
release that a few devices try lies above the one that everyone has.

The share includes a device by a hash of its id and of the release (``position``). So a larger share includes every
device of a smaller one, and it is not always the same devices that go first.
"""

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from isthmus.proto.errors import InvalidInput

EVERYONE: Final = 1.0
MOST_NAMED: Final = 1_000
"""Devices that one record may name."""


@dataclass(frozen=True)
class Record:
    """To which devices a release is offered.

    ``share``: of all devices, from 0 to 1 (everyone). ``devices``: ids of devices that get it besides. ``serial``: the
    order of the records, and the least version that the release's base student must have, see ``changed``.
    ``withdrawn_s``: Unix time at which it was withdrawn; None if it was not.
    """

    release_id: str
    share: float
    devices: tuple[str, ...]
    serial: int
    withdrawn_s: float | None = None

    def includes(self, device_id: str) -> bool:
        """Return whether the release is offered to the device, if no record goes before this one."""
        if self.withdrawn_s is not None:
            return False
        return device_id in self.devices or position(device_id, self.release_id) < self.share

    @property
    def shown(self) -> str:
        """To whom it is offered, in words."""
        if self.withdrawn_s is not None:
            return "withdrawn"
        if self.share >= EVERYONE:
            return "everyone"
        named = f"{len(self.devices)} named" if self.devices else ""
        share = f"{self.share:.3%}".rstrip("%").rstrip("0").rstrip(".") + " %" if self.share else ""
        return " and ".join(filter(None, (share, named))) or "nobody"


def position(device_id: str, release_id: str) -> float:
    """Return the device's place in the order in which devices get the release: from 0 (first) to below 1, evenly."""
    digest = hashlib.sha256(f"{release_id}/{device_id}".encode()).digest()
    return int.from_bytes(digest[:6]) / 2**48


def offered(device_id: str, records: Iterable[Record]) -> Record | None:
    """Return the record by which the device gets its release; None if no release is offered to it."""
    including = (each for each in records if each.includes(device_id))
    return max(including, key=lambda each: each.serial, default=None)


def changed(
    records: Sequence[Record], release_id: str, share: float, devices: Iterable[str], *, above: int
) -> tuple[Record, ...]:
    """Return the records after a release was offered to these devices alone. It then goes before all others.

    ``above``: no base student has a higher version. All serial numbers become higher than that, because a device
    refuses versions that are lower than those it knows: whichever release it gets after this change, the base student
    must be signed again with a higher version first. Raises InvalidInput for a share outside 0 to 1, for too many
    devices, and for an offer to nobody.
    """
    named = tuple(sorted(set(devices)))
    if not (math.isfinite(share) and 0 <= share <= EVERYONE):
        raise InvalidInput("the share of devices is a number from 0 to 1")
    if len(named) > MOST_NAMED:
        raise InvalidInput(f"{len(named)} devices are named; at most {MOST_NAMED} are: give a share")
    if not share and not named:
        raise InvalidInput("name devices, give a share above 0, or offer the release to everyone")
    others = [each for each in records if each.release_id != release_id]
    return _checked(_numbered([*others, Record(release_id, share, named, max_serial(records) + 1)], above))


def withdrawn(records: Sequence[Record], release_id: str, now_s: float, *, above: int) -> tuple[Record, ...]:
    """Return the records after a release was withdrawn: no device is offered it any more. ``above``: see ``changed``.

    Raises InvalidInput if it was not offered, or if nothing would be offered to everyone then.
    """
    known = next((each for each in records if each.release_id == release_id), None)
    if known is None:
        raise InvalidInput(f"release {release_id} is offered to nobody")
    if known.withdrawn_s is not None:
        return tuple(records)
    gone = replace(known, share=0.0, devices=(), withdrawn_s=now_s)
    return _checked(_numbered([gone if each == known else each for each in records], above))


def max_serial(records: Iterable[Record]) -> int:
    """Return the highest serial number; 0 if there is none."""
    return max((each.serial for each in records), default=0)


def _numbered(records: Sequence[Record], above: int) -> tuple[Record, ...]:
    ordered = sorted(records, key=lambda each: each.serial)
    first = max(above, max_serial(records)) + 1
    return tuple(replace(each, serial=first + place) for place, each in enumerate(ordered))


def _checked(records: tuple[Record, ...]) -> tuple[Record, ...]:
    if not any(each.share >= EVERYONE for each in records):
        raise InvalidInput(
            "then nothing would be offered to the other devices: first offer another release to everyone "
            "('isthmus cloud release offer RELEASE --everyone')"
        )
    return records
