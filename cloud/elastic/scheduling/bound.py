"""PURE: the most that any policy could have earned from a list of queries, had it known them all beforehand.

The relaxation: queries are fractional and preemptive. Query q may be given time x_q(t) within [arrival, deadline], the
executor has one second in a second, and for a share of the time that q costs at gamma (its share of the batch that is
cheapest per image) it earns the same share of accuracy x utility. Every schedule of batches is a point of it: a query
that is in time ran between its arrival and its deadline, and cost at least that share.

Its Lagrangian dual has one price p(t) >= 0 for the executor's time:

    D(p) = integral p(t) dt + sum_q max(0, max_gamma  accuracy(q, gamma) utility(q) - cost(gamma) min_{t of q} p(t))

By weak duality D(p) is an upper bound for ANY prices, so the search for good ones need not be exact, and is not: prices
are constant within slots, and found by L-BFGS on a smoothed D. What is returned is D itself.

The inner maximum over gamma is the upper hull of accuracy against time; dual and hull are textbook (Lawler 1976).
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize

from isthmus.cloud.elastic.scheduling.profile import Profile
from isthmus.cloud.elastic.scheduling.query import Query

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

SLOT_S: Final = 0.1
WIDTHS: Final = (1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5)
"""Smoothing of the minima, as shares of the price above which nothing would be run."""


def image_costs_s(profile: Profile, epsilon: int) -> Floats:
    """Least seconds an image can take at each gamma, in batches of at most ``epsilon``: (gammas,)."""
    return np.array(
        [min(profile.batch_time_s(gamma, size) / size for size in range(1, epsilon + 1)) for gamma in profile.gammas]
    )


def clairvoyant_bound(
    queries: Sequence[Query], profile: Profile, epsilon: int, *, slot_s: float = SLOT_S, iterations: int = 60
) -> float:
    """Expected utility that no policy passes whose batches hold at most ``epsilon`` queries on one executor.

    More slots and iterations make it tighter, never wrong. Raises KeyError for a task without a profile.
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
    dual = _Dual(gains_KG[rows_Q3[:, 0]], costs_G, rows_Q3[:, 1], rows_Q3[:, 2], counts_Q.astype(float), slot_s)
    return dual.minimise(iterations)


class _Dual:
    """Axes: Q groups of queries alike, G gammas, W slots of a group's window, T slots of the whole time."""

    def __init__(
        self, gains_QG: Floats, costs_G: Floats, first_Q: Ints, last_Q: Ints, counts_Q: Floats, slot_s: float
    ) -> None:
        self.gains_QG, self.costs_G, self.counts_Q, self.slot_s = gains_QG, costs_G, counts_Q, slot_s
        self.slots = int(last_Q.max()) + 1
        window_W = np.arange(int((last_Q - first_Q).max()) + 1)
        self.slots_QW = np.minimum(first_Q[:, None] + window_W, last_Q[:, None])
        """Past its last slot a group's window repeats that one, which changes no minimum."""
        self.highest = float((gains_QG / costs_G).max())

    def value(self, prices_T: Floats) -> float:
        """D itself: valid for any prices that are not negative."""
        cheapest_Q = prices_T[self.slots_QW].min(axis=1)
        net_Q = (self.gains_QG - cheapest_Q[:, None] * self.costs_G).max(axis=1)
        return float(prices_T.sum() * self.slot_s + self.counts_Q @ np.maximum(net_Q, 0.0))

    def smoothed(self, prices_T: Floats, width: float) -> tuple[float, Floats]:
        """D with soft minima and maxima, and its gradient."""
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
        value = float(prices_T.sum()) * self.slot_s + float(
            self.counts_Q @ (top_Q1 + gain_width * np.log(total_Q1))[:, 0]
        )
        time_Q1 = (chosen_QG / total_Q1) @ self.costs_G[:, None] * self.counts_Q[:, None]
        used_T = np.bincount(
            self.slots_QW.ravel(), weights=(time_Q1 * weights_QW / sums_Q1).ravel(), minlength=self.slots
        )
        slope_T = np.full(self.slots, self.slot_s)
        slope_T -= used_T
        return value, slope_T

    def minimise(self, iterations: int) -> float:
        """The least D found. Prices and D are scaled to about 1, without which L-BFGS stops far too early."""
        most = float(self.counts_Q @ self.gains_QG.max(axis=1))
        if most == 0:
            return 0.0

        def objective(shares_T: Floats, width: float) -> tuple[float, Floats]:
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
