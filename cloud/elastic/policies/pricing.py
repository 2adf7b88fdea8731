"""PURE: computes what a second of the executor is worth, and which gamma each kind of query buys at that price.

This is the fluid relaxation of OTAS problem 3.2: queries can be run in parts, and deadlines only give a horizon. Each
kind of query has an upper hull of accuracy x utility over time. The best use of the time is to buy segments of these
hulls, highest gain per second first. The price is the gain per second of the last segment bought. At a given price, the
gamma of a query is the last segment of its hull that gains more per second than the price.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

Float64s = npt.NDArray[np.float64]


def hull(costs_s: Sequence[float], gains: Sequence[float]) -> list[tuple[float, float, int]]:
    """Returns the upper concave hull that starts at "not run" (no cost, no gain).

    Each segment is (gain per second, added seconds, level). Slopes descend. A level that is slower than another level
    and gains no more is not on the hull.
    """
    points = [(0.0, 0.0, -1)]
    for cost, gain, level in sorted(zip(costs_s, gains, range(len(gains)), strict=True)):
        while points[-1][0] == cost and points[-1][1] < gain:
            points.pop()
        if gain <= points[-1][1]:
            continue
        while len(points) > 1 and _slope(points[-2], points[-1]) <= _slope(points[-1], (cost, gain, level)):
            points.pop()
        points.append((cost, gain, level))
    return [(_slope(left, right), right[0] - left[0], right[2]) for left, right in pairwise(points)]


def _slope(left: tuple[float, float, int], right: tuple[float, float, int]) -> float:
    return (right[1] - left[1]) / (right[0] - left[0])


class Market:
    """The hulls of K kinds of query. It computes the price for any number of queries of each kind."""

    def __init__(self, costs_s: Sequence[float], gains_KG: Sequence[Sequence[float]]) -> None:
        self._hulls = [hull(costs_s, gains) for gains in gains_KG]
        segments = sorted((-slope, added_s, kind) for kind, of in enumerate(self._hulls) for slope, added_s, _ in of)
        self._slopes_S = np.array([-slope for slope, _, _ in segments])
        self._added_S = np.array([added_s for _, added_s, _ in segments])
        self._kinds_S = np.array([kind for _, _, kind in segments], dtype=np.int64)

    def price(self, counts_K: Float64s, seconds: float) -> float:
        """Returns the gain per second of the last segment that ``counts_K`` queries buy within ``seconds``.

        It is 0 if there is enough time for every query's best gamma.
        """
        if not len(self._kinds_S):
            return 0.0
        sold_S = np.cumsum(self._added_S * counts_K[self._kinds_S])
        last = int(np.searchsorted(sold_S, seconds))
        return float(self._slopes_S[last]) if last < len(sold_S) else 0.0

    def level(self, kind: int, price: float) -> int | None:
        """Returns the index of the gamma that a query of ``kind`` buys at ``price``; None if it buys no time at all."""
        bought = None
        for slope, _, level in self._hulls[kind]:
            if slope < price:
                break
            bought = level
        return bought
