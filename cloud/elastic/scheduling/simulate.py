"""PURE: serves a list of queries with the engine in some world. The virtual world is here; a replay has a real one.

In the virtual world a batch takes the time of the profile, or of an executor model. Whether an answer is right is drawn
once per query: a query with draw v is right at every gamma whose accuracy is above v. So all policies get the same
draws, and differ only by their choices.
"""

import heapq
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from isthmus.cloud.elastic.scheduling.engine import Engine, Overloaded, Work
from isthmus.cloud.elastic.scheduling.profile import Profile
from isthmus.cloud.elastic.scheduling.query import IN_TIME, Outcome, Query
from isthmus.cloud.elastic.scheduling.scaling import Scaler

ExecutorModel = Callable[[Work], float]
"""Returns the seconds that a batch takes."""
TICK_S: Final = 1e-6
"""Shortest wait if nothing is to run. Without it, an engine that asks to be called again at once would stop time."""


class World(Protocol):
    """A clock that starts at 0, and one executor."""

    def now_s(self) -> float: ...

    def wait(self, until_s: float) -> None:
        """Waits until ``until_s``."""

    def run(self, work: Work) -> Sequence[bool | None]:
        """Runs a batch, which takes time. Returns for each query whether the answer was right (None: unknown)."""


@dataclass(frozen=True, slots=True)
class Ran:
    """One batch that ran.

    ``accuracy`` is the expected accuracy, averaged over its queries. ``utility`` is the expected utility of the queries
    that were in time.
    """

    start_s: float
    end_s: float
    gamma: int
    size: int
    accuracy: float
    utility: float


@dataclass
class Run:
    """The result of serving a list of queries. ``outcomes[i]`` belongs to query i; it is None if that was refused.

    ``expected_utility`` sums accuracy x utility over the answers in time, with the profile's accuracies. ``utility``
    sums the utility of the answers that were right and in time.
    """

    outcomes: list[Outcome | None]
    waits_s: list[float]
    """For each query that ran, batch by batch: seconds from its arrival to the start of its batch."""
    batches: list[Ran] = field(default_factory=list)
    expected_utility: float = 0.0
    utility: float = 0.0
    end_s: float = 0.0

    @property
    def latencies_s(self) -> list[float]:
        """For each query that ran, in the order of ``waits_s``: seconds from its arrival to its answer."""
        runs_s = [batch.end_s - batch.start_s for batch in self.batches for _ in range(batch.size)]
        return [wait_s + run_s for wait_s, run_s in zip(self.waits_s, runs_s, strict=True)]

    def share(self, outcome: Outcome) -> float:
        """Returns the share of all queries that ended with ``outcome``."""
        return self.outcomes.count(outcome) / max(1, len(self.outcomes))


def draws(rng: np.random.Generator, count: int) -> npt.NDArray[np.float64]:
    """Returns one draw per query, uniform in [0, 1)."""
    return rng.random(count)


@dataclass
class Growing:
    """Executors whose number follows the load: ``scaler`` is asked every ``every_s``, and a new one takes ``start_s``.

    ``changes`` lists (time, executors wanted) of the run.
    """

    scaler: Scaler
    every_s: float = 1.0
    start_s: float = 0.0
    changes: list[tuple[float, int]] = field(default_factory=list)
    _next_s: float = 0.0
    _starting: list[float] = field(default_factory=list)

    def events_s(self) -> list[float]:
        """Returns the times at which ``at`` must be called."""
        return [self._next_s, *self._starting]

    def at(self, engine: Engine, arrived: int, now_s: float) -> None:
        """Lets started executors work, and asks the scaler if it is time. A removed one ends its batch."""
        ready = engine.executors + sum(at_s <= now_s for at_s in self._starting)
        self._starting = [at_s for at_s in self._starting if at_s > now_s]
        if now_s >= self._next_s:
            self._next_s = now_s + self.every_s
            before = self.scaler.wanted
            wanted = self.scaler.look(arrived, engine.waiting, now_s, engine.pace)
            if wanted != before:
                self.changes.append((now_s, wanted))
            missing = wanted - ready - len(self._starting)
            self._starting = sorted([*self._starting, *[now_s + self.start_s] * missing])[: max(0, wanted - ready)]
            ready = min(ready, wanted)
        if ready != engine.executors:
            engine.count_on(range(ready))


class VirtualWorld:
    """A world with a virtual clock: time passes only by ``wait`` and ``run``."""

    def __init__(
        self, profile: Profile, draws_N: npt.NDArray[np.float64], executor: ExecutorModel | None = None
    ) -> None:
        self._profile = profile
        self._luck: list[float] = draws_N.tolist()
        self._executor = executor
        self._now_s = 0.0

    def now_s(self) -> float:
        return self._now_s

    def wait(self, until_s: float) -> None:
        self._now_s = max(self._now_s, until_s)

    def run(self, work: Work) -> list[bool | None]:
        profiled_s = self._profile.batch_time_s(work.gamma, len(work.batch))
        self._now_s += profiled_s if self._executor is None else self._executor(work)
        accuracy = self._profile.accuracy
        return [self._luck[query.id] < accuracy[query.task][work.gamma] for query in work.batch.queries]


def simulate(
    engine: Engine,
    queries: Sequence[Query],
    draws_N: npt.NDArray[np.float64],
    executor: ExecutorModel | None = None,
    growing: Growing | None = None,
) -> Run:
    """Serves the queries with a virtual clock. ``draws_N`` holds one draw per query (see ``draws``).

    If the engine has several executors, or their number is ``growing``, batches run at the same time.

    >>> queries = [Query(0, "CIFAR10", 0.0, 1.0, utility=0.5), Query(1, "CIFAR10", 0.1, 1.1, utility=0.5)]
    >>> engine = Engine(paper_profile(), make_policy("priced", paper_profile()))
    >>> run = simulate(engine, queries, np.array([0.3, 0.99]))  # 0.99 is above every accuracy: wrong
    >>> run.utility
    0.5
    """
    if engine.executors > 1 or growing is not None:
        return _serve_at_once(engine, queries, draws_N.tolist(), executor, growing)
    return serve(engine, queries, VirtualWorld(engine.profile, draws_N, executor))


def _serve_at_once(
    engine: Engine,
    queries: Sequence[Query],
    luck: list[float],
    executor: ExecutorModel | None,
    growing: Growing | None,
) -> Run:
    """Serves with several executors: time goes from one event (an arrival, the end of a batch) to the next."""
    run = Run([None] * len(queries), [])
    running: list[tuple[float, int, Work]] = []
    coming, now_s = 0, 0.0
    while True:
        coming = _submit(engine, queries, coming, now_s)
        if growing is not None:
            growing.at(engine, coming, now_s)
        decision = engine.next_work(now_s)
        for query in decision.evicted:
            run.outcomes[query.id] = Outcome.EVICTED
        if decision.work is not None:
            work = decision.work
            profile = engine.profile
            takes_s = profile.batch_time_s(work.gamma, len(work.batch)) if executor is None else executor(work)
            heapq.heappush(running, (now_s + takes_s, work.id, work))
            continue
        times_s = [] if decision.wait_until_s is None else [max(decision.wait_until_s, now_s + TICK_S)]
        if coming < len(queries):
            times_s.append(queries[coming].arrival_s)
        if running:
            times_s.append(running[0][0])
        if not times_s:
            run.end_s = now_s
            return run
        if growing is not None:
            times_s += growing.events_s()
        now_s = max(now_s, min(times_s))
        coming = _submit(engine, queries, coming, now_s)
        while running and running[0][0] <= now_s:
            end_s, _, work = heapq.heappop(running)
            accuracy = engine.profile.accuracy
            answers: list[bool | None] = [
                luck[each.id] < accuracy[each.task][work.gamma] for each in work.batch.queries
            ]
            _finish(engine, work, answers, end_s, run)


def serve(engine: Engine, queries: Sequence[Query], world: World) -> Run:
    """Serves all ``queries`` (ascending arrivals, ids from 0 in that order) and returns what happened.

    Queries that arrive while a batch runs are submitted after it has ended, each with its own arrival time, since
    nothing is decided before. If the executor raises, the batch is reported to the engine as failed and the error is
    raised again.
    """
    run = Run([None] * len(queries), [])
    coming = 0
    while True:
        coming = _submit(engine, queries, coming, world.now_s())
        decision = engine.next_work(world.now_s())
        for query in decision.evicted:
            run.outcomes[query.id] = Outcome.EVICTED
        if decision.work is not None:
            try:
                answers = world.run(decision.work)
            except BaseException:
                engine.failed(decision.work, world.now_s())
                raise
            end_s = world.now_s()
            coming = _submit(engine, queries, coming, end_s)
            _finish(engine, decision.work, answers, end_s, run)
            continue
        times_s = [] if decision.wait_until_s is None else [max(decision.wait_until_s, world.now_s() + TICK_S)]
        if coming < len(queries):
            times_s.append(queries[coming].arrival_s)
        if not times_s:
            run.end_s = world.now_s()
            return run
        world.wait(min(times_s))


def _submit(engine: Engine, queries: Sequence[Query], coming: int, until_s: float) -> int:
    """Submits the queries that arrive up to ``until_s``, each at its own time. Returns the index of the next query."""
    while coming < len(queries) and queries[coming].arrival_s <= until_s:
        # A refused query keeps the outcome None.
        with suppress(Overloaded):
            engine.submit(queries[coming], queries[coming].arrival_s)
        coming += 1
    return coming


def _finish(engine: Engine, work: Work, answers: Sequence[bool | None], end_s: float, run: Run) -> None:
    accuracy = engine.profile.accuracy
    shares = [accuracy[query.task][work.gamma] for query in work.batch.queries]
    expected = 0.0
    for (query, outcome), share in zip(engine.finished(work, answers, end_s), shares, strict=True):
        run.outcomes[query.id] = outcome
        run.waits_s.append(work.started_s - query.arrival_s)
        if outcome in IN_TIME:
            expected += share * query.utility
            if outcome is Outcome.CORRECT_IN_TIME:
                run.utility += query.utility
    run.expected_utility += expected
    run.batches.append(Ran(work.started_s, end_s, work.gamma, len(shares), sum(shares) / len(shares), expected))
