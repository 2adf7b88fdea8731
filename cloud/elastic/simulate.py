"""PURE: the engine itself under a virtual clock. Batches take what the profile says, or what an executor model says.

Whether an answer is right is drawn once for each query, not for each run: a query with draw v is right at every gamma
whose accuracy passes v. So policies meet the very same luck, and differ by their choices alone.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from isthmus.cloud.elastic.engine import Engine, Overloaded, Work
from isthmus.cloud.elastic.query import IN_TIME, Outcome, Query

ExecutorModel = Callable[[Work], float]
"""Seconds that a batch will take."""
TICK_S: Final = 1e-6
"""Least step of the clock where nothing is to be run: an engine that asks to be asked at once must not stop time."""


@dataclass(frozen=True, slots=True)
class Ran:
    """One batch that ran. ``accuracy``: expected, mean over its queries. ``utility``: expected, of those in time."""

    start_s: float
    end_s: float
    gamma: int
    size: int
    accuracy: float
    utility: float


@dataclass
class Run:
    """What became of a list of queries. ``outcomes[i]`` belongs to the i-th of them, None where it was refused.

    ``expected_utility``: accuracy x utility over the answers in time, as the profile has it. ``utility``: the same with
    each answer right or wrong, as the draws fell.
    """

    outcomes: list[Outcome | None]
    waits_s: list[float]
    batches: list[Ran] = field(default_factory=list)
    expected_utility: float = 0.0
    utility: float = 0.0
    end_s: float = 0.0

    def share(self, outcome: Outcome) -> float:
        return self.outcomes.count(outcome) / max(1, len(self.outcomes))


def draws(rng: np.random.Generator, count: int) -> npt.NDArray[np.float64]:
    """Each query's luck, uniform in [0, 1)."""
    return rng.random(count)


def simulate(
    engine: Engine,
    queries: Sequence[Query],
    draws_N: npt.NDArray[np.float64],
    executor: ExecutorModel | None = None,
) -> Run:
    """Serves ``queries`` (ascending arrivals, ids from 0 in that order) to the last one, and returns what happened."""
    takes_s = executor if executor is not None else _predicted_s
    luck: list[float] = draws_N.tolist()
    run = Run([None] * len(queries), [])
    coming = 0
    now_s = 0.0
    while True:
        coming = _submit(engine, queries, coming, now_s)
        decision = engine.next_work(now_s)
        for query in decision.evicted:
            run.outcomes[query.id] = Outcome.EVICTED
        if decision.work is not None:
            end_s = now_s + takes_s(decision.work)
            coming = _submit(engine, queries, coming, end_s)
            _finish(engine, decision.work, luck, end_s, run)
            now_s = end_s
            continue
        times_s = [] if decision.wait_until_s is None else [max(decision.wait_until_s, now_s + TICK_S)]
        if coming < len(queries):
            times_s.append(queries[coming].arrival_s)
        if not times_s:
            run.end_s = now_s
            return run
        now_s = max(now_s, min(times_s))


def _predicted_s(work: Work) -> float:
    return work.predicted_s


def _submit(engine: Engine, queries: Sequence[Query], coming: int, until_s: float) -> int:
    """Submits what arrives up to ``until_s``, each at its own time. Returns the place of the first that does not."""
    while coming < len(queries) and queries[coming].arrival_s <= until_s:
        # Refused: it keeps the outcome None.
        with suppress(Overloaded):
            engine.submit(queries[coming], queries[coming].arrival_s)
        coming += 1
    return coming


def _finish(engine: Engine, work: Work, luck: list[float], end_s: float, run: Run) -> None:
    accuracy = engine.profile.accuracy
    queries = work.batch.queries
    shares = [accuracy[query.task][work.gamma] for query in queries]
    answers = [luck[query.id] < share for query, share in zip(queries, shares, strict=True)]
    expected = 0.0
    for (query, outcome), share in zip(engine.finished(work, answers, end_s), shares, strict=True):
        run.outcomes[query.id] = outcome
        run.waits_s.append(work.started_s - query.arrival_s)
        if outcome in IN_TIME:
            expected += share * query.utility
            if outcome is Outcome.CORRECT_IN_TIME:
                run.utility += query.utility
    run.expected_utility += expected
    run.batches.append(Ran(work.started_s, end_s, work.gamma, len(queries), sum(shares) / len(shares), expected))
