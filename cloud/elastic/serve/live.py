"""Runs the engine in real time: queries come from an event loop, and batches run on a thread of their own.

Three parties share one lock, which is never held while a batch runs: the event loop (a query arrives, its caller
leaves, or it expires), the threads of the executors (each gets work and reports results), and the code that changes the
tasks. Of the executors that wait for work the fastest gets the next batch. If one of several executors fails on a
batch, the queries that can still be in time run once more. An executor outside this process that is lost is started
again, and the plans do without it meanwhile. Executors that are not wanted now are suspended (``want``).
"""

import asyncio
import itertools
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from isthmus.cloud.elastic.model.executor import Executor, ExecutorLost, Image, Item, Supervised
from isthmus.cloud.elastic.scheduling.engine import Engine, Overloaded, Work
from isthmus.cloud.elastic.scheduling.levels import fewer_of, gamma_of
from isthmus.cloud.elastic.scheduling.query import IN_TIME, Outcome, Query, permitted
from isthmus.cloud.elastic.serve.crew import Crew, is_lost
from isthmus.cloud.elastic.serve.statistics import BATCH_SIZES, Snapshot, TaskStatistics
from isthmus.cloud.elastic.tasks.task import FloatArray, Task, expected_accuracy
from isthmus.cloud.histogram import Histogram
from isthmus.proto.errors import Internal, IsthmusError, TooLate, Unavailable

log = logging.getLogger(__name__)

SLOW: Final = 1.5
"""If batches take this many times as long as the profile says, a warning is logged once per executor."""

REST_S: Final = 0.05
LONGEST_REST_S: Final = 30.0
"""An executor that is lost, or one of several that fails, rests before its next batch: twice as long after each failure
in a row."""

_STOPPING: Final = "the server is stopping; try again later"


@dataclass(frozen=True, eq=False)
class Answer:
    """The answer to one image.

    ``experts`` is how many experts each token used; 0: the model has none.
    ``queue_s`` is the time from arrival to the start of the batch, and ``run_s`` the time of the batch. ``task`` is the
    task as it was when the query arrived.
    """

    task: Task
    logits_C: FloatArray
    gamma: int
    queue_s: float
    run_s: float
    in_time: bool
    experts: int = 0


@dataclass(frozen=True, eq=False)
class _Pending:
    query: Query
    item: Item
    future: asyncio.Future[Answer]


_Settled = list[tuple[asyncio.Future[Answer], Answer | IsthmusError]]


class LiveEngine:
    """Call ``start`` once, from the event loop that asks, and ``stop`` once.

    Each ``ask`` ends exactly once: answered, refused or cancelled.
    """

    def __init__(
        self,
        engine: Engine,
        *executors: Executor,
        clock: Callable[[], float] = time.monotonic,
        on_start: Callable[[], None] = lambda: None,
    ) -> None:
        """Each executor runs batches on a thread of its own. ``on_start`` is called on each, before its first batch.

        Raises ValueError if the engine plans for another number of executors.
        """
        if len(executors) != engine.executors:
            raise ValueError(f"the engine plans for {engine.executors} executors and was given {len(executors)}")
        self._engine = engine
        self._clock = clock
        self._on_start = on_start
        self._wake = threading.Condition()
        self._pending: dict[int, _Pending] = {}
        self._asked: Counter[str] = Counter()
        self._forgotten: set[str] = set()
        self._statistics: dict[str, TaskStatistics] = {}
        self._gammas: Counter[int] = Counter()
        self._experts: Counter[int] = Counter()
        self._batch_images, self._batch_s = Histogram(BATCH_SIZES), Histogram()
        self._ids = itertools.count(1)
        self._warned_slow: set[int] = set()
        self._refused = 0
        """Queries that were refused because too many waited."""
        self._stopped: str | None = "the server is starting; try again"
        self._loop: asyncio.AbstractEventLoop | None = None
        self._crew = Crew(executors)
        self._idle: set[int] = set()
        """Executors whose threads wait for work, by number."""
        self._threads = [
            threading.Thread(target=self._run, args=(number, executor), name=f"elastic-executor-{number}", daemon=True)
            for number, executor in enumerate(executors)
        ]

    @property
    def ready(self) -> bool:
        """Whether queries are accepted, and an executor is there to run them."""
        return self._stopped is None and bool(self._crew.able)

    @property
    def gammas(self) -> tuple[int, ...]:
        """The gammas of the profile, ascending, each once."""
        return tuple(sorted({gamma_of(level) for level in self._engine.profile.gammas}))

    def start(self) -> None:
        """Starts the executors' threads and accepts queries from now on."""
        self._loop = asyncio.get_running_loop()
        self._stopped = None
        for executor in self._crew.supervised:
            executor.watch(self._noticed)
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Waits for the running batches, then refuses all waiting queries. It blocks: call it off the event loop."""
        with self._wake:
            self._stopped = _STOPPING
            self._wake.notify_all()
        for executor in self._crew.supervised:
            if executor.lost:  # otherwise its thread would wait until it has started
                executor.close()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()
        for executor in self._crew.supervised:
            executor.close()

    def want(self, executors: int) -> None:
        """Runs batches on the first ``executors`` from now on. The others end their batch and are suspended.

        Raises ValueError as ``Crew.want``.
        """
        with self._wake:
            self._crew.want(executors)
            self._wake.notify_all()

    def pressure(self) -> tuple[int, int, float]:
        """Returns (images that arrived so far, images that wait, time of a batch as a multiple of the profile's)."""
        with self._wake:
            arrived = self._engine.outcomes.total() + len(self._pending) + self._refused
            return arrived, self._engine.waiting, self._engine.pace

    def permitted(self, task: Task, gamma: int | None, min_accuracy: float | None) -> frozenset[int] | None:
        """Returns the gammas that a caller's wishes permit (``query.permitted``). Raises InvalidInput."""
        if gamma is None and min_accuracy is None:
            return None
        with self._wake:
            accuracy = self._engine.profile.accuracy.get(task.name, {})
        return permitted(task.name, accuracy, gamma=gamma, min_accuracy=min_accuracy)

    async def ask(
        self,
        task: Task,
        image: Image,
        *,
        arrival_s: float,
        latency_s: float,
        utility: float,
        gammas: frozenset[int] | None = None,
    ) -> Answer:
        """Waits for the answer to one image. ``arrival_s`` is a time of this engine's clock.

        ``gammas`` are the only gammas at which it may run; None: any.

        Raises InvalidInput for an impossible latency or utility, Overloaded if too many queries wait, TooLate if the
        query was evicted, Internal if its batch failed, and Unavailable if the server is stopping. If the caller is
        cancelled, a waiting query is dropped at once.
        """
        query = Query.asked(next(self._ids), task.name, arrival_s, latency_s, utility, gammas)
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Answer] = loop.create_future()
        with self._wake:
            if self._stopped is not None:
                raise Unavailable(self._stopped)
            try:
                self._engine.submit(query, self._clock())
            except Overloaded:
                self._refused += 1
                self._of(task.name).overloaded += 1
                self._of(task.name).offered += self._worth(task.name, utility, gammas)
                raise
            self._pending[query.id] = _Pending(query, Item(image, task), future)
            self._of(task.name)  # a task has its statistics from its first query on
            self._asked[task.name] += 1
            self._wake.notify_all()  # a notified executor may be resting
        # The timer ends the wait at the deadline, even while a long batch occupies the engine's thread.
        timer = loop.call_later(max(0.0, query.deadline_s - self._clock()), self._expire)
        try:
            return await future
        except asyncio.CancelledError:
            with self._wake:
                if query.id in self._pending and self._engine.cancel(query.id) is not None:
                    self._close(query, Outcome.EVICTED)
            raise
        finally:
            timer.cancel()

    def plan_for(self, task: Task, warmed: Mapping[int, float] | None = None) -> None:
        """Plans queries of this task's name with its expected accuracy from now on.

        At the gammas in ``warmed``, that accuracy is used instead.
        """
        with self._wake:
            profile = self._engine.profile
            others = [of for name, of in profile.accuracy.items() if name != task.name]
            self._forgotten.discard(task.name)
            expected = {**expected_accuracy(task, profile.gammas, others), **(warmed or {})}
            self._engine.use(profile.with_task(task.name, expected))

    def forget(self, task: str) -> None:
        """Removes ``task`` from the plans as soon as none of its queries waits or runs. No more may be submitted."""
        with self._wake:
            self._forgotten.add(task)
            self._drop_forgotten(task)

    def count_evicted(self, task: Task, arrival_s: float, utility: float, gammas: frozenset[int] | None) -> None:
        """Counts a query of ``task`` that expired before it was submitted."""
        with self._wake:
            self._of(task.name).offered += self._worth(task.name, utility, gammas)
            queue_s = max(0.0, self._clock() - arrival_s)
            self._of(task.name).note(Outcome.EVICTED, queue_s=queue_s, run_s=0.0, unix_s=time.time())

    def statistics(self, task: str) -> TaskStatistics:
        """Returns a copy of the task's statistics."""
        with self._wake:
            return self._statistics.get(task, TaskStatistics()).copy()

    def snapshot(self) -> Snapshot:
        """Returns a copy of all that was counted, of one moment."""
        with self._wake:
            return Snapshot(
                tasks={name: known.copy() for name, known in self._statistics.items()},
                pending=dict(self._asked),
                gammas=dict(self._gammas),
                experts=dict(self._experts),
                batch_images=self._batch_images.copy(),
                batch_s=self._batch_s.copy(),
                waiting=self._engine.waiting,
                running=self._engine.running,
                executors=len(self._crew.able),
                wanted=self._crew.wanted,
                restarts=self._crew.restarts,
                pace=self._engine.pace,
                paces={number: self._engine.pace_of(number) for number in self._crew.able},
            )

    def idle(self) -> bool:
        """Returns whether no query waits for a batch or runs."""
        with self._wake:
            return not self._pending

    def waiting(self) -> int:
        """Returns the number of queries that wait for a batch."""
        with self._wake:
            return self._engine.waiting

    def _run(self, number: int, executor: Executor) -> None:
        try:
            self._on_start()
            failures = 0
            while self._stopped is None:
                if self._crew.surplus(executor):
                    self._suspend(executor)
                    failures = 0
                elif is_lost(executor):
                    self._restore(executor, failures)
                    failures += 1
                elif (found := self._next_work(number, executor)) is not None:
                    failures = 0 if self._execute(executor, *found) else failures + 1
                    if failures and len(self._crew.able) > 1:
                        self._rest(failures)
        except Exception:
            log.exception("the engine failed; every query is refused from now on")
            self._refuse_all("the server failed; ask its operator to restart it")
        else:
            self._refuse_all(_STOPPING)

    def _next_work(self, number: int, executor: Executor) -> tuple[Work, list[Item]] | None:
        """Waits until there is a batch to run, and no faster executor waits for one.

        Returns None if the engine is to stop, or the executor is lost or not wanted.
        """
        with self._wake:
            self._idle.add(number)
            try:
                while self._stopped is None and not is_lost(executor) and not self._crew.surplus(executor):
                    wait_s = None
                    if number == self._engine.fastest(self._idle):
                        decision = self._engine.next_work(self._clock(), number)
                        self._evict(decision.evicted)
                        if decision.work is not None:
                            items = [self._pending[query.id].item for query in decision.work.batch.queries]
                            return decision.work, items
                        if decision.wait_until_s is not None:
                            wait_s = max(0.0, decision.wait_until_s - self._clock())
                    self._wake.wait(wait_s)
            finally:
                self._idle.discard(number)
                self._wake.notify_all()  # the next fastest may ask now
        return None

    def _noticed(self) -> None:
        """Wakes the threads: an executor is lost."""
        with self._wake:
            self._wake.notify_all()

    def _suspend(self, executor: Executor) -> None:
        """Ends an executor that is not wanted, and waits until it is."""
        assert isinstance(executor, Supervised), "only these can be suspended"
        with self._wake:
            self._crew.note_out(executor, suspended=True)
            self._plan_for_able()
        executor.suspend()
        with self._wake:
            while self._stopped is None and self._crew.surplus(executor):
                self._wake.wait()

    def _restore(self, executor: Executor, failures: int) -> None:
        """Plans without a lost executor, and starts it again: after a rest, unless it was suspended."""
        with self._wake:
            self._crew.note_out(executor)
            self._plan_for_able()
            suspended = self._crew.was_suspended(executor)
        if failures or not suspended:
            self._rest(failures)
        if self._stopped is not None:
            return
        assert isinstance(executor, Supervised), "only these are lost"
        try:
            executor.restore()
        except (ExecutorLost, RuntimeError, OSError) as error:
            if self._stopped is None:
                log.error("an executor could not be started: %s", error)
            return
        with self._wake:
            self._crew.note_back(executor)
            self._plan_for_able()
        log.info("an executor that was %s runs again", "suspended" if suspended else "lost")

    def _plan_for_able(self) -> None:
        # Without any executor the plans stay those for the last ones. Queries then expire.
        if self._crew.able:
            self._engine.count_on(self._crew.able)

    def _rest(self, failures: int) -> None:
        """Leaves the work to the other executors for a while."""
        until_s = time.monotonic() + rest_s(failures)
        with self._wake:
            while self._stopped is None and (left_s := until_s - time.monotonic()) > 0:
                self._wake.wait(left_s)

    def _execute(self, executor: Executor, work: Work, items: list[Item]) -> bool:
        """Runs a batch and delivers its answers. Returns whether it ran."""
        logits_BC: list[FloatArray] | None = None
        gone = False
        try:
            logits_BC = executor.run(items, work.gamma)
            if len(logits_BC) != len(items):
                raise RuntimeError(f"the executor returned {len(logits_BC)} answers for {len(items)} images")
        except Exception as error:
            logits_BC = None
            gone = is_lost(executor)
            why = "its executor is lost" if gone else "it raised"
            log.error("a batch of %d images at gamma %d failed: %s", len(items), work.gamma, why, exc_info=error)
        now_s = self._clock()
        run_s = now_s - work.started_s
        settled: _Settled = []
        with self._wake:
            usual = self._engine.profile.experts
            experts = usual - fewer_of(work.gamma) if usual else 0
            if logits_BC is None:
                again = (gone or len(self._crew.all) > 1) and self._stopped is None
                ends = self._engine.lost(work, now_s) if again else self._engine.failed(work, now_s)
            else:
                ends = self._engine.finished(work, [None] * len(items), now_s)
                self._gammas[gamma_of(work.gamma)] += len(items)
                if experts:
                    self._experts[experts] += len(items)
                self._batch_images.note(len(items))
                self._batch_s.note(run_s)
            self._wake.notify_all()  # queries wait again, or another executor is the fastest now
            for name in {query.task for query, _ in ends}:
                self._of(name).batches += 1
            for position, (query, outcome) in enumerate(ends):
                queued_s = work.started_s - query.arrival_s
                future = self._close(query, outcome, queue_s=queued_s, run_s=run_s, gamma=work.gamma).future
                if logits_BC is None:
                    settled.append((future, Internal("the server failed on this batch; try again")))
                    continue
                queue_s = max(0.0, work.started_s - query.arrival_s)
                in_time = outcome is not Outcome.LATE
                task, logits_C = items[position].task, logits_BC[position]
                answer = Answer(task, logits_C, gamma_of(work.gamma), queue_s, run_s, in_time, experts)
                settled.append((future, answer))
            pace = self._engine.pace_of(work.executor)
        self._deliver(settled)
        if pace >= SLOW and work.executor not in self._warned_slow:
            self._warned_slow.add(work.executor)
            log.warning(
                "batches of executor %d take %.1f times as long as the profile says: its machine is busy with other "
                "work, or was measured when it was faster; 'isthmus elastic profile' measures it again",
                work.executor,
                pace,
            )
        return logits_BC is not None

    def _expire(self) -> None:
        with self._wake:
            if self._stopped is None:
                self._evict(self._engine.expire(self._clock()))

    def _evict(self, queries: Sequence[Query]) -> None:
        late = "could not be answered within its latency, so it was not computed"
        self._deliver([(self._close(query, Outcome.EVICTED).future, TooLate(late)) for query in queries])

    def _close(
        self,
        query: Query,
        outcome: Outcome,
        *,
        queue_s: float | None = None,
        run_s: float = 0.0,
        gamma: int | None = None,
    ) -> _Pending:
        """Notes the query's outcome and removes it from the pending ones. Called under the lock, once per query."""
        pending = self._pending.pop(query.id)
        waited_s = self._clock() - query.arrival_s if queue_s is None else queue_s
        counted = self._of(query.task)
        counted.note(outcome, queue_s=max(0.0, waited_s), run_s=run_s, unix_s=time.time())
        counted.offered += self._worth(query.task, query.utility, query.gammas)
        if outcome in IN_TIME and gamma is not None:
            counted.earned += self._worth(query.task, query.utility, frozenset({gamma}))
        self._asked[query.task] -= 1
        if not self._asked[query.task]:
            del self._asked[query.task]
            self._drop_forgotten(query.task)
        return pending

    def _worth(self, task: str, utility: float, gammas: frozenset[int] | None) -> float:
        """Returns the expected utility of a query in time, at the best of ``gammas``; None: of all."""
        accuracy = self._engine.profile.accuracy.get(task, {})
        return utility * max(
            (share for gamma, share in accuracy.items() if gammas is None or gamma in gammas), default=0
        )

    def _drop_forgotten(self, task: str) -> None:
        if task in self._forgotten and task not in self._asked:
            self._forgotten.discard(task)
            self._statistics.pop(task, None)
            self._engine.use(self._engine.profile.without_task(task))

    def _of(self, task: str) -> TaskStatistics:
        return self._statistics.setdefault(task, TaskStatistics())

    def _refuse_all(self, why: str) -> None:
        with self._wake:
            self._stopped = why
            self._wake.notify_all()
            futures = [pending.future for pending in self._pending.values()]
            self._pending.clear()
        self._deliver([(future, Unavailable(why)) for future in futures])

    def _deliver(self, settled: _Settled) -> None:
        if settled and self._loop is not None:
            # The loop may have ended already; then nobody waits for these answers.
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(_resolve, settled)


def rest_s(failures: int) -> float:
    """Returns how long an executor rests after so many failures in a row."""
    # The exponent is bounded: an executor may fail for days, and a float ends at 2 ** 1024.
    return min(LONGEST_REST_S, REST_S * 2.0 ** min(failures, 16))


def _resolve(settled: _Settled) -> None:
    for future, result in settled:
        if future.done():
            continue
        if isinstance(result, Answer):
            future.set_result(result)
        else:
            future.set_exception(result)
