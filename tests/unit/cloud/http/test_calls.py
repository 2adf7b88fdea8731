"""A stream of events to a client that reads nothing, and to one that leaves: the request ends, once."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from isthmus.cloud.http import calls
from isthmus.cloud.http.calls import EventStream


class Ends:
    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> None:
        self.count += 1


async def events() -> AsyncIterator[str]:
    for number in range(1_000):
        yield str(number)


def test_a_client_that_reads_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "UNREAD_S", 0.01)
    ends, sent = Ends(), 0

    async def send(message: Any) -> None:
        nonlocal sent
        sent += 1
        if sent > 3:  # what the socket's buffer holds
            await asyncio.Event().wait()

    async def receive() -> Any:
        await asyncio.Event().wait()

    asyncio.run(asyncio.wait_for(EventStream(events(), ends)({"type": "http"}, receive, send), 30))
    assert ends.count == 1 and sent == 4


def test_a_client_that_leaves_ends_its_request(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = Ends()

    async def send(message: Any) -> None:
        await asyncio.sleep(0)

    async def receive() -> Any:
        return {"type": "http.disconnect"}

    asyncio.run(asyncio.wait_for(EventStream(events(), ends)({"type": "http"}, receive, send), 30))
    assert ends.count == 1
