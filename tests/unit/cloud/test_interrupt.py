"""Places for unknown callers: bounded, fair between connections, and patient with those that ask too much."""

import asyncio
from contextlib import AsyncExitStack

import pytest

from isthmus.cloud.rpc.interrupt import OpenCalls, Patience, Places
from isthmus.proto.errors import Busy, Unauthenticated
from tests.rigs.project.patience import HANGS_S, reached


async def holding(places: Places, connection: str) -> "asyncio.Task[None]":
    """A task that holds a place until it is ended."""
    began = asyncio.Event()

    async def hold() -> None:
        async with places.place(connection):
            began.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(hold())
    await began.wait()
    return task


def test_the_fullest_connection_loses_its_oldest() -> None:
    async def scenario() -> None:
        places = Places(3)
        first, second = await holding(places, "greedy"), await holding(places, "greedy")
        other = await holding(places, "modest")
        newcomer = await holding(places, "new")
        with pytest.raises(Busy):
            await first
        for task in (second, other, newcomer):
            assert not task.done()
            task.cancel()
        await asyncio.gather(second, other, newcomer, return_exceptions=True)
        assert not places._lanes

    asyncio.run(scenario())


def test_what_a_connection_asks_beyond_its_share_waits_and_is_refused() -> None:
    async def scenario() -> None:
        places = Places(9, per_connection=2, most_parked=1, park_s=HANGS_S)
        held = [await holding(places, "greedy") for _ in range(2)]
        parked = asyncio.create_task(holding(places, "greedy"))
        await reached(lambda: places._parked == 1)
        with pytest.raises(Busy):  # at once, because one is parked already
            async with places.place("greedy"):
                pass
        assert not parked.done()
        held[0].cancel()
        held.append(await parked)  # a place was free in time
        places._park_s = 0.01
        with pytest.raises(Busy):  # after a moment, because no place was free in time
            async with places.place("greedy"):
                pass
        for task in held:
            task.cancel()
        await asyncio.gather(*held, return_exceptions=True)

    asyncio.run(scenario())


def test_a_cancelled_caller_is_cancelled_and_not_busy() -> None:
    async def scenario() -> None:
        task = await holding(Places(1), "one")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(scenario())


def test_open_calls_are_counted_and_ended_by_caller() -> None:
    async def scenario() -> None:
        calls = OpenCalls()
        async with AsyncExitStack() as stack:
            for who in ("a", "a", "b"):
                await stack.enter_async_context(calls.open(who))
            assert (len(calls), calls.of("a"), calls.callers) == (3, 2, ("a", "b"))
        assert (len(calls), calls.callers) == (0, ())
        with pytest.raises(Unauthenticated):
            async with calls.open("a"):
                calls.end(["a", "nobody"], Unauthenticated("revoked"))
                await asyncio.Event().wait()

    asyncio.run(scenario())


def test_endless_calls_can_be_ended_alone() -> None:
    async def scenario() -> None:
        calls = OpenCalls()
        async with calls.open("a"):
            with pytest.raises(Unauthenticated):
                async with calls.open("a", endless=True):
                    calls.close(Unauthenticated("out"))
                    await asyncio.Event().wait()
            calls.close(Unauthenticated("out"))
            await asyncio.sleep(0)
            assert calls.of("a") == 1, "the other call goes on"
        with pytest.raises(Unauthenticated):  # it had arrived, and its caller is known only now
            async with calls.open("a", endless=True):
                pass
        async with calls.open("a"):
            assert calls.of("a") == 1

    asyncio.run(scenario())


def test_patience_ends_with_many_refusals_and_returns() -> None:
    now_s = 0.0
    patience = Patience(lambda: now_s)
    assert [patience.is_over("one") for _ in range(33)] == [False] * 32 + [True]
    assert not patience.is_over("other")
    now_s = 11.0
    assert not patience.is_over("one")


def test_those_who_ask_are_told_that_the_server_stops() -> None:
    async def scenario() -> tuple[list[str], list[str]]:
        calls, told, later = OpenCalls(), list[str](), list[str]()
        with calls.telling(lambda error: told.append(str(error))):
            with calls.telling(lambda error: told.append("this one has ended")):
                pass
            assert not told
            calls.close(Unauthenticated("out"))
        with calls.telling(lambda error: later.append(str(error))):
            return told, later

    assert asyncio.run(scenario()) == (["out"], ["out"])
