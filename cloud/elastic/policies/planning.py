"""PURE: which of the queued batches to run, in their order, and with which gamma (problem 3.2; spec 2, section 6).

Three planners over the same input. ``alg2`` and ``alg3`` are the paper's. ``exact`` keeps, after each batch, every pair
of clock and utility that no other pair beats in both, so it is exact for the order given: Alg. 2 keeps one clock for
each cell and can throw away the path that was a little poorer but much earlier.

Axes: N queries of a batch by deadline, G gammas.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

BETA: Final = 5
KAPPA: Final = 0.8
WARM_UP_S: Final = 2.0
MOST_LABELS: Final = 64
SLACK: Final = 1e-9
"""Utilities closer than this are not told apart when labels are bounded away."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One batch as a planner sees it. ``deadlines_N`` ascend. ``times_G``: seconds at each gamma.

    ``worth_GM``, M = N + 1: what the batch earns at each gamma when it ends after the first 0, 1, ... N of its
    deadlines, so it falls along M to 0. A query ends in time up to its deadline and including it.
    """

    deadlines_N: Floats
    times_G: Floats
    worth_GM: Floats
    mean_utility: float = 0.0

    @staticmethod
    def of(deadlines_N: Floats, gains_NG: Floats, times_G: Floats, mean_utility: float = 0.0) -> "Candidate":
        """Each query counts by its own deadline. ``gains_NG``: what each earns at each gamma; rows by deadline."""
        worth_MG = np.zeros((len(gains_NG) + 1, gains_NG.shape[1]))
        worth_MG[:-1] = np.cumsum(gains_NG[::-1], axis=0)[::-1]
        return Candidate(deadlines_N, times_G, np.ascontiguousarray(worth_MG.T), mean_utility)

    def whole(self) -> "Candidate":
        """The paper's reading: a batch that ends after its earliest deadline earns nothing."""
        worth_GM = np.zeros((len(self.times_G), 2))
        worth_GM[:, 0] = self.worth_GM[:, 0]
        return Candidate(self.deadlines_N[:1], self.times_G, worth_GM, self.mean_utility)

    def earns(self, level: int, end_s: float) -> float:
        """Expected utility when it runs at the gamma of index ``level`` and ends at ``end_s``."""
        return float(self.worth_GM[level, np.searchsorted(self.deadlines_N, end_s)])


@dataclass(frozen=True, slots=True)
class Plan:
    """``levels[b]``: index of batch b's gamma; None: it is not run. ``utility``: expected. ``end_s``: when all is done.

    ``loss_bound``: no plan for this order has an objective (utility - price x end) higher than this one's by more.
    NaN where the planner gives no such promise.
    """

    levels: tuple[int | None, ...]
    utility: float
    end_s: float
    loss_bound: float


def exact(
    candidates: Sequence[Candidate], now_s: float, *, price_per_s: float = 0.0, most_labels: int = MOST_LABELS
) -> Plan:
    """The plan of most utility - ``price_per_s`` x end, for batches run in the order given, each or not at all.

    A label is a pair (clock, utility) that the first b batches can reach. One is dropped if another is no later and no
    poorer, or if even the best of all that follows could not bring it up to the best label of now. More than
    ``most_labels`` are thinned: of those within one of ``most_labels`` equal ranges of utility the earliest stays. Each
    thinning costs at most one range's width, since a continuation is worth no less from an earlier clock; the widths'
    sum is ``loss_bound``, which is 0 where nothing was thinned: then the plan is exact.
    """
    rest = _rest(candidates, price_per_s)
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
    """What the batches from the b-th on could add to the objective at most, were there no deadlines between them."""
    rest = [0.0]
    for candidate in reversed(candidates):
        most = float((candidate.worth_GM[:, 0] - price_per_s * candidate.times_G).max())
        rest.append(rest[-1] + max(0.0, most))
    return rest[::-1]


def alg2(candidates: Sequence[Candidate], now_s: float) -> Plan:
    """The paper's Alg. 2: batches by deadline; one best path for each (batch, level), level -1 for "not run".

    A batch must end before its earliest deadline. Where the paper leaves it open, of paths worth the same the earlier
    is kept. Its promise holds for its own recursion alone, so ``loss_bound`` is NaN.
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
                    new_cells.append((utility + worth, clock_s + time_s))
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


def alg3(candidates: Sequence[Candidate], now_s: float, level_of_rate: int, kappa: float = KAPPA) -> Plan:
    """The paper's Alg. 3: gamma by the arrival rate, raised for batches of high utility, lowered for late ones.

    ``level_of_rate``: index of f(q) (see ``level_for_rate``). Corrected: the paper runs a batch that misses its
    deadline even at the smallest gamma, and raises one that the largest makes late; here the first is left out, and
    the second keeps f(q).
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
        clock_s += float(candidate.times_G[level])
        utility += float(candidate.worth_GM[level, 0])
        chosen.append(level)
    return Plan(tuple(chosen), utility, clock_s, float("nan"))


def level_for_rate(capacities_G: Sequence[float], rate_per_s: float) -> int:
    """f(q) of Alg. 3: the largest gamma whose throughput is above the arrival rate; none is: the smallest.

    The paper has a table for its card; this computes it from the profile (``Profile.capacity_per_s``).
    """
    for level in range(len(capacities_G) - 1, -1, -1):
        if rate_per_s < capacities_G[level]:
            return level
    return 0
