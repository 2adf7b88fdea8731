"""Histograms of times and sizes, counted where things happen and read by the metrics."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Final

BOUNDS_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""Upper ends of buckets of seconds. What is longer is in one more bucket."""


@dataclass
class Histogram:
    """How many values were at most each of ``bounds`` but above the one before it, and the values' sum.

    >>> seen = Histogram((1.0, 2.0))
    >>> for value in (0.5, 1.0, 7.0):
    ...     seen.note(value)
    >>> seen.counts, seen.sum
    ([2, 0, 1], 8.5)
    """

    bounds: Sequence[float] = BOUNDS_S
    counts: list[int] = field(default_factory=list)
    sum: float = 0.0

    def __post_init__(self) -> None:
        self.counts = self.counts or [0] * (len(self.bounds) + 1)

    def note(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def copy(self) -> "Histogram":
        """Return a copy that later values do not change."""
        return replace(self, counts=list(self.counts))

    def cumulative(self) -> list[tuple[str, float]]:
        """Return each bucket's upper end as text and how many values were at most that, as Prometheus wants them."""
        total, buckets = 0.0, []
        for bound, count in zip((*map(str, self.bounds), "+Inf"), self.counts, strict=True):
            total += count
            buckets.append((bound, total))
        return buckets
