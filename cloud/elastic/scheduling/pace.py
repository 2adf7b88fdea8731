"""PURE: tracks how long batches really take on each executor, as a factor on the times of the profile.

A profile is measured once, on a quiet machine. Later the machine may be shared, hot, or busy loading a model, and plans
that ignore this make batches that end too late. The mean and the mean deviation of batch times are tracked, as TCP does
for round trips (Jacobson 1988, "Congestion avoidance and control"), and plans allow for both.

Executors differ: another machine, another graphics card, a core that other work shares. So each has a pace of its own.
"""

import math
from collections.abc import Iterable
from copy import copy
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


class Paces:
    """The pace of each executor, by its number. Plans count on the executors in ``able``.

    >>> paces = Paces(range(2))
    >>> changed = [paces.of(1).ran(64, profiled_s=0.1, took_s=0.3) for _ in range(100)]
    >>> paces.fastest(paces.able), round(paces.alike(0), 1), round(paces.alike(1))
    (0, 1.3, 4)
    """

    def __init__(self, able: Iterable[int]) -> None:
        """Raises ValueError as ``count_on``."""
        self.able: tuple[int, ...] = ()
        self._of: dict[int, Pace] = {}
        self.count_on(able)

    def count_on(self, executors: Iterable[int]) -> None:
        """Plans count on these executors from now on. Raises ValueError if there is none.

        One that is new starts at the median pace of the others. One that was there before keeps its own.
        """
        able = tuple(executors)
        if not able:
            raise ValueError("0 executors: there must be at least 1")
        known = sorted(self._of.values(), key=lambda pace: pace.factor)
        for executor in able:
            if executor not in self._of:
                self._of[executor] = copy(known[len(known) // 2]) if known else Pace()
        self.able = able

    def of(self, executor: int) -> Pace:
        """Returns the executor's pace. Raises KeyError if plans have never counted on it."""
        return self._of[executor]

    def factor(self, executor: int) -> float:
        """Returns what plans multiply the profile's times by on this executor."""
        return self.of(executor).factor

    def fastest(self, among: Iterable[int]) -> int:
        """Returns the executor whose batches take the least time; of equals, the one with the lowest number."""
        return min(among, key=lambda executor: (self.factor(executor), executor))

    def alike(self, executor: int) -> float:
        """Returns how many executors as fast as this one would be as fast as all together.

        Without differences it is exactly their number.
        """
        factor = self.factor(executor)
        return sum(factor / self.factor(other) for other in self.able)

    @property
    def mean(self) -> float:
        """The harmonic mean of the factors: as many executors of this pace are as fast as all together."""
        first = self.able[0]
        return self.factor(first) * len(self.able) / self.alike(first)
