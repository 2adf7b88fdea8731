"""PURE: paired comparisons: the same client and seed under two methods, and what the differences show."""

import math
import statistics
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

Unit = TypeVar("Unit", bound=Hashable)

_Z_95 = 1.959964
_Z_POWER_80 = 0.841621


@dataclass(frozen=True)
class Difference:
    """Difference of n paired values. ``needed``: the number of pairs that would detect a difference of this size at the
    5 % level with 80 % power (normal approximation); None if the difference or its spread is zero."""

    pairs: int
    mean: float
    standard_error: float
    better: int
    worse: int
    needed: int | None

    @property
    def beyond_noise(self) -> bool:
        """Whether the mean is more than two standard errors from zero. False for a single pair."""
        return self.pairs > 1 and abs(self.mean) > 2 * self.standard_error


def difference(ours: Mapping[Unit, float], theirs: Mapping[Unit, float]) -> Difference:
    """Return ``ours - theirs`` over the units that both have. Raises ValueError if there is none."""
    deltas = [ours[unit] - theirs[unit] for unit in ours if unit in theirs]
    if not deltas:
        raise ValueError("nothing to compare: no unit was measured under both")
    mean = statistics.fmean(deltas)
    spread = statistics.stdev(deltas) if len(deltas) > 1 else 0.0
    distinguishable = spread > 0 and abs(mean) > 1e-9 * max(map(abs, deltas))  # equal sums can differ by rounding
    needed = math.ceil(((_Z_95 + _Z_POWER_80) * spread / mean) ** 2) if distinguishable else None
    return Difference(
        pairs=len(deltas),
        mean=mean,
        standard_error=spread / math.sqrt(len(deltas)),
        better=sum(delta > 0 for delta in deltas),
        worse=sum(delta < 0 for delta in deltas),
        needed=max(2, needed) if needed is not None else None,
    )


def by_group(values: Mapping[tuple[str, int], float]) -> dict[str, float]:
    """Average (client, seed) -> value over seeds: seeds of one client are not independent people."""
    of_group: dict[str, list[float]] = {}
    for (group, _), value in values.items():
        of_group.setdefault(group, []).append(value)
    return {group: statistics.fmean(each) for group, each in of_group.items()}


@dataclass(frozen=True)
class Spread:
    mean: float
    deviation: float
    count: int


def spread(values: Sequence[float]) -> Spread:
    """Return mean and standard deviation (0 for a single value). Raises ValueError for no value."""
    if not values:
        raise ValueError("no values")
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0, len(values))
