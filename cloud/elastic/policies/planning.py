"""PURE: decides which of the queued batches run, and at which gamma each of them runs (OTAS, problem 3.2).

The three planners take the same input: batches in a given order. ``alg2`` and ``alg3`` are the paper's. ``exact``
keeps, after each batch, every pair (clock, utility) that no other pair beats in both, so it is exact for the given
order. Alg. 2 keeps one clock per cell and can discard a path that has slightly less utility but ends much earlier.

Where we differ: the paper has one executor. With ``executors`` K, all of them are one queue on one clock: a batch ends
after its whole time, and the next one starts after 1/K of it. For K = 1 that is the paper's clock.

Axes: N queries of a batch by deadline, G gammas.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

Float64s = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

BETA: Final = 5
KAPPA: Final = 0.8
WARM_UP_S: Final = 2.0
MOST_LABELS: Final = 64
SLACK: Final = 1e-9
"""Tolerance for rounding when labels are discarded by their bound, in units of utility."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One batch as a planner sees it. ``deadlines_N`` ascend. ``times_G`` are the seconds at each gamma.

    ``worth_GM``, M = N + 1, is the utility at each gamma if the batch ends after the first 0, 1, ... N of its
    deadlines. It falls along M to 0. A query that ends exactly at its deadline is in time.
    """

    deadlines_N: Float64s
    times_G: Float64s
    worth_GM: Float64s
    mean_utility: float = 0.0

    @staticmethod
    def of(deadlines_N: Float64s, gains_NG: Float64s, times_G: Float64s, mean_utility: float = 0.0) -> "Candidate":
        """Makes a candidate in which each query counts by its own deadline.

        ``gains_NG`` is the expected utility of each query at each gamma, with rows sorted by deadline.
        """
        worth_MG = np.zeros((len(gains_NG) + 1, gains_NG.shape[1]))
        worth_MG[:-1] = np.cumsum(gains_NG[::-1], axis=0)[::-1]
        return Candidate(deadlines_N, times_G, np.ascontiguousarray(worth_MG.T), mean_utility)

    def whole(self) -> "Candidate":
        """Returns the candidate as in the paper: a batch that ends after its earliest deadline earns nothing."""
        worth_GM = np.zeros((len(self.times_G), 2))
        worth_GM[:, 0] = self.worth_GM[:, 0]
        return Candidate(self.deadlines_N[:1], self.times_G, worth_GM, self.mean_utility)


@dataclass(frozen=True, slots=True)
class Plan:
    """A plan for batches in a given order.

    ``levels[b]`` is the index of batch b's gamma, or None if batch b is not run. ``utility`` is the expected sum, and
    ``end_s`` the clock behind the last batch: when the next one could start. ``loss_bound`` is the most by which
    another plan for this order can have a higher objective (utility - price x end). It is NaN if the planner has no
    such bound.
    """

    levels: tuple[int | None, ...]
    utility: float
    end_s: float
    loss_bound: float


def exact(
    candidates: Sequence[Candidate],
    now_s: float,
    *,
    price_per_s: float = 0.0,
    most_labels: int = MOST_LABELS,
    executors: float = 1,
) -> Plan:
    """Returns the plan with the largest utility - ``price_per_s`` x end. Batches keep their order; each runs or not.

    A label is a pair (clock, utility) that the first b batches can reach. A label is dropped if another one is no later
    and has no less utility. It is also dropped if even the best continuation cannot reach the current best label. If
    there are more than ``most_labels``, they are thinned: utility is divided into ``most_labels`` equal ranges, and the
    earliest label of each range stays. Each thinning costs at most the width of one range, because a continuation from
    an earlier clock is worth no less. ``loss_bound`` is the sum of these widths; if it is 0, the plan is exact.
    """
    rest = _rest(candidates, price_per_s / executors)
    clocks, utilities = np.array([now_s]), np.zeros(1)
    kept_of: list[tuple[int, int, Ints]] = []
    lost = 0.0
    for candidate, still in zip(candidates, rest[1:], strict=True):
        before, gammas = len(clocks), len(candidate.times_G)
        ends_LG = np.add.outer(clocks, candidate.times_G)
        passed_LG = candidate.deadlines_N.searchsorted(ends_LG)
        passed_LG += np.arange(gammas) * candidate.worth_GM.shape[1]
        gains_LG = candidate.worth_GM.take(passed_LG)
        gains_LG += utilities[:, None]
        if executors > 1:
            ends_LG = np.add.outer(clocks, candidate.times_G / executors)
        ends = np.concatenate((clocks, ends_LG.ravel()))
        earned = np.concatenate((utilities, gains_LG.ravel()))
        order = ends.argsort(kind="stable")
        ascending = earned.take(order)
        top = np.maximum.accumulate(ascending)
        wanted = np.empty(len(order), dtype=bool)
        wanted[0] = True
        np.greater(ascending[1:], top[:-1], out=wanted[1:])
        objective = earned - price_per_s * ends
        wanted &= (objective >= objective.max() - still - SLACK).take(order)
        kept = order[wanted]
        clocks, utilities = ends.take(kept), earned.take(kept)
        if len(kept) > most_labels:
            width = float(utilities[-1] - utilities[0]) / most_labels
            ranges = ((utilities - utilities[0]) / width).astype(np.int64)
            first = np.concatenate(([True], ranges[1:] != ranges[:-1]))
            kept, clocks, utilities = kept[first], clocks[first], utilities[first]
            lost += width
        kept_of.append((before, gammas, kept))
    label = int(np.argmax(utilities - price_per_s * clocks))
    utility, end_s = float(utilities[label]), float(clocks[label])
    chosen: list[int | None] = []
    for before, gammas, kept in reversed(kept_of):
        origin = int(kept[label])
        if origin < before:
            chosen.append(None)
            label = origin
        else:
            label, level = divmod(origin - before, gammas)
            chosen.append(level)
    return Plan(tuple(reversed(chosen)), utility, end_s, lost)


def _rest(candidates: Sequence[Candidate], price_per_s: float) -> list[float]:
    """Returns, for each b, an upper bound on what batches b, b + 1, ... add to the objective: deadlines are ignored."""
    rest = [0.0]
    for candidate in reversed(candidates):
        most = float((candidate.worth_GM[:, 0] - price_per_s * candidate.times_G).max())
        rest.append(rest[-1] + max(0.0, most))
    return rest[::-1]


def alg2(candidates: Sequence[Candidate], now_s: float, executors: float = 1) -> Plan:
    """Plans by the paper's Alg. 2: one best path per (batch, level), where level -1 means "not run".

    Batches are in order of deadline. A batch must end before its earliest deadline. The paper does not say how ties are
    broken; here, of paths with equal utility the earlier one is kept. ``loss_bound`` is NaN, because Alg. 2 is optimal
    only within its own recursion.
    """
    cells: list[tuple[float, float]] = [(0.0, now_s)]
    table: list[list[tuple[int, int]]] = []
    for candidate in candidates:
        deadline_s = float(candidate.deadlines_N[0])
        worths, times = candidate.worth_GM[:, 0].tolist(), candidate.times_G.tolist()
        ranked = sorted(range(len(cells)), key=lambda cell: (-cells[cell][0], cells[cell][1]))
        new_cells, row = [cells[ranked[0]]], [(ranked[0], -1)]
        for level, (worth, time_s) in enumerate(zip(worths, times, strict=True)):
            latest_s = deadline_s - time_s
            for cell in ranked:
                utility, clock_s = cells[cell]
                if clock_s < latest_s:
                    new_cells.append((utility + worth, clock_s + time_s / executors))
                    row.append((cell, level))
                    break
        cells = new_cells
        table.append(row)
    cell = min(range(len(cells)), key=lambda cell: (-cells[cell][0], cells[cell][1]))
    utility, end_s = cells[cell]
    chosen: list[int | None] = []
    for row in reversed(table):
        cell, level = row[cell]
        chosen.append(None if level < 0 else level)
    return Plan(tuple(reversed(chosen)), utility, end_s, float("nan"))


def alg3(
    candidates: Sequence[Candidate], now_s: float, level_of_rate: int, kappa: float = KAPPA, executors: float = 1
) -> Plan:
    """Plans by the paper's Alg. 3: gamma follows the arrival rate, higher for high utility, lower for late batches.

    ``level_of_rate`` is the index of f(q) (see ``level_for_rate``). Where we differ: the paper runs a batch that misses
    its deadline even at the smallest gamma; here it is left out. The paper also raises gamma if the largest gamma makes
    the batch late; here such a batch keeps f(q).
    """
    clock_s, utility = now_s, 0.0
    chosen: list[int | None] = []
    for candidate in candidates:
        latest = candidate.deadlines_N[0] - candidate.times_G - clock_s
        largest = len(candidate.times_G) - 1
        if latest[level_of_rate] <= 0:
            level = 0
        elif candidate.mean_utility > kappa and latest[largest] > 0:
            level = largest
        else:
            level = level_of_rate
        if latest[level] <= 0:
            chosen.append(None)
            continue
        clock_s += float(candidate.times_G[level]) / executors
        utility += float(candidate.worth_GM[level, 0])
        chosen.append(level)
    return Plan(tuple(chosen), utility, clock_s, float("nan"))


def level_for_rate(capacities_G: Sequence[float], rate_per_s: float) -> int:
    """Returns f(q) of Alg. 3: the index of the largest gamma whose throughput is above the arrival rate.

    If there is none, it returns the smallest gamma's index, 0. The paper uses a table for its graphics card; here the
    capacities are those of the profile (``Profile.capacity_per_s``).
    """
    for level in range(len(capacities_G) - 1, -1, -1):
        if rate_per_s < capacities_G[level]:
            return level
    return 0
