"""Send calls: at given times (open loop), or a number of them always in flight (closed loop)."""

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import grpc

from isthmus.cloud.load.arrivals import Float64s
from isthmus.cloud.load.callers import Caller, Refused
from isthmus.cloud.load.outcomes import GOOD, Sent
from isthmus.proto.errors import NAME_KEY, Unavailable

_DRAIN_S = 1.0


async def open_all(callers: Sequence[Caller], timeout_s: float) -> None:
    """Open every connection. Raises Unavailable if the server does not answer, and what a call raises."""
    try:
        await asyncio.wait_for(asyncio.gather(*(caller.open() for caller in callers)), timeout_s)
    except TimeoutError:
        raise Unavailable(f"not all of {len(callers)} connections were open within {timeout_s:g} s") from None


async def open_loop(callers: Sequence[Caller], due_N: Float64s, timeout_s: float) -> list[Sent]:
    """Send a call at each of ``due_N`` (seconds from now), by the callers in turn, and wait for all outcomes."""
    began_s = time.perf_counter()
    calls = []
    for number, due_s in enumerate(map(float, due_N)):
        wait_s = began_s + due_s - time.perf_counter()
        # A sleep of less than a tick still lets answers in.
        await asyncio.sleep(max(0.0, wait_s))
        lag_s = time.perf_counter() - began_s - due_s
        call = _one(callers[number % len(callers)], began_s, due_s, lag_s, timeout_s)
        calls.append(asyncio.create_task(call))
    return list(await asyncio.gather(*calls))


async def closed_loop(callers: Sequence[Caller], in_flight: int, duration_s: float, timeout_s: float) -> list[Sent]:
    """Keep ``in_flight`` calls under way for ``duration_s``, each sent when the one before it has ended."""
    began_s = time.perf_counter()
    sent: list[Sent] = []

    async def lane(number: int) -> None:
        while (due_s := time.perf_counter() - began_s) < duration_s:
            sent.append(await _one(callers[number % len(callers)], began_s, due_s, 0.0, timeout_s))

    await asyncio.gather(*(lane(number) for number in range(in_flight)))
    return sent


async def _one(caller: Caller, began_s: float, due_s: float, lag_s: float, timeout_s: float) -> Sent:
    right = None
    try:
        right = await caller.call(timeout_s)
        outcome = GOOD
    except grpc.aio.AioRpcError as error:
        outcome = _name(error)
    except TimeoutError:
        outcome = "DEADLINE_EXCEEDED"
    except Refused as error:
        outcome = str(error)
    return Sent(due_s, lag_s, time.perf_counter() - began_s - due_s, outcome, right)


def _name(error: Any) -> str:
    named = dict(error.trailing_metadata() or ())
    return str(named.get(NAME_KEY) or error.code().name)
