"""Check a data set: which clips decode, and why the others do not."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from isthmus.data.clip import ClipError, ClipRef, Damage, Listing
from isthmus.data.media.decode import check_decodes
from isthmus.data.transforms import InputSpec

_SHORT_SPEC: Final = InputSpec(stored_px=32, frame_px=32)
"""Enough to see that a clip decodes."""


@dataclass(frozen=True)
class CheckReport:
    """What a check found. ``usable`` holds the clips that passed; without decoding, those whose files exist."""

    listing: Listing
    usable: tuple[ClipRef, ...]
    damaged: tuple[Damage, ...]


def check_clips(listing: Listing, *, decoding: bool, on_clip: Callable[[], None]) -> CheckReport:
    """Try every clip, and call ``on_clip`` after each. Damaged clips are collected, never raised."""
    usable: list[ClipRef] = []
    damaged = list(listing.damaged)
    for ref in listing.refs:
        try:
            if decoding:
                check_decodes(ref, _SHORT_SPEC)
            usable.append(ref)
        except ClipError as error:
            damaged.append(Damage(error.name, error.reason))
        on_clip()
    return CheckReport(listing, tuple(usable), tuple(damaged))
