"""PURE: tracks how long batches really take on each executor, as a factor on the times of the profile.

A profile is measured once, on a quiet machine. Later the machine may be shared, hot, or busy loading a model, and plans
that ignore this make batches that end too late. The mean and the mean deviation of batch times are tracked, as TCP does
for round trips (Jacobson 1988, "Congestion avoidance and control"), and plans allow for both.

Executors differ: another machine, another graphics card, a core that other work shares. So each has a pace of its own.
"""

import math
from collections.abc import Collection, Iterable
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
"""Batches with fewer images cannot make the factor larger: their time depends more on fixed costs than on the machine's
speed. They make it smaller, down to 1, if they take less than ``CLEARLY`` of the planned time. Otherwise an executor
that was slow for a while, and so gets small batches only, would stay slow in all plans."""
CLEARLY: Final = 0.8
FORGET_S: Final = 10.0
"""An executor that runs no batch for this long, perhaps because plans take it for too slow, loses half of what its
factor exceeds 1 by. So it is tried again, and a slow spell has an end."""
UNSURE_S: Final = 0.1
"""Seconds of batches, by the profile, that count in an estimate after that: the next batches soon decide."""


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
        few = size < LEAST_SIZE
        took_s = min(max(took_s, profiled_s if few else profiled_s / MOST), profiled_s * MOST)
        if few and took_s >= CLEARLY * self.factor * profiled_s:
            return False
        keep = max(math.exp(-profiled_s / WINDOW_S), LEAST_KEPT)
        astray_s = 0.0 if few else abs(took_s - profiled_s * self._took_s / self._profiled_s)
        self._astray_s = keep * self._astray_s + astray_s
        self._took_s = keep * self._took_s + took_s
        self._profiled_s = keep * self._profiled_s + profiled_s
        found = (self._took_s + CUSHION * self._astray_s) / self._profiled_s
        if abs(found / self.factor - 1) <= STEP:
            return False
        self.factor = found
        return True

    def forget(self) -> bool:
        """Halves what ``factor`` exceeds 1 by, and lets the next batches count for more.

        Returns True if ``factor`` has changed; one of at most 1 stays.
        """
        if self.factor <= 1:
            return False
        excess = (self.factor - 1) / 2
        self.factor = 1 + excess if excess > STEP else 1.0
        self._profiled_s, self._took_s, self._astray_s = UNSURE_S, self.factor * UNSURE_S, 0.0
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
        self._heard_s: dict[int, float] = {}
        """When each executor last ran a batch."""
        self.count_on(able)

    def count_on(self, executors: Iterable[int]) -> None:
        """Plans count on these executors from now on. Raises ValueError if there is none.

        One that is new starts at the median pace of the others. One that was there before keeps its own, and may
        forget it (``forget``).
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

    def ran(self, executor: int, size: int, profiled_s: float, took_s: float, now_s: float) -> bool:
        """Notes a batch of this executor that has ended now. Returns True if its factor has changed (``Pace.ran``)."""
        self._heard_s[executor] = now_s
        return self.of(executor).ran(size, profiled_s, took_s)

    def forget(self, now_s: float, busy: Collection[int]) -> bool:
        """Lets each executor forget that has run no batch for ``FORGET_S``, also repeatedly. ``busy`` ones run one now.

        Returns True if a factor has changed.
        """
        changed = False
        for executor in self.able:
            pace = self.of(executor)
            heard_s = now_s if executor in busy else self._heard_s.get(executor, now_s)
            while now_s - heard_s >= FORGET_S and pace.forget():
                heard_s += FORGET_S
                changed = True
            self._heard_s[executor] = heard_s
        return changed

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
