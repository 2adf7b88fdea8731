"""The engine in real time, with an executor that tests hold in their hand: each query is answered exactly once."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import numpy as np
import pytest

from isthmus.cloud.elastic.model.executor import ExecutorLost, Item
from isthmus.cloud.elastic.policies.baselines import FixedGamma
from isthmus.cloud.elastic.policies.by_name import Choice, Fifo
from isthmus.cloud.elastic.scheduling.engine import Engine, Overloaded
from isthmus.cloud.elastic.scheduling.profile import MachineKey, Profile
from isthmus.cloud.elastic.scheduling.query import Outcome
from isthmus.cloud.elastic.serve.live import LONGEST_REST_S, REST_S, Answer, LiveEngine, rest_s
from isthmus.cloud.elastic.tasks.task import FloatArray, Task, TaskSpec, TaskWeights
from isthmus.proto.errors import Internal, InvalidInput, TooLate, Unavailable

WAIT_S = 600.0


def task(name: str = "t", accuracy: float = 0.9) -> Task:
    zeros = np.zeros((2, 4), np.float32)
    return Task(TaskSpec(name, ("no", "yes"), accuracy={0: accuracy}), TaskWeights(zeros, zeros[:, 0], {}))


def image(value: int) -> np.ndarray:
    return np.full((2, 2, 3), value, np.uint8)


@dataclass(eq=False)
class HeldExecutor:
    """Answers each image with its own first value. ``hold`` set: waits in ``run`` until it is let go."""

    free: threading.Event = field(default_factory=threading.Event)
    running: threading.Event = field(default_factory=threading.Event)
    sizes: list[int] = field(default_factory=list)
    breaks: Callable[[], None] = lambda: None

    def run(self, items: Sequence[Item], gamma: int) -> list[FloatArray]:
        self.running.set()
        assert self.free.wait(WAIT_S)
        self.sizes.append(len(items))
        self.breaks()
        return [np.array([0, item.image.flat[0]], np.float32) for item in items]


@dataclass
class Rig:
    """``later_s``: how far the engine's clock is ahead of the loop's. A test that adds to it lets time pass."""

    executor: HeldExecutor
    later_s: float = 0.0
    live: LiveEngine = field(init=False)

    def clock(self) -> float:
        return time.monotonic() + self.later_s

    def ask(self, value: int, latency_s: float = WAIT_S, of: Task | None = None) -> "asyncio.Task[Answer]":
        ask = self.live.ask(of or TASK, image(value), arrival_s=self.clock(), latency_s=latency_s, utility=1.0)
        return asyncio.create_task(ask)

    async def until_running(self) -> None:
        assert await asyncio.to_thread(self.executor.running.wait, WAIT_S)
        self.executor.running.clear()


TASK = task()
PROFILE = Profile(MachineKey("p", "cpu", 1, "fp32", "m"), (0,), (1, 8), {}, {0: (1e-4, 2e-4)})


def clock() -> float:
    return asyncio.get_running_loop().time()


@asynccontextmanager
async def rig(
    policy: Fifo | None = None,
    max_waiting: int = 8_192,
    held: bool = False,
    times_s: tuple[float, float] = (1e-4, 2e-4),
) -> AsyncIterator[Rig]:
    profile = Profile(MachineKey("p", "cpu", 1, "fp32", "m"), (0,), (1, 8), {}, {0: times_s})
    executor = HeldExecutor()
    if not held:
        executor.free.set()
    made = Rig(executor)
    live = made.live = LiveEngine(
        Engine(profile, policy or Fifo(), max_waiting=max_waiting), executor, clock=made.clock
    )
    live.plan_for(TASK)
    live.start()
    try:
        yield made
    finally:
        executor.free.set()
        await asyncio.to_thread(live.stop)


def test_a_thousand_at_once_each_get_their_own_answer() -> None:
    async def scenario() -> tuple[list[Answer], int]:
        async with rig() as on:
            answers = await asyncio.gather(*(on.ask(value % 256) for value in range(1_000)))
            return answers, sum(on.executor.sizes)

    answers, ran = asyncio.run(scenario())
    assert [int(answer.logits_C[1]) for answer in answers] == [value % 256 for value in range(1_000)]
    assert ran == 1_000
    assert all(answer.in_time and answer.gamma == 0 and answer.queue_s >= 0 for answer in answers)


def test_a_machine_much_slower_than_its_profile_is_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with rig(times_s=(0.002, 0.004)) as on:
            on.executor.breaks = lambda: time.sleep(0.06)  # the profile says 20 ms of a full batch
            await asyncio.gather(*(on.ask(value % 256) for value in range(500)))

    asyncio.run(scenario())
    assert [record.getMessage()[:7] for record in caplog.records] == ["batches"]


def test_what_waits_behind_a_long_batch_is_told_in_time_that_it_is_late() -> None:
    async def scenario() -> tuple[Answer, dict[Outcome, int]]:
        async with rig(held=True) as on:
            first = on.ask(1)
            await on.until_running()
            with pytest.raises(TooLate, match="not computed"):
                await asyncio.wait_for(on.ask(2, latency_s=0.02), WAIT_S)
            assert not first.done()
            on.executor.free.set()
            return await first, on.live.statistics("t").outcomes

    answer, outcomes = asyncio.run(scenario())
    assert answer.logits_C[1] == 1
    assert outcomes == {Outcome.EVICTED: 1, Outcome.ANSWERED_IN_TIME: 1}


def test_an_answer_that_came_late_says_so() -> None:
    async def scenario() -> Answer:
        async with rig(held=True) as on:
            asked = on.ask(1)
            await on.until_running()
            on.later_s = 2 * WAIT_S
            on.executor.free.set()
            return await asked

    answer = asyncio.run(scenario())
    assert not answer.in_time
    assert answer.logits_C[1] == 1


def test_a_caller_who_leaves_frees_its_place_at_once_and_disturbs_nobody() -> None:
    async def scenario() -> tuple[list[int], int]:
        async with rig(held=True) as on:
            first = on.ask(1)
            await on.until_running()
            waiting, leaving = on.ask(2), on.ask(3)
            while on.live.waiting() < 2:
                await asyncio.sleep(0)
            leaving.cancel()
            first.cancel()
            await asyncio.wait([leaving, first])
            assert on.live.waiting() == 1
            on.executor.free.set()
            assert (await waiting).logits_C[1] == 2
            return on.executor.sizes, on.live.waiting()

    sizes, waiting = asyncio.run(scenario())
    assert (sizes, waiting) == ([1, 1], 0)


def test_utility_is_earned_in_time_and_offered_by_every_query() -> None:
    async def scenario() -> tuple[float, float]:
        async with rig(max_waiting=5, held=True) as on:
            first = on.ask(0)
            await on.until_running()
            on.later_s = 2 * WAIT_S
            asked = [on.ask(value) for value in range(1, 8)]
            await asyncio.wait(asked, timeout=WAIT_S, return_when=asyncio.FIRST_COMPLETED)
            on.executor.free.set()
            await asyncio.gather(first, *asked, return_exceptions=True)
            on.live.count_evicted(TASK, on.clock(), 2.0, None)
            counted = on.live.statistics("t")
            return counted.earned, counted.offered

    earned, offered = asyncio.run(scenario())
    assert earned == pytest.approx(5 * 0.9), "one was late, and two did not get a place"
    assert offered == pytest.approx((8 + 2) * 0.9), "and one, of utility 2, expired before it was decoded"


def test_more_than_may_wait_are_refused_and_the_others_answered() -> None:
    async def scenario() -> list[Answer | BaseException]:
        async with rig(max_waiting=5, held=True) as on:
            first = on.ask(0)
            await on.until_running()
            asked = [on.ask(value) for value in range(1, 21)]
            refused, _ = await asyncio.wait(asked, timeout=WAIT_S, return_when=asyncio.FIRST_COMPLETED)
            assert refused
            on.executor.free.set()
            return await asyncio.gather(first, *asked, return_exceptions=True)

    results = asyncio.run(scenario())
    refused = [result for result in results if isinstance(result, Overloaded)]
    answered = [result for result in results if isinstance(result, Answer)]
    assert (len(answered), len(refused)) == (6, 15)
    assert all(error.retryable for error in refused)


def test_a_batch_that_breaks_fails_its_own_queries_only() -> None:
    async def scenario() -> tuple[Answer, int]:
        async with rig(held=True) as on:

            def breaks() -> None:
                on.executor.breaks = lambda: None
                raise MemoryError

            on.executor.breaks = breaks
            broken = on.ask(1)
            await on.until_running()
            fine = on.ask(2)
            on.executor.free.set()
            with pytest.raises(Internal):
                await broken
            return await fine, on.live.statistics("t").refused

    answer, refused = asyncio.run(scenario())
    assert (answer.logits_C[1], refused) == (2, 1)


def test_a_policy_that_breaks_ends_with_refusals_not_with_silence() -> None:
    class Broken(Fifo):
        def choose(self, now_s: float) -> Choice:
            raise RuntimeError("no plan")

    async def scenario() -> None:
        async with rig(Broken()) as on:
            for value in range(3):
                with pytest.raises(Unavailable):
                    await asyncio.wait_for(on.ask(value), WAIT_S)
            assert not on.live.ready

    asyncio.run(scenario())


def test_stopping_lets_the_running_batch_end_and_refuses_the_rest() -> None:
    async def scenario() -> list[Answer | BaseException]:
        async with rig(held=True) as on:
            first = on.ask(1)
            await on.until_running()
            rest = [on.ask(2), on.ask(3)]
            while on.live.waiting() < 2:
                await asyncio.sleep(0)
            stopping = asyncio.create_task(asyncio.to_thread(on.live.stop))
            while on.live.ready:
                await asyncio.sleep(0)
            on.executor.free.set()
            await stopping
            return await asyncio.gather(first, *rest, on.ask(4), return_exceptions=True)

    first, *rest = asyncio.run(scenario())
    assert isinstance(first, Answer)
    assert [type(error) for error in rest] == [Unavailable] * 3


@pytest.mark.parametrize("latency_s", [-1.0, 0.0, 1e9, float("nan"), float("inf")])
def test_a_latency_that_cannot_be_is_refused(latency_s: float) -> None:
    async def scenario() -> None:
        async with rig() as on:
            with pytest.raises(InvalidInput, match="latency"):
                await on.ask(1, latency_s=latency_s)
            assert (await on.ask(2)).logits_C[1] == 2

    asyncio.run(scenario())


def test_tasks_come_and_go_in_mid_traffic() -> None:
    async def scenario() -> tuple[Answer, Answer]:
        async with rig(held=True) as on:
            first = on.ask(1)
            await on.until_running()
            late = task("late")
            on.live.plan_for(late)
            asked = on.ask(2, of=late)
            while on.live.waiting() < 1:
                await asyncio.sleep(0)
            on.live.forget("late")
            on.executor.free.set()
            answers = await first, await asked
            with pytest.raises(InvalidInput, match="no task 'late'"):
                await on.ask(3, of=late)
            return answers

    first, second = asyncio.run(scenario())
    assert (first.task.name, second.task.name, second.logits_C[1]) == ("t", "late", 2)


@asynccontextmanager
async def two_executors() -> AsyncIterator[tuple[LiveEngine, list[HeldExecutor]]]:
    executors = [HeldExecutor(), HeldExecutor()]
    live = LiveEngine(Engine(PROFILE, Fifo(), executors=2), *executors)
    live.plan_for(TASK)
    live.start()
    try:
        yield live, executors
    finally:
        for executor in executors:
            executor.free.set()
        await asyncio.to_thread(live.stop)


def test_two_executors_run_two_batches_at_once() -> None:
    async def scenario() -> tuple[list[Answer], list[int]]:
        async with two_executors() as (live, executors):
            asked = []
            for value in (1, 2):
                ask = live.ask(TASK, image(value), arrival_s=clock(), latency_s=WAIT_S, utility=1.0)
                asked.append(asyncio.create_task(ask))
                until_s = time.monotonic() + WAIT_S
                while sum(executor.running.is_set() for executor in executors) < value:
                    assert time.monotonic() < until_s, "each query runs although the other executor is held"
                    await asyncio.sleep(0.001)
            for executor in executors:
                executor.free.set()
            return list(await asyncio.gather(*asked)), [sum(executor.sizes) for executor in executors]

    answers, sizes = asyncio.run(scenario())
    assert [int(answer.logits_C[1]) for answer in answers] == [1, 2]
    assert sizes == [1, 1]
    with pytest.raises(ValueError, match="plans for 2"):
        LiveEngine(Engine(PROFILE, Fifo(), executors=2), HeldExecutor())


def test_a_batch_whose_executor_failed_runs_on_another_once() -> None:
    def broken() -> None:
        raise RuntimeError("the card fell off the bus")

    async def scenario(both: bool) -> list[object]:
        async with two_executors() as (live, executors):
            executors[0].breaks = broken
            if both:
                executors[1].breaks = broken
            for executor in executors:
                executor.free.set()
            asks = [live.ask(TASK, image(n), arrival_s=clock(), latency_s=WAIT_S, utility=1.0) for n in range(40)]
            return list(await asyncio.gather(*asks, return_exceptions=True))

    answers = [each for each in asyncio.run(scenario(False)) if isinstance(each, Answer)]
    assert [int(answer.logits_C[1]) for answer in answers] == list(range(40))
    assert [type(each) for each in asyncio.run(scenario(True))] == [Internal] * 40


@dataclass(eq=False)
class OutsideExecutor(HeldExecutor):
    """An executor that can be lost. ``back`` set: it can be started again."""

    lost: bool = False
    back: threading.Event = field(default_factory=threading.Event)
    tried: int = 0
    suspended: int = 0
    closed: bool = False
    changed: Callable[[], None] = lambda: None

    def watch(self, changed: Callable[[], None]) -> None:
        self.changed = changed

    def restore(self) -> None:
        self.tried += 1
        if not self.back.is_set():
            raise ExecutorLost("the machine is gone")
        self.lost = False

    def suspend(self) -> None:
        self.suspended += 1
        self.lost = True

    def close(self) -> None:
        self.closed = True

    def leave(self) -> None:
        """Is lost from now on."""
        self.lost = True
        self.changed()

    def run(self, items: Sequence[Item], gamma: int) -> list[FloatArray]:
        answers = super().run(items, gamma)
        if self.lost:
            raise ExecutorLost("it was killed")
        return answers


@asynccontextmanager
async def outside(count: int) -> AsyncIterator[tuple[LiveEngine, list[OutsideExecutor]]]:
    executors = [OutsideExecutor() for _ in range(count)]
    live = LiveEngine(Engine(PROFILE, Fifo(), executors=count), *executors)
    live.plan_for(TASK)
    live.start()
    try:
        yield live, executors
    finally:
        for executor in executors:
            executor.free.set()
        await asyncio.to_thread(live.stop)
        assert all(executor.closed for executor in executors)


async def until(holds: Callable[[], bool]) -> None:
    until_s = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < until_s
        await asyncio.sleep(0.001)


def asked(live: LiveEngine, value: int, latency_s: float = WAIT_S) -> "asyncio.Task[Answer]":
    ask = live.ask(TASK, image(value), arrival_s=clock(), latency_s=latency_s, utility=1.0)
    return asyncio.create_task(ask)


def test_a_lost_executor_is_planned_without_until_it_is_back() -> None:
    async def scenario() -> None:
        async with outside(2) as (live, (first, second)):
            for executor in (first, second):
                executor.free.set()
            first.leave()
            await until(lambda: live.snapshot().executors == 1 and first.tried > 2)
            assert live.ready
            assert [int((await asked(live, n)).logits_C[1]) for n in range(5)] == list(range(5))
            assert not first.sizes
            first.back.set()
            await until(lambda: live.snapshot().executors == 2)
            assert live.snapshot().restarts == 1

    asyncio.run(scenario())


def test_the_batch_of_a_killed_executor_runs_on_another() -> None:
    async def scenario() -> Answer:
        async with outside(2) as (live, executors):
            answer = asked(live, 7)
            await until(lambda: any(executor.running.is_set() for executor in executors))
            (killed,) = [executor for executor in executors if executor.running.is_set()]
            killed.leave()
            for executor in executors:
                executor.free.set()
            return await answer

    assert asyncio.run(scenario()).logits_C[1] == 7


def test_the_only_executor_takes_its_batch_again_if_it_is_back_in_time() -> None:
    async def scenario() -> None:
        async with outside(1) as (live, (only,)):
            patient, hasty = asked(live, 1), asked(live, 2, latency_s=0.3)
            await until(only.running.is_set)
            only.leave()
            only.free.set()
            with pytest.raises((TooLate, Internal)):
                await hasty
            assert not live.ready and live.snapshot().executors == 0
            waiting = asked(live, 3)
            only.back.set()
            assert [int((await each).logits_C[1]) for each in (patient, waiting)] == [1, 3]
            assert live.ready

    asyncio.run(scenario())


def test_a_query_that_kills_executors_kills_two_at_most() -> None:
    async def scenario() -> int:
        async with outside(1) as (live, (only,)):
            only.breaks = only.leave
            only.back.set()
            only.free.set()
            with pytest.raises(Internal):
                await asked(live, 1)
            return len(only.sizes)

    assert asyncio.run(scenario()) == 2


def test_an_executor_that_fails_for_days_is_tried_every_half_minute() -> None:
    rests_s = [rest_s(failures) for failures in range(5_000)]
    assert rests_s[:3] == [REST_S, 2 * REST_S, 4 * REST_S]
    assert set(rests_s[10:]) == {LONGEST_REST_S}


def test_stopping_does_not_wait_for_a_lost_executor() -> None:
    async def scenario() -> None:
        async with outside(1) as (live, (only,)):
            only.leave()
            waiting = asked(live, 1)
            await until(lambda: live.snapshot().executors == 0)
            await asyncio.wait_for(asyncio.to_thread(live.stop), WAIT_S)
            with pytest.raises(Unavailable):
                await waiting

    asyncio.run(scenario())


class Gathering(FixedGamma):
    """Runs no batch of fewer than ``least`` queries: a smaller one says nothing of an executor's pace."""

    least = 8

    def choose(self, now_s: float) -> Choice:
        chosen = super().choose(now_s)
        return chosen if len(chosen.queries) >= self.least else Choice(evict=chosen.evict)


def test_of_two_idle_executors_the_faster_one_takes_the_batch_and_what_the_slower_one_could_not_answer() -> None:
    profile = Profile(MachineKey("p", "cpu", 1, "fp32", "m"), (0,), (1, 8), {}, {0: (0.1, 1.0)})
    now_s = 0.0

    async def scenario() -> tuple[list[int], list[int], dict[int, float]]:
        nonlocal now_s
        slow, fast = executors = [HeldExecutor(), HeldExecutor()]
        policy = Gathering(0)
        live = LiveEngine(Engine(profile, policy, executors=2), *executors, clock=lambda: now_s)
        live.plan_for(TASK)

        def ask(latency_s: float) -> "asyncio.Task[Answer]":
            asking = live.ask(TASK, image(1), arrival_s=now_s, latency_s=latency_s, utility=1.0)
            return asyncio.create_task(asking)

        live.start()
        try:
            first = [ask(1e3) for _ in range(8)]
            await until(slow.running.is_set)
            second = [ask(1e3) for _ in range(8)]
            await until(fast.running.is_set)
            now_s = 1.0
            fast.free.set()
            await asyncio.gather(*second)
            now_s = 3.0
            slow.free.set()
            await asyncio.gather(*first)
            policy.least = 1
            for _ in range(5):
                await until(lambda: live._idle == {0, 1})
                await ask(1e3)
            for _ in range(5):
                await ask(0.2)  # at once, so the faster one may still be busy; the other one would be late
            return slow.sizes, fast.sizes, live.snapshot().paces
        finally:
            slow.free.set()
            fast.free.set()
            await asyncio.to_thread(live.stop)

    slow_sizes, fast_sizes, paces = asyncio.run(scenario())
    assert paces[0] > 2 and paces[1] == 1
    assert slow_sizes == [8] and fast_sizes == [8, *[1] * 10]
