"""PURE: is the camera still there, and does it still show something new; the same for the microphone.

An unplugged camera may keep "succeeding" with its last picture. Real pictures are never equal to the last bit, because
the sensor has noise, so equal ones mean that the camera is frozen.
"""

from dataclasses import dataclass, replace
from enum import Enum
from typing import Final

OPENING_S: Final = 10.0
"""A camera or microphone may take this long to give its first picture or sound."""
FROZEN_S: Final = 1.5
GONE_S: Final = 3.0
MUTED_S: Final = 10.0
"""A microphone whose samples are all zero for so long is muted."""


class Health(Enum):
    OPENING = "opening"
    WELL = "well"
    FROZEN = "frozen"
    GONE = "gone"
    MUTED = "muted"


@dataclass(frozen=True)
class Seen:
    """What came of one source. Times on one clock; ``changed_s``: when something new came."""

    since_s: float
    last_s: float | None = None
    changed_s: float | None = None
    digest: int = 0


def came(seen: Seen, at_s: float, digest: int) -> Seen:
    """Return what is known after a picture or a block of sound. ``digest``: of its content; 0 for pure silence."""
    changed = seen.last_s is None or digest != seen.digest
    return replace(seen, last_s=at_s, changed_s=at_s if changed else seen.changed_s, digest=digest)


def camera_health(seen: Seen, now_s: float) -> Health:
    """Return how the camera is: pictures that stay equal for FROZEN_S are frozen, none for GONE_S means gone."""
    if seen.last_s is None or seen.changed_s is None:
        return Health.OPENING if now_s - seen.since_s < OPENING_S else Health.GONE
    if now_s - seen.last_s > GONE_S:
        return Health.GONE
    return Health.FROZEN if seen.last_s - seen.changed_s >= FROZEN_S else Health.WELL


def microphone_health(seen: Seen, now_s: float) -> Health:
    """Return how the microphone is: only zeros for MUTED_S means muted, nothing for GONE_S means gone."""
    if seen.last_s is None or seen.changed_s is None:
        return Health.OPENING if now_s - seen.since_s < OPENING_S else Health.GONE
    if now_s - seen.last_s > GONE_S:
        return Health.GONE
    return Health.MUTED if seen.digest == 0 and seen.last_s - seen.changed_s >= MUTED_S else Health.WELL
