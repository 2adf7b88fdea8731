"""Messages of a stream are read ahead: in order, to the end, and within a bound."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from isthmus.cloud.rpc.calls import Ahead
from isthmus.proto.errors import Unavailable

KIB = 1 << 10


class Raw:
    """A stream of messages that counts how many were read."""

    def __init__(self, *messages: bytes | Exception) -> None:
        self.messages = messages
        self.read = 0

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for message in self.messages:
            await asyncio.sleep(0)
            if isinstance(message, Exception):
                raise message
            self.read += 1
            yield message


async def settle() -> None:
    for _ in range(200):
        await asyncio.sleep(0)


def test_messages_come_in_order_and_the_end_stays_the_end() -> None:
    async def scenario() -> list[bytes | None]:
        ahead = Ahead(aiter(Raw(b"a", b"b", b"c")))
        return [await ahead.message() for _ in range(5)]

    assert asyncio.run(scenario()) == [b"a", b"b", b"c", None, None]


def test_what_nobody_takes_is_bounded_in_bytes() -> None:
    async def scenario() -> None:
        raw = Raw(*(bytes(10 * KIB) for _ in range(20)))
        ahead = Ahead(aiter(raw))
        await settle()
        assert raw.read == 4, "the fourth reaches the bound of 32 KiB"
        assert await ahead.message() == bytes(10 * KIB)
        await settle()
        assert raw.read == 5
        large = Raw(bytes(1 << 20), b"next")
        one = Ahead(aiter(large))
        await settle()
        assert large.read == 1
        assert len(await one.message() or b"") == 1 << 20
        assert await one.message() == b"next"

    asyncio.run(scenario())


def test_many_empty_messages_that_nobody_takes_are_bounded() -> None:
    async def scenario() -> None:
        raw = Raw(*(b"" for _ in range(5_000)))
        ahead = Ahead(aiter(raw))
        for _ in range(100):
            await settle()
        read = raw.read
        assert 0 < read < 1_000
        taken = [await ahead.message() for _ in range(5_001)]
        assert taken == [b""] * 5_000 + [None], "and none is lost"

    asyncio.run(scenario())


def test_what_reading_raises_is_raised_after_what_was_read() -> None:
    async def scenario() -> None:
        ahead = Ahead(aiter(Raw(b"a", RuntimeError("broken"))))
        await settle()
        assert await ahead.message() == b"a"
        for _ in range(2):
            with pytest.raises(RuntimeError, match="broken"):
                await ahead.message()

    asyncio.run(scenario())


def test_a_closed_one_reads_no_more() -> None:
    async def scenario() -> None:
        raw = Raw(*(bytes(40 * KIB) for _ in range(9)))
        ahead = Ahead(aiter(raw))
        await settle()
        ahead.close()
        await settle()
        assert raw.read == 1

    asyncio.run(scenario())


def test_one_that_is_stopped_gives_what_it_has_read_and_then_the_reason() -> None:
    async def scenario() -> None:
        raw = Raw(*(bytes(40 * KIB) for _ in range(9)))
        ahead = Ahead(aiter(raw))
        await settle()
        ahead.stop(Unavailable("this server stops"))
        assert len(await ahead.message() or b"") == 40 * KIB
        for _ in range(2):
            with pytest.raises(Unavailable):
                await ahead.message()
        assert raw.read == 1

    asyncio.run(scenario())


def test_who_waits_for_a_message_is_told_of_the_stop_and_a_stream_that_has_ended_is_not() -> None:
    async def silent() -> AsyncIterator[bytes]:
        await asyncio.Event().wait()
        yield b""

    async def scenario() -> None:
        ahead = Ahead(silent())
        waiting = asyncio.create_task(ahead.message())
        await settle()
        ahead.stop(Unavailable("this server stops"))
        with pytest.raises(Unavailable):
            await waiting
        ended = Ahead(aiter(Raw(b"a")))
        await settle()
        ended.stop(Unavailable("this server stops"))
        assert [await ended.message() for _ in range(2)] == [b"a", None]

    asyncio.run(scenario())
