"""PURE: decides which batch of Alg. 1 runs next and at which gamma, by a planner over the queue of batches.

The planner is the paper's (OTAS, Alg. 2 and 3) or the exact one; both are in ``planning.py``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from enum import Enum
from typing import Final

import numpy as np
import numpy.typing as npt

from isthmus.cloud.elastic.policies.arrivals import ArrivalRate
from isthmus.cloud.elastic.policies.baselines import in_time
from isthmus.cloud.elastic.policies.batching import BatchingRule, BatchQueue
from isthmus.cloud.elastic.policies.planning import (
    BETA,
    WARM_UP_S,
    Candidate,
    Plan,
    alg2,
    alg3,
    exact,
    level_for_rate,
)
from isthmus.cloud.elastic.scheduling.policy import Choice
from isthmus.cloud.elastic.scheduling.profile import Profile
from isthmus.cloud.elastic.scheduling.query import Batch, Query, by_deadline

Float64s = npt.NDArray[np.float64]

RATE_WINDOW_S: Final = 0.5
HORIZON: Final = 12
"""The exact planner considers this many batches, earliest deadline first. The plan is remade after each batch, and only
its first batch is ever run, so a longer horizon gains little. One step stays under 2 ms for a queue of any length."""
LABELS: Final = 32
"""The exact planner thins its frontier to this many labels. The plan's ``loss_bound`` bounds the loss."""


class Planner(Enum):
    PAPER = "paper"
    EXACT = "exact"


class Otas:
    """Makes a new plan after each batch, and runs the plan's first batch without the queries that would be late.

    Where we differ: a query that would be late in its own batch even at the fastest gamma is evicted before planning.
    Otherwise the whole batch would wait until that query expires. Queries that a plan leaves out stay queued. Several
    executors share one plan (``planning.py``), and are as fast as all of them together in its table of rates.
    """

    def __init__(self, planner: Planner, rule: BatchingRule | None = None) -> None:
        self.gammas: tuple[int, ...] = ()
        self.executors = 1.0
        self._planner = planner
        self._queue = BatchQueue(rule)
        self._rate = ArrivalRate(RATE_WINDOW_S)
        self._first_s: float | None = None
        self._made: dict[int, tuple[Batch, list[Query], Candidate]] = {}
        self._accuracy: Mapping[str, Mapping[int, float]] = {}

    def use(self, profile: Profile) -> None:
        self.gammas = profile.gammas
        self._times_GS = np.array([profile.times_s(gamma) for gamma in profile.gammas])
        self._quickest_s = tuple(self._times_GS.min(axis=0).tolist())
        self._capacities_G = [profile.capacity_per_s(gamma) for gamma in profile.gammas]
        self._accuracy_G = {
            task: np.array([shares[gamma] for gamma in profile.gammas]) for task, shares in profile.accuracy.items()
        }
        self._unknown_G = np.zeros(len(profile.gammas))
        if profile.accuracy is self._accuracy:
            # Only times have changed: another executor, or another pace. Gains need not be computed again.
            for key, (batch, queries, known) in self._made.items():
                self._made[key] = batch, queries, replace(known, times_G=self._times_GS[:, len(queries)])
        else:
            self._made.clear()
        self._accuracy = profile.accuracy

    def arrived(self, query: Query) -> None:
        self._queue.add(query)
        self._rate.add(query.arrival_s)
        if self._first_s is None:
            self._first_s = query.arrival_s

    def left(self, query: Query) -> None:
        self._queue.remove(query)

    def choose(self, now_s: float) -> Choice:
        doomed: list[Query] = []
        made: dict[int, tuple[Batch, list[Query], Candidate]] = {}
        for batch in self._queue.by_deadline():
            known = self._made.get(id(batch))
            if known is None or known[0] is not batch:
                queries = by_deadline(batch.queries)
                known = (batch, queries, self._candidate(queries))
            late, queries = in_time(known[1], self._quickest_s, now_s)
            if late:
                doomed += late
                if not queries:
                    continue
                known = (batch, queries, self._candidate(queries))
            else:
                self._made[id(batch)] = known
            made[id(batch)] = known
        self._made = {key: known for key, known in self._made.items() if key in made}
        queue = sorted(made.values(), key=lambda known: known[2].deadlines_N[0])
        plan = self._plan([candidate for _, _, candidate in queue], now_s)
        for (_, queries, _), level in zip(queue, plan.levels, strict=False):
            if level is not None:
                end_s = now_s + self._times_GS[level, len(queries)]
                chosen = tuple(query for query in queries if query.deadline_s >= end_s)
                return Choice(chosen, self.gammas[level], tuple(doomed))
        return Choice(evict=tuple(doomed))

    def _candidate(self, queries: Sequence[Query]) -> Candidate:
        deadlines_N = np.array([query.deadline_s for query in queries])
        utilities_N = np.array([query.utility for query in queries])
        accuracy_NG = np.array([self._accuracy_G.get(query.task, self._unknown_G) for query in queries])
        gains_NG = accuracy_NG * utilities_N[:, None]
        return Candidate.of(deadlines_N, gains_NG, self._times_GS[:, len(queries)], float(utilities_N.mean()))

    def _plan(self, candidates: list[Candidate], now_s: float) -> Plan:
        if self._planner is Planner.EXACT:
            return exact(candidates[:HORIZON], now_s, most_labels=LABELS, executors=self.executors)
        warming_up = self._first_s is not None and now_s < self._first_s + WARM_UP_S
        if warming_up or len(candidates) <= BETA:
            rate_per_s = self._rate.at(now_s) / self.executors
            return alg3(candidates, now_s, level_for_rate(self._capacities_G, rate_per_s), executors=self.executors)
        return alg2(candidates, now_s, self.executors)
