"""PURE: takes every query from submission to its one outcome. The time is an argument.

    submit -> waiting --next_work--> running --finished/failed--> outcome
               | ^                      |                            ^
               | +------- lost ---------+                            |
               +------ expired, given up by the policy, cancelled ---+

The same engine serves live (real clock, real executor) and in the simulator (virtual clock, the profile as executor).
It is not thread-safe: one thread owns it.
"""

import heapq
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from isthmus.cloud.elastic.scheduling.pace import Paces
from isthmus.cloud.elastic.scheduling.policy import CountsExecutors, KeepsToGammas, LearnsTimes, Policy
from isthmus.cloud.elastic.scheduling.profile import Profile
from isthmus.cloud.elastic.scheduling.query import Batch, Outcome, Query
from isthmus.proto.errors import Busy, InvalidInput

MAX_WAITING: Final = 8_192


class Overloaded(Busy):
    """The maximum number of queries is waiting, so this query was not accepted."""


@dataclass(frozen=True, slots=True)
class Work:
    """One batch to run, on the executor with this number.

    ``predicted_s`` is the time that the plan assumes: the profile's time at the executor's pace.
    """

    id: int
    batch: Batch
    gamma: int
    started_s: float
    predicted_s: float
    executor: int = 0


@dataclass(frozen=True, slots=True)
class Decision:
    """What the caller must do now. The queries in ``evicted`` have their outcome; the caller must report it to them.

    Without ``work``, ask again after a query was submitted or a batch has ended, or at ``wait_until_s`` if it is given.
    """

    work: Work | None
    evicted: tuple[Query, ...]
    wait_until_s: float | None


class Engine:
    """Runs a policy over the waiting queries.

    ``executors`` is the number of batches that may run at once; executors have numbers from 0. A batch predicted to
    need more than ``memory_limit_bytes`` is split, and the rest keeps waiting. If the clock goes back, the engine's
    time stays where it was.

    With ``adapts``, plans follow the time that batches really take on each executor (see pace.py); ``paces`` keeps
    these. A batch is planned with the times of the executor that is to run it, and the policy counts all executors by
    their speed relative to that one. Beside a second one that is three times slower there are 1.33; for a batch of that
    slower one there are 4. Of the free executors the fastest takes the next batch. A query that a slower one cannot
    answer in time waits for the fastest.

    >>> engine = Engine(paper_profile(), make_policy("priced", paper_profile()))
    >>> engine.submit(Query(0, "CIFAR10", 0.0, 1.0, utility=0.5), 0.0)
    >>> engine.next_work(0.0).work.batch.queries[0].id
    0
    """

    def __init__(
        self,
        profile: Profile,
        policy: Policy,
        *,
        max_waiting: int = MAX_WAITING,
        memory_limit_bytes: int | None = None,
        executors: int = 1,
        adapts: bool = True,
        paces: type[Paces] = Paces,
    ) -> None:
        if max_waiting < 1:
            raise ValueError(f"{max_waiting} waiting queries: there must be room for at least 1")
        self.policy = policy
        self._keeps_to_gammas = isinstance(policy, KeepsToGammas) and policy.keeps_to_gammas
        self._counting = policy if isinstance(policy, CountsExecutors) else None
        self.outcomes: Counter[Outcome] = Counter()
        self._max_waiting = max_waiting
        self._memory_limit_bytes = memory_limit_bytes
        self._waiting: dict[int, Query] = {}
        self._running: dict[int, Work] = {}
        self._running_ids: set[int] = set()
        self._lost: set[int] = set()
        """Queries that wait or run again because their batch was lost."""
        self._deadlines: list[tuple[float, int]] = []
        self._works = 0
        self._now_s = float("-inf")
        self._adapts = adapts
        self._paces = paces(range(executors))
        self._planned: dict[float, Profile] = {}
        """The profile at the paces of the executors, by their factor."""
        self.use(profile)

    def use(self, profile: Profile) -> None:
        """Plans with ``profile`` from now on. Raises ValueError if it lacks a gamma that the policy needs."""
        factor = self._paces.factor(self._paces.fastest(self._paces.able))
        planned = _at(factor, profile)
        self.policy.use(planned)
        self.profile, self._planned, self._in_use = profile, {factor: planned}, planned
        self._follow_paces()

    @property
    def executors(self) -> int:
        """The number of batches that may run at once."""
        return len(self._paces.able)

    def count_on(self, executors: Iterable[int]) -> None:
        """Plans for these executors from now on, by their numbers. Batches that run go on.

        A new one starts at the median pace of the others. Raises ValueError if there is none.
        """
        self._paces.count_on(executors)
        self._follow_paces()

    @property
    def pace(self) -> float:
        """The planned time of a batch, as a multiple of the profile's time: the harmonic mean over the executors."""
        return self._paces.mean

    def pace_of(self, executor: int) -> float:
        """Returns the planned time of a batch on this executor, as a multiple of the profile's time."""
        return self._paces.factor(executor)

    def fastest(self, among: Iterable[int]) -> int:
        """Returns which of these executors takes the next batch: the fastest, or of equals the first."""
        return self._paces.fastest(among)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        """The number of batches that were handed out and have not ended."""
        return len(self._running)

    def submit(self, query: Query, now_s: float) -> None:
        """Accepts the query.

        Raises Overloaded if too many queries wait, and InvalidInput for a task without a profile, an id in use, or
        gammas that the policy does not keep to. A query that was not accepted has no outcome.
        """
        self._at(now_s)
        if query.task not in self.profile.accuracy:
            raise InvalidInput(f"no task {query.task!r} is registered")
        if query.id in self._waiting or query.id in self._running_ids:
            raise InvalidInput(f"query {query.id} was submitted already")
        if query.gammas is not None and not self._keeps_to_gammas:
            raise InvalidInput(
                "gamma and min_accuracy: this server's policy decides the gamma of whole batches; ask its operator for "
                "--elastic-policy priced"
            )
        if len(self._waiting) >= self._max_waiting:
            raise Overloaded(f"{self._max_waiting} queries are waiting already; try again later")
        self._waiting[query.id] = query
        heapq.heappush(self._deadlines, (query.deadline_s, query.id))
        self.policy.arrived(query)

    def expire(self, now_s: float) -> tuple[Query, ...]:
        """Evicts and returns the queries that would be late even if they ran now, alone and at the fastest gamma."""
        now_s = self._at(now_s)
        if self._paces.forget(now_s, self._busy):
            self._follow_paces()
        hopeless_s = now_s + self._fastest_s
        expired = []
        while self._deadlines and self._deadlines[0][0] < hopeless_s:
            deadline_s, id = heapq.heappop(self._deadlines)
            query = self._waiting.get(id)
            if query is not None and query.deadline_s == deadline_s:
                expired.append(query)
                self._leave(query)
                self._lost.discard(query.id)
        self.outcomes[Outcome.EVICTED] += len(expired)
        return tuple(expired)

    def next_work(self, now_s: float, executor: int | None = None) -> Decision:
        """Returns what to run now on ``executor``; None: on the fastest that is free.

        The caller must report every batch once, with ``finished``, ``failed`` or ``lost``. Raises ValueError if the
        policy chooses queries that are not waiting, or a gamma that is not one of its own, and for an executor that
        runs a batch or that plans do not count on.
        """
        now_s = self._at(now_s)
        evicted = self.expire(now_s)
        busy = self._busy
        free = [each for each in self._paces.able if each not in busy]
        if not free:
            return Decision(None, evicted, None)
        if executor is None:
            executor = self.fastest(free)
        elif executor not in free:
            raise ValueError(f"executor {executor} is not free: {free} are")
        planned = self._plan_for(executor)
        choice = self.policy.choose(now_s)
        self._check(choice.queries, choice.gamma)
        if choice.evict and self._paces.factor(executor) == self._least_factor:
            self._check(choice.evict, None)
            for query in choice.evict:
                self._leave(query)
                self._lost.discard(query.id)
            self.outcomes[Outcome.EVICTED] += len(choice.evict)
            evicted += choice.evict
        if not choice.queries:
            return Decision(None, evicted, self._next_event_s(choice.wait_until_s))
        size = self.profile.largest_batch(choice.gamma, self._memory_limit_bytes, len(choice.queries))
        batch = Batch(choice.queries[:size])
        for query in batch.queries:
            self._leave(query)
            self._running_ids.add(query.id)
        self._works += 1
        predicted_s = planned.batch_time_s(choice.gamma, len(batch))
        work = Work(self._works, batch, choice.gamma, now_s, predicted_s, executor)
        self._running[work.id] = work
        return Decision(work, evicted, None)

    def finished(self, work: Work, answers: Sequence[bool | None], now_s: float) -> list[tuple[Query, Outcome]]:
        """Notes that the batch has run, and returns each query's outcome.

        ``answers`` says for each query whether the answer was right (None: unknown). Raises KeyError for a batch that
        has already ended, and ValueError if the number of answers does not match the batch.
        """
        now_s = self._at(now_s)
        if len(answers) != len(work.batch):
            raise ValueError(f"{len(answers)} answers to {len(work.batch)} queries")
        self._end(work)
        profiled_s = self.profile.batch_time_s(work.gamma, len(work.batch))
        took_s = now_s - work.started_s
        if self._adapts and self._paces.ran(work.executor, len(work.batch), profiled_s, took_s, now_s):
            self._follow_paces()
        if isinstance(self.policy, LearnsTimes):
            self.policy.ran(len(work.batch), took_s)
        settled = []
        for query, right in zip(work.batch.queries, answers, strict=True):
            if now_s > query.deadline_s:
                outcome = Outcome.LATE
            elif right is None:
                outcome = Outcome.ANSWERED_IN_TIME
            else:
                outcome = Outcome.CORRECT_IN_TIME if right else Outcome.WRONG_IN_TIME
            self.outcomes[outcome] += 1
            self._lost.discard(query.id)
            settled.append((query, outcome))
        return settled

    def failed(self, work: Work, now_s: float) -> list[tuple[Query, Outcome]]:
        """Notes that the batch failed, and with it all its queries. Raises KeyError for a batch that has ended."""
        self._at(now_s)
        self._end(work)
        self.outcomes[Outcome.FAILED] += len(work.batch)
        self._lost.difference_update(query.id for query in work.batch.queries)
        return [(query, Outcome.FAILED) for query in work.batch.queries]

    def lost(self, work: Work, now_s: float) -> list[tuple[Query, Outcome]]:
        """Notes that the batch's executor failed while others go on. Returns the queries that end with it.

        The other queries wait again: those that can still be in time, and have not been in a lost batch before. So a
        query that breaks executors breaks at most two. Raises KeyError for a batch that has ended.
        """
        hopeless_s = self._at(now_s) + self._fastest_s
        self._end(work)
        ended = []
        for query in work.batch.queries:
            if query.id in self._lost or query.deadline_s < hopeless_s or query.task not in self.profile.accuracy:
                self._lost.discard(query.id)
                self.outcomes[Outcome.FAILED] += 1
                ended.append((query, Outcome.FAILED))
            else:
                self._lost.add(query.id)
                self._waiting[query.id] = query
                heapq.heappush(self._deadlines, (query.deadline_s, query.id))
                self.policy.arrived(query)
        return ended

    def cancel(self, query_id: int) -> Query | None:
        """Evicts a query whose caller left, and returns it.

        Returns None if the query is running or has ended: its outcome belongs to its batch.
        """
        query = self._waiting.get(query_id)
        if query is not None:
            self._leave(query)
            self._lost.discard(query.id)
            self.outcomes[Outcome.EVICTED] += 1
        return query

    @property
    def _busy(self) -> set[int]:
        return {work.executor for work in self._running.values()}

    def _follow_paces(self) -> None:
        """Plans with the executors and paces of now."""
        fastest = self._paces.fastest(self._paces.able)
        self._least_factor = self._paces.factor(fastest)
        factors = {self._paces.factor(executor) for executor in self._paces.able}
        self._planned = {factor: planned for factor, planned in self._planned.items() if factor in factors}
        planned = self._plan_for(fastest)
        self._fastest_s = min(planned.batch_time_s(gamma, 1) for gamma in self.policy.gammas)

    def _plan_for(self, executor: int) -> Profile:
        """Lets the policy plan a batch of this executor. Returns the profile at its pace."""
        factor = self._paces.factor(executor)
        planned = self._planned.get(factor)
        if planned is None:
            planned = self._planned[factor] = _at(factor, self.profile)
        if planned is not self._in_use:
            self.policy.use(planned)
            self._in_use = planned
        if self._counting is not None:
            self._counting.executors = self._paces.alike(executor)
        return planned

    def _at(self, now_s: float) -> float:
        self._now_s = max(self._now_s, now_s)
        return self._now_s

    def _leave(self, query: Query) -> None:
        del self._waiting[query.id]
        self.policy.left(query)
        if len(self._deadlines) > 64 + 2 * len(self._waiting):
            self._deadlines = [(query.deadline_s, query.id) for query in self._waiting.values()]
            heapq.heapify(self._deadlines)

    def _end(self, work: Work) -> None:
        del self._running[work.id]
        self._running_ids.difference_update(query.id for query in work.batch.queries)

    def _check(self, queries: tuple[Query, ...], gamma: int | None) -> None:
        ids = {query.id for query in queries}
        if len(ids) != len(queries) or not ids <= self._waiting.keys():
            raise ValueError("the policy chose queries that are not waiting, or one of them twice")
        if gamma is not None and queries and gamma not in self.policy.gammas:
            raise ValueError(f"the policy chose gamma {gamma}, which is none of {self.policy.gammas}")
        if gamma is not None and not all(query.may_run_at(gamma) for query in queries):
            raise ValueError(f"the policy chose gamma {gamma} for a query that does not permit it")

    def _next_event_s(self, wait_until_s: float | None) -> float | None:
        """Returns when to ask again if nothing happens: at the policy's time, or when the next query expires."""
        times_s = [] if wait_until_s is None else [wait_until_s]
        if self._waiting:
            times_s.append(min(query.deadline_s for query in self._waiting.values()) - self._fastest_s)
        return min(times_s, default=None)


def _at(factor: float, profile: Profile) -> Profile:
    return profile if factor == 1 else profile.slowed(factor)
