"""PURE: tracks how long batches really take, as a factor on the times of the profile.

A profile is measured once, on a quiet machine. Later the machine may be shared, hot, or busy loading a model, and plans
that ignore this make batches that end too late. The mean and the mean deviation of batch times are tracked, as TCP does
for round trips (Jacobson 1988, "Congestion avoidance and control"), and plans allow for both.
"""

import math
from typing import Final

WINDOW_S: Final = 1.0
"""Seconds of batches, by the profile, after which the weight of an earlier batch has fallen to 1/e."""
LEAST_KEPT: Final = 0.75
"""Least share of the earlier estimate that is kept after one batch, however long that batch is."""
CUSHION: Final = 2.0
"""Plans allow for the mean plus this many mean deviations."""
STEP: Final = 0.03
"""Plans change only if the factor changes by more than this share."""
MOST: Final = 4.0
"""One batch counts at most as this factor, and at least as its inverse. A clock that jumped or a machine that slept
says little about the next batch."""
LEAST_SIZE: Final = 8
"""Batches with fewer images are ignored: their time depends more on fixed costs than on the machine's speed."""


class Pace:
    """``factor`` is what plans multiply the profile's times by. It is 1 while the profile is right."""

    def __init__(self) -> None:
        self.factor = 1.0
        self._profiled_s = self._took_s = WINDOW_S  # as if the profile had been right so far
        self._astray_s = 0.0

    def ran(self, size: int, profiled_s: float, took_s: float) -> bool:
        """Notes a batch of ``size`` images that took ``took_s`` seconds; the profile says ``profiled_s``.

        Returns True if ``factor`` has changed.
        """
        if size < LEAST_SIZE:
            return False
        took_s = min(max(took_s, profiled_s / MOST), profiled_s * MOST)
        keep = max(math.exp(-profiled_s / WINDOW_S), LEAST_KEPT)
        self._astray_s = keep * self._astray_s + abs(took_s - profiled_s * self._took_s / self._profiled_s)
        self._took_s = keep * self._took_s + took_s
        self._profiled_s = keep * self._profiled_s + profiled_s
        found = (self._took_s + CUSHION * self._astray_s) / self._profiled_s
        if abs(found / self.factor - 1) <= STEP:
            return False
        self.factor = found
        return True
