"""PURE: computes an upper bound on the utility of any policy for a list of queries, even one that knows them all ahead.

The bound comes from a relaxation in which queries are fractional and preemptive. Query q may get executor time x_q(t)
within [arrival, deadline], and K executors offer K seconds per second. The cost of q at gamma is its share of the
batch that is cheapest per image. For a fraction of this cost it earns the same fraction of accuracy x utility. Every
real schedule of batches is feasible here: a query that is in time ran between its arrival and its deadline, and cost at
least that share.

The Lagrangian dual has one price p(t) >= 0 for the executor's time:

    D(p) = K integral p(t) dt + sum_q max(0, max_gamma  accuracy(q, gamma) utility(q) - cost(gamma) min_{t of q} p(t))

By weak duality D(p) is an upper bound for ANY prices, so the search for good prices need not be exact. Prices are
constant within slots, and L-BFGS finds them on a smoothed D. The returned value is D itself.

The inner maximum over gamma is the upper hull of accuracy over time. Dual and hull are textbook (Lawler 1976).
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize

from isthmus.cloud.elastic.scheduling.profile import Profile
from isthmus.cloud.elastic.scheduling.query import Query

Float64s = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

SLOT_S: Final = 0.1
WIDTHS: Final = (1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5)
"""Smoothing widths of the minima, as shares of the price above which nothing would run."""


def image_costs_s(profile: Profile, epsilon: int) -> Float64s:
    """Returns the least seconds per image at each gamma, (gammas,), in batches of at most ``epsilon`` images."""
    return np.array(
        [min(profile.batch_time_s(gamma, size) / size for size in range(1, epsilon + 1)) for gamma in profile.gammas]
    )


def clairvoyant_bound(
    queries: Sequence[Query],
    profile: Profile,
    epsilon: int,
    *,
    executors: float = 1,
    slot_s: float = SLOT_S,
    iterations: int = 60,
) -> float:
    """Returns an expected utility that no policy can exceed with ``executors`` and batches of at most ``epsilon``.

    An executor on which batches take f times as long as the profile says counts as 1 / f executors. Shorter slots and
    more iterations make the bound tighter; it is valid in any case. Raises KeyError for a task without a profile.

    >>> queries = [Query(0, "CIFAR10", 0.0, 1.0, utility=0.5), Query(1, "CIFAR10", 0.1, 1.1, utility=0.5)]
    >>> 0.95 < clairvoyant_bound(queries, paper_profile(), 64) < 1.0  # at most the accuracy times the utility of both
    True
    """
    if not queries:
        return 0.0
    costs_G = image_costs_s(profile, epsilon)
    start_s = min(query.arrival_s for query in queries)
    kinds = sorted({(query.task, query.utility) for query in queries})
    place = {kind: index for index, kind in enumerate(kinds)}
    gains_KG = np.array(
        [[profile.accuracy_of(task, gamma) * utility for gamma in profile.gammas] for task, utility in kinds]
    )
    rows_N3 = np.array(
        [
            (
                place[query.task, query.utility],
                int((query.arrival_s - start_s) / slot_s),
                int((query.deadline_s - start_s) / slot_s),
            )
            for query in queries
        ]
    )
    rows_Q3, counts_Q = np.unique(rows_N3, axis=0, return_counts=True)
    dual = _Dual(
        gains_KG[rows_Q3[:, 0]], costs_G, rows_Q3[:, 1], rows_Q3[:, 2], counts_Q.astype(float), slot_s * executors
    )
    return dual.minimise(iterations)


class _Dual:
    """The dual function. Axes: Q groups of equal queries, G gammas, W slots of a group's window, T slots in all.

    ``supply_s``: seconds of executors' time in a slot.
    """

    def __init__(
        self, gains_QG: Float64s, costs_G: Float64s, first_Q: Ints, last_Q: Ints, counts_Q: Float64s, supply_s: float
    ) -> None:
        self.gains_QG, self.costs_G, self.counts_Q, self.supply_s = gains_QG, costs_G, counts_Q, supply_s
        self.slots = int(last_Q.max()) + 1
        window_W = np.arange(int((last_Q - first_Q).max()) + 1)
        self.slots_QW = np.minimum(first_Q[:, None] + window_W, last_Q[:, None])
        """After its last slot a group's window repeats that slot, which does not change the minimum."""
        self.highest = float((gains_QG / costs_G).max())

    def value(self, prices_T: Float64s) -> float:
        """Returns D(p), a valid bound for any prices that are not negative."""
        cheapest_Q = prices_T[self.slots_QW].min(axis=1)
        net_Q = (self.gains_QG - cheapest_Q[:, None] * self.costs_G).max(axis=1)
        return float(prices_T.sum() * self.supply_s + self.counts_Q @ np.maximum(net_Q, 0.0))

    def smoothed(self, prices_T: Float64s, width: float) -> tuple[float, Float64s]:
        """Returns D with soft minima and maxima, and its gradient by the prices (T,)."""
        prices_QW = prices_T[self.slots_QW]
        least_Q = prices_QW.min(axis=1, keepdims=True)
        weights_QW = np.exp((least_Q - prices_QW) / width)
        sums_Q1 = weights_QW.sum(axis=1, keepdims=True)
        soft_Q1 = least_Q - width * np.log(sums_Q1)
        gain_width = width * float(self.costs_G.mean())
        net_QG = self.gains_QG - soft_Q1 * self.costs_G
        top_Q1 = np.maximum(net_QG.max(axis=1, keepdims=True), 0.0)
        chosen_QG = np.exp((net_QG - top_Q1) / gain_width)
        total_Q1 = chosen_QG.sum(axis=1, keepdims=True) + np.exp(-top_Q1 / gain_width)
        value = float(prices_T.sum()) * self.supply_s + float(
            self.counts_Q @ (top_Q1 + gain_width * np.log(total_Q1))[:, 0]
        )
        time_Q1 = (chosen_QG / total_Q1) @ self.costs_G[:, None] * self.counts_Q[:, None]
        used_T = np.bincount(
            self.slots_QW.ravel(), weights=(time_Q1 * weights_QW / sums_Q1).ravel(), minlength=self.slots
        )
        slope_T = np.full(self.slots, self.supply_s)
        slope_T -= used_T
        return value, slope_T

    def minimise(self, iterations: int) -> float:
        """Returns the least D found. Prices and D are scaled to about 1; without this L-BFGS stops far too early."""
        most = float(self.counts_Q @ self.gains_QG.max(axis=1))
        if most == 0:
            return 0.0

        def objective(shares_T: Float64s, width: float) -> tuple[float, Float64s]:
            value, slope_T = self.smoothed(shares_T * self.highest, width * self.highest)
            return value / most, slope_T * (self.highest / most)

        shares_T = np.full(self.slots, 0.1)
        best = min(most, self.value(np.zeros(self.slots)))
        for width in WIDTHS:
            found = minimize(
                objective,
                shares_T,
                args=(width,),
                jac=True,
                method="L-BFGS-B",
                bounds=[(0.0, 1.0)] * self.slots,
                options={"maxiter": iterations, "maxcor": 20, "ftol": 1e-9, "gtol": 1e-9},
            )
            shares_T = np.clip(found.x, 0.0, 1.0)
            best = min(best, self.value(shares_T * self.highest))
        return best
