"""Messages of a stream are read one ahead: in order, to the end, and without a task between gRPC and the taker."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from isthmus.cloud.rpc.calls import Ahead, first_message
from isthmus.proto.errors import TooLate


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


def test_one_message_at_most_is_read_ahead() -> None:
    async def scenario() -> None:
        raw = Raw(*(bytes([number]) for number in range(5)))
        ahead = Ahead(aiter(raw))
        await settle()
        assert raw.read <= 1
        for number in range(5):
            assert await ahead.message() == bytes([number])
            await settle()
            assert raw.read <= number + 2
        assert await ahead.message() is None

    asyncio.run(scenario())


def test_a_first_message_is_awaited_for_a_bounded_time_and_its_read_goes_on() -> None:
    async def scenario() -> None:
        assert await first_message(aiter(Raw(b"a")), 60.0) == b"a"
        assert await first_message(aiter(Raw()), None) is None
        with pytest.raises(RuntimeError, match="broken"):
            await first_message(aiter(Raw(RuntimeError("broken"))), 60.0)
        raw = Gated()
        with pytest.raises(TooLate, match=r"no message arrived within 0\.01 s"):
            await first_message(aiter(raw), 0.01)
        assert not raw.gates[0].cancelled()
        raw.gates[0].set_result(b"a")
        await settle()
        taker = asyncio.ensure_future(first_message(aiter(Gated()), None))
        await settle()
        taker.cancel()
        with pytest.raises(asyncio.CancelledError):
            await taker

    asyncio.run(scenario())


class Gated:
    """A stream whose messages arrive when the test says so, as futures of gRPC do."""

    def __init__(self) -> None:
        self.gates = [asyncio.get_running_loop().create_future() for _ in range(3)]

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for gate in self.gates:
            yield await gate


class Ending(Gated):
    """A stream that takes an error of its future for its end, as gRPC does when a call is cancelled or lost."""

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            async for message in super().__aiter__():
                yield message
        except RuntimeError:
            return


def test_an_error_of_a_future_reaches_the_reader_which_may_make_an_end_of_it() -> None:
    async def scenario() -> None:
        raw = Ending()
        ahead = Ahead(aiter(raw))
        first = asyncio.ensure_future(ahead.message())
        await settle()
        raw.gates[0].set_result(b"a")
        assert await first == b"a"
        last = asyncio.ensure_future(ahead.message())
        await settle()
        raw.gates[1].set_exception(RuntimeError("the call is gone"))
        assert await last is None
        gone = Ending()
        only = asyncio.ensure_future(first_message(aiter(gone), 60.0))
        await settle()
        gone.gates[0].set_exception(RuntimeError("the call is gone"))
        assert await only is None

    asyncio.run(scenario())


def test_the_read_of_a_taker_that_is_cancelled_goes_on_and_no_message_is_lost() -> None:
    async def scenario() -> None:
        raw = Gated()
        ahead = Ahead(aiter(raw))
        for late in (False, True):
            taker = asyncio.ensure_future(ahead.message())
            await settle()
            if late:
                raw.gates[0].set_result(b"a")  # in the same turn: the wake-up is on its way
            taker.cancel("revoked")
            with pytest.raises(asyncio.CancelledError):
                await taker
            assert not raw.gates[0].cancelled()
        assert await ahead.message() == b"a"
        both = asyncio.ensure_future(ahead.message())
        await settle()
        raw.gates[1].set_result(b"b")
        assert await both == b"b"
        ahead.close()
        await settle()
        assert not raw.gates[2].cancelled(), "gRPC may still write to the buffer of a read"
        raw.gates[2].set_result(b"c")
        await settle()
        assert await ahead.message() is None

    asyncio.run(scenario())


def test_a_message_that_has_arrived_is_taken_in_the_next_turn_of_the_loop() -> None:
    async def scenario() -> None:
        raw = Gated()
        ahead = Ahead(aiter(raw))
        taker = asyncio.ensure_future(ahead.message())
        await settle()
        raw.gates[0].set_result(b"a")
        await asyncio.sleep(0)
        assert taker.done(), "no other task had to run first"
        raw.gates[1].set_result(b"b")
        assert await ahead.message() == b"b"
        raw.gates[2].set_exception(RuntimeError("broken"))
        with pytest.raises(RuntimeError, match="broken"):
            await ahead.message()

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
        raw = Raw(*(b"x" for _ in range(9)))
        ahead = Ahead(aiter(raw))
        await settle()
        ahead.close()
        await settle()
        assert raw.read <= 1
        assert await ahead.message() is None

    asyncio.run(scenario())
