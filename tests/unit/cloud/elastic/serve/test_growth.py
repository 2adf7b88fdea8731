"""Executors outside the server that follow the load: suspended, started, lost, and asked for in time."""

import asyncio
from collections.abc import Callable

import pytest

from isthmus.cloud.elastic.policies.by_name import Fifo
from isthmus.cloud.elastic.scheduling.engine import Engine
from isthmus.cloud.elastic.scheduling.scaling import Scaler, ScaleRule
from isthmus.cloud.elastic.serve.growth import Growth
from isthmus.cloud.elastic.serve.live import LiveEngine
from isthmus.proto.errors import Internal
from tests.unit.cloud.elastic.serve.test_live import PROFILE, TASK, WAIT_S, HeldExecutor, OutsideExecutor, clock, image


async def until(reached: Callable[[], bool]) -> None:
    until_s = clock() + WAIT_S
    while not reached():
        assert clock() < until_s
        await asyncio.sleep(0.005)


def outside(count: int) -> tuple[LiveEngine, list[OutsideExecutor]]:
    executors = [OutsideExecutor() for _ in range(count)]
    for executor in executors:
        executor.back.set()
        executor.free.set()
    live = LiveEngine(Engine(PROFILE, Fifo(), executors=count), *executors)
    live.plan_for(TASK)
    return live, executors


async def ask(live: LiveEngine, value: int) -> int:
    answer = await live.ask(TASK, image(value), arrival_s=clock(), latency_s=WAIT_S, utility=1.0)
    return int(answer.logits_C[1])


def test_executors_that_are_not_wanted_are_suspended_and_come_back_without_a_query_lost() -> None:
    async def scenario() -> list[int]:
        live, executors = outside(3)
        live.want(1)
        live.start()
        try:
            await until(lambda: live.snapshot().executors == 1)
            assert [executor.suspended for executor in executors] == [0, 1, 1]
            assert live.ready and live.snapshot().wanted == 1
            answers = [await ask(live, value) for value in range(5)]
            assert [bool(executor.sizes) for executor in executors] == [True, False, False]
            live.want(3)
            await until(lambda: live.snapshot().executors == 3)
            answers += await asyncio.gather(*(ask(live, value) for value in range(5, 50)))
            live.want(2)
            await until(lambda: live.snapshot().executors == 2)
            answers += await asyncio.gather(*(ask(live, value) for value in range(50, 60)))
            assert live.snapshot().restarts == 0, "a suspended executor was not lost"
            assert [executor.suspended for executor in executors] == [0, 1, 2]
        finally:
            await asyncio.to_thread(live.stop)
        assert all(executor.closed for executor in executors)
        return answers

    assert asyncio.run(scenario()) == list(range(60))


def test_a_batch_that_runs_ends_before_its_executor_is_suspended() -> None:
    async def scenario() -> None:
        live, executors = outside(2)
        for executor in executors:
            executor.free.clear()
        live.start()
        try:
            asked = [asyncio.create_task(ask(live, 0))]
            await until(lambda: any(executor.running.is_set() for executor in executors))
            asked += [asyncio.create_task(ask(live, value)) for value in range(1, 20)]
            await until(lambda: all(executor.running.is_set() for executor in executors))
            live.want(1)
            await asyncio.sleep(0.05)
            assert executors[1].suspended == 0
            for executor in executors:
                executor.free.set()
            assert await asyncio.gather(*asked) == list(range(20))
            await until(lambda: executors[1].suspended == 1)
        finally:
            await asyncio.to_thread(live.stop)

    asyncio.run(scenario())


def test_an_executor_that_cannot_be_started_again_is_tried_again() -> None:
    async def scenario() -> None:
        live, executors = outside(2)
        live.want(1)
        live.start()
        try:
            await until(lambda: live.snapshot().executors == 1)
            executors[1].back.clear()
            live.want(2)
            await until(lambda: executors[1].tried >= 2)
            assert live.snapshot().executors == 1 and await ask(live, 7) == 7
            executors[1].back.set()
            await until(lambda: live.snapshot().executors == 2)
        finally:
            await asyncio.to_thread(live.stop)

    asyncio.run(scenario())


def test_a_failing_executor_leaves_work_to_others_only_if_there_are_some(monkeypatch: pytest.MonkeyPatch) -> None:
    rested: list[int] = []
    monkeypatch.setattr(LiveEngine, "_rest", lambda self, failures: rested.append(failures))

    def broken() -> None:
        raise RuntimeError("no memory left")

    async def scenario() -> None:
        live, executors = outside(2)
        live.want(1)
        live.start()
        try:
            await until(lambda: live.snapshot().executors == 1)
            executors[0].breaks = broken
            for value in range(3):
                with pytest.raises(Internal):
                    await ask(live, value)
            assert rested == [], "the other one is suspended, so nobody could take the work"
            executors[0].breaks = lambda: None
            assert await ask(live, 7) == 7
        finally:
            await asyncio.to_thread(live.stop)

    asyncio.run(scenario())


def test_numbers_that_cannot_be_are_refused() -> None:
    live, _ = outside(2)
    for wrong in (0, 3):
        with pytest.raises(ValueError, match=f"{wrong} executors are wanted of 2"):
            live.want(wrong)
    inside = LiveEngine(Engine(PROFILE, Fifo(), executors=2), OutsideExecutor(), HeldExecutor())
    with pytest.raises(ValueError, match="thread of the server cannot be suspended"):
        inside.want(1)


def test_the_load_starts_executors_and_its_end_suspends_them() -> None:
    """The scaler's clock is the test's: a second passes with each hundred queries, then a minute at each look."""

    async def scenario() -> list[int]:
        live, _ = outside(3)
        now_s = 0.0
        # One image is 0.1 s of an executor; batches in this test take no time.
        scaler = Scaler(ScaleRule(1, 3), PROFILE.slowed(4_000), now_s)
        growth = Growth(live, scaler, every_s=0.02, clock=lambda: now_s)
        live.start()
        growth.start()
        wanted = []
        try:
            await until(lambda: live.snapshot().executors == 1)
            while live.snapshot().wanted < 3:
                await asyncio.gather(*(ask(live, value) for value in range(100)))
                now_s += 1.0
            wanted.append(live.snapshot().wanted)
            await until(lambda: live.snapshot().executors == 3)
            while live.snapshot().executors > 1:
                now_s += 60.0
                await asyncio.sleep(0.02)
            wanted.append(live.snapshot().wanted)
            assert await ask(live, 5) == 5
        finally:
            await asyncio.to_thread(growth.stop)
            await asyncio.to_thread(live.stop)
        return wanted

    assert asyncio.run(scenario()) == [3, 1]
