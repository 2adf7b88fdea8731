"""PURE: what a second of the executor is worth just now.

The fluid relaxation of the paper's problem 3.2: queries can be run in parts, and deadlines are only a horizon. Then the
best use of time is to buy, dearest first, segments of each query's upper hull of accuracy x utility against time; the
price is what the last second bought was worth. At a price every query knows its own gamma: the last segment of its
hull that is worth more than its time.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def hull(costs_s: Sequence[float], gains: Sequence[float]) -> list[tuple[float, float, int]]:
    """Upper concave hull from "not run" (no cost, no gain) on: (gain per second, added seconds, level) by segment.

    Slopes fall. A level that is slower than another and no better is on no hull.
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
    """The hulls of K kinds of query, ready to be priced for any number of each."""

    def __init__(self, costs_s: Sequence[float], gains_KG: Sequence[Sequence[float]]) -> None:
        self._hulls = [hull(costs_s, gains) for gains in gains_KG]
        segments = sorted((-slope, added_s, kind) for kind, of in enumerate(self._hulls) for slope, added_s, _ in of)
        self._slopes_S = np.array([-slope for slope, _, _ in segments])
        self._added_S = np.array([added_s for _, added_s, _ in segments])
        self._kinds_S = np.array([kind for _, _, kind in segments], dtype=np.int64)

    def price(self, counts_K: Floats, seconds: float) -> float:
        """Utility per second of the last of ``seconds`` sold to ``counts_K`` queries; 0 where all get their best."""
        if not len(self._kinds_S):
            return 0.0
        sold_S = np.cumsum(self._added_S * counts_K[self._kinds_S])
        last = int(np.searchsorted(sold_S, seconds))
        return float(self._slopes_S[last]) if last < len(sold_S) else 0.0

    def level(self, kind: int, price: float) -> int | None:
        """The gamma that a query of ``kind`` buys at ``price``; None: its time is worth more to others."""
        bought = None
        for slope, _, level in self._hulls[kind]:
            if slope < price:
                break
            bought = level
        return bought
