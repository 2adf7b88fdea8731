"""The engine in real time: queries come from an event loop, batches run on a thread of their own, answers go back.

Three parties meet under one lock that is never held while a batch runs: the loop (a query comes, its caller leaves, its
time is over), the engine's thread (what to run next, what came of it), and whoever changes the tasks.
"""

import asyncio
import itertools
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Final

from isthmus.cloud.elastic.model.executor import Executor, Image, Item
from isthmus.cloud.elastic.scheduling.engine import Engine, Work
from isthmus.cloud.elastic.scheduling.query import Outcome, Query
from isthmus.cloud.elastic.serve.statistics import TaskStatistics
from isthmus.cloud.elastic.tasks.task import FloatArray, Task, expected_accuracy
from isthmus.proto.errors import Internal, IsthmusError, TooLate, Unavailable

log = logging.getLogger(__name__)

SLOW: Final = 1.5
"""Times as long as the profile says: worth telling the operator, once."""

_STOPPING: Final = "the server is stopping; try again later"


@dataclass(frozen=True, eq=False)
class Answer:
    """``queue_s``: from arrival to the start of the batch; ``run_s``: how long that ran; ``task``: as it was asked."""

    task: Task
    logits_C: FloatArray
    gamma: int
    queue_s: float
    run_s: float
    in_time: bool


@dataclass(frozen=True, eq=False)
class _Pending:
    query: Query
    item: Item
    future: asyncio.Future[Answer]


_Settled = list[tuple[asyncio.Future[Answer], Answer | IsthmusError]]


class LiveEngine:
    """``start`` once, from the loop that asks; ``stop`` once. Each ``ask`` ends once: answered, refused, cancelled."""

    def __init__(
        self,
        engine: Engine,
        executor: Executor,
        *,
        clock: Callable[[], float] = time.monotonic,
        on_start: Callable[[], None] = lambda: None,
    ) -> None:
        """``on_start`` is called first on the thread that will run the batches."""
        self._engine = engine
        self._executor = executor
        self._clock = clock
        self._on_start = on_start
        self._wake = threading.Condition()
        self._pending: dict[int, _Pending] = {}
        self._asked: Counter[str] = Counter()
        self._forgotten: set[str] = set()
        self._statistics: dict[str, TaskStatistics] = {}
        self._ids = itertools.count(1)
        self._told_slow = False
        self._stopped: str | None = "the server is starting; try again"
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="elastic-engine", daemon=True)

    @property
    def ready(self) -> bool:
        return self._stopped is None

    @property
    def gammas(self) -> tuple[int, ...]:
        return self._engine.profile.gammas

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopped = None
        self._thread.start()

    def stop(self) -> None:
        """Lets the running batch end, then refuses whatever still waits. Blocks: call it off the event loop."""
        with self._wake:
            self._stopped = _STOPPING
            self._wake.notify()
        if self._thread.ident is not None:
            self._thread.join()

    async def ask(self, task: Task, image: Image, *, arrival_s: float, latency_s: float, utility: float) -> Answer:
        """Waits for the answer to one image. ``arrival_s`` is of this engine's clock.

        Raises InvalidInput for a latency or utility that cannot be, Overloaded when too many wait, TooLate when it was
        given up unrun, Internal when its batch broke, Unavailable when the server is stopping. When the caller is
        cancelled a query that waits is dropped at once.
        """
        query = Query.asked(next(self._ids), task.name, arrival_s, latency_s, utility)
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Answer] = loop.create_future()
        with self._wake:
            if self._stopped is not None:
                raise Unavailable(self._stopped)
            self._engine.submit(query, self._clock())
            self._pending[query.id] = _Pending(query, Item(image, task), future)
            self._asked[task.name] += 1
            self._wake.notify()
        # Its own time ends the wait even while a long batch keeps the engine's thread.
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
        """From now on queries of this task's name are planned with its accuracy, as far as that is known; at the gammas
        of ``warmed`` with that."""
        with self._wake:
            profile = self._engine.profile
            others = [of for name, of in profile.accuracy.items() if name != task.name]
            self._forgotten.discard(task.name)
            expected = {**expected_accuracy(task, profile.gammas, others), **(warmed or {})}
            self._engine.use(profile.with_task(task.name, expected))

    def forget(self, task: str) -> None:
        """No more queries of ``task`` will come. Those that wait are still planned for."""
        with self._wake:
            self._forgotten.add(task)
            self._drop_forgotten(task)

    def count_evicted(self, task: Task, arrival_s: float) -> None:
        """A query of ``task`` was given up before it could be submitted, since its time was over."""
        with self._wake:
            queue_s = max(0.0, self._clock() - arrival_s)
            self._of(task.name).note(Outcome.EVICTED, queue_s=queue_s, run_s=0.0, unix_s=time.time())

    def statistics(self, task: str) -> TaskStatistics:
        """A copy, as of now."""
        with self._wake:
            known = self._statistics.get(task, TaskStatistics())
            return replace(known, outcomes=dict(known.outcomes))

    def all_statistics(self) -> dict[str, TaskStatistics]:
        """Of every task that was asked, as of now."""
        with self._wake:
            return {name: replace(known, outcomes=dict(known.outcomes)) for name, known in self._statistics.items()}

    def waiting(self) -> int:
        """Queries that wait for a batch."""
        with self._wake:
            return self._engine.waiting

    def _run(self) -> None:
        try:
            self._on_start()
            while (found := self._next_work()) is not None:
                self._execute(*found)
        except Exception:
            log.exception("the engine broke; every query is refused from now on")
            self._refuse_all("the server failed; tell its operator")
        else:
            self._refuse_all(_STOPPING)

    def _next_work(self) -> tuple[Work, list[Item]] | None:
        """Waits until there is a batch to run. None: stop."""
        with self._wake:
            while self._stopped is None:
                decision = self._engine.next_work(self._clock())
                self._evict(decision.evicted)
                if decision.work is not None:
                    return decision.work, [self._pending[query.id].item for query in decision.work.batch.queries]
                wait_s = None if decision.wait_until_s is None else max(0.0, decision.wait_until_s - self._clock())
                self._wake.wait(wait_s)
        return None

    def _execute(self, work: Work, items: list[Item]) -> None:
        logits_BC: list[FloatArray] | None = None
        try:
            logits_BC = self._executor.run(items, work.gamma)
            if len(logits_BC) != len(items):
                raise RuntimeError(f"the executor gave {len(logits_BC)} answers to {len(items)} images")
        except Exception:
            logits_BC = None
            log.exception("a batch of %d at gamma %d broke", len(items), work.gamma)
        now_s = self._clock()
        run_s = now_s - work.started_s
        settled: _Settled = []
        with self._wake:
            if logits_BC is None:
                ends = self._engine.failed(work, now_s)
            else:
                ends = self._engine.finished(work, [None] * len(items), now_s)
            for name in {query.task for query, _ in ends}:
                self._of(name).batches += 1
            for position, (query, outcome) in enumerate(ends):
                future = self._close(query, outcome, queue_s=work.started_s - query.arrival_s, run_s=run_s).future
                if logits_BC is None:
                    settled.append((future, Internal("the server failed on this batch; try again")))
                    continue
                queue_s = max(0.0, work.started_s - query.arrival_s)
                in_time = outcome is not Outcome.LATE
                task = items[position].task
                settled.append((future, Answer(task, logits_BC[position], work.gamma, queue_s, run_s, in_time)))
            pace = self._engine.pace
        self._tell(settled)
        if pace >= SLOW and not self._told_slow:
            self._told_slow = True
            log.warning(
                "batches are planned as %.1f times as long as the profile says: this machine does other work, or was "
                "measured when it was faster; 'isthmus elastic profile' measures it anew",
                pace,
            )

    def _expire(self) -> None:
        with self._wake:
            if self._stopped is None:
                self._evict(self._engine.expire(self._clock()))

    def _evict(self, queries: Sequence[Query]) -> None:
        late = "could not be answered within its latency, so it was not computed"
        self._tell([(self._close(query, Outcome.EVICTED).future, TooLate(late)) for query in queries])

    def _close(self, query: Query, outcome: Outcome, *, queue_s: float | None = None, run_s: float = 0.0) -> _Pending:
        """Under the lock, once a query: what waits for it, no longer pending."""
        pending = self._pending.pop(query.id)
        waited_s = self._clock() - query.arrival_s if queue_s is None else queue_s
        self._of(query.task).note(outcome, queue_s=max(0.0, waited_s), run_s=run_s, unix_s=time.time())
        self._asked[query.task] -= 1
        if not self._asked[query.task]:
            del self._asked[query.task]
            self._drop_forgotten(query.task)
        return pending

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
            futures = [pending.future for pending in self._pending.values()]
            self._pending.clear()
        self._tell([(future, Unavailable(why)) for future in futures])

    def _tell(self, settled: _Settled) -> None:
        if settled and self._loop is not None:
            # The loop may have ended before us: then nobody waits any more.
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(_deliver, settled)


def _deliver(settled: _Settled) -> None:
    for future, result in settled:
        if future.done():
            continue
        if isinstance(result, Answer):
            future.set_result(result)
        else:
            future.set_exception(result)
