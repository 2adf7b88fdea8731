"""PURE: how long batches really take, as a factor on what the profile says.

A profile is measured once, on a quiet machine. Later the machine is shared, hot, or busy loading a model, and a plan
that knows nothing of it fills batches that end too late. As TCP does with round trips (Jacobson 1988, "Congestion
avoidance and control"), the mean and the mean deviation are followed, and plans allow for both.
"""

import math
from typing import Final

WINDOW_S: Final = 1.0
"""Seconds of batches, as the profile has them, after which a batch counts 1/e."""
LEAST_KEPT: Final = 0.75
"""Of what was known before, however long the batch."""
CUSHION: Final = 2.0
"""Mean deviations that plans allow for beyond the mean."""
STEP: Final = 0.03
"""Plans are made anew only for a change by more than this share."""
MOST: Final = 4.0
"""A batch that took longer than this factor, or shorter than its inverse, counts as that: a clock that jumped, or a
machine that slept, says little of the next batch."""
LEAST_SIZE: Final = 8
"""Batches of fewer images say more of what a batch costs beside the model than of the machine."""


class Pace:
    """``factor`` is what a plan should take: 1 as long as batches take what the profile says."""

    def __init__(self) -> None:
        self.factor = 1.0
        self._profiled_s = self._took_s = WINDOW_S  # as if the profile had been right so far
        self._astray_s = 0.0

    def ran(self, size: int, profiled_s: float, took_s: float) -> bool:
        """Notes a batch of ``size`` images, which took ``took_s`` where the profile says ``profiled_s``. Returns
        whether ``factor`` is another one now."""
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
