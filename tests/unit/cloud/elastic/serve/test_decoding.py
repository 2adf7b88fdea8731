"""Images are decoded apart from everything else, a bounded number at a time."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import numpy as np
import pytest

from isthmus.cloud.elastic.model.executor import Image
from isthmus.cloud.elastic.serve.decoding import Decoder
from isthmus.cloud.elastic.serve.serving import Room
from isthmus.proto.errors import Busy, InvalidInput, TooLate

WAIT_S = 600.0
LATER_S = time.monotonic() + 3_600


@dataclass
class Held:
    """A decoder of one thread whose work goes on only when it is let."""

    free: threading.Event = field(default_factory=threading.Event)
    busy: threading.Event = field(default_factory=threading.Event)
    done: list[bytes] = field(default_factory=list)

    def decode(self, data: bytes) -> Image:
        self.busy.set()
        assert self.free.wait(WAIT_S)
        if data == b"broken":
            raise InvalidInput("image: broken")
        self.done.append(data)
        return np.zeros((2, 2, 3), np.uint8)


@asynccontextmanager
async def decoding(held: Held, **bounds: int) -> AsyncIterator[Decoder]:
    decoder = Decoder(held.decode, **bounds)
    try:
        yield decoder
    finally:
        held.free.set()
        await asyncio.to_thread(decoder.close)


def test_the_loop_goes_on_while_an_image_is_decoded_and_more_than_the_bound_are_refused() -> None:
    held = Held()

    async def scenario() -> None:
        async with decoding(held, max_pending=3, max_pending_bytes=10) as decoder:
            asked = [asyncio.create_task(decoder.image(data, LATER_S)) for data in (b"one", b"two", b"six")]
            assert await asyncio.to_thread(held.busy.wait, WAIT_S)
            assert (decoder.pending, decoder.pending_bytes) == (3, 9)
            with pytest.raises(Busy):
                await decoder.image(b"", LATER_S)
            held.free.set()
            for image in await asyncio.gather(*asked):
                assert image.shape == (2, 2, 3)
            while decoder.pending:
                await asyncio.sleep(0)
            with pytest.raises(Busy):
                await decoder.image(bytes(11), LATER_S)
            assert (decoder.pending, decoder.pending_bytes) == (0, 0)

    asyncio.run(asyncio.wait_for(scenario(), WAIT_S))


def test_what_nobody_waits_for_any_more_is_not_decoded() -> None:
    held = Held()

    async def scenario() -> None:
        async with decoding(held) as decoder:
            first = asyncio.create_task(decoder.image(b"first", LATER_S))
            assert await asyncio.to_thread(held.busy.wait, WAIT_S)
            left = asyncio.create_task(decoder.image(b"left", LATER_S))
            late = asyncio.create_task(decoder.image(b"late", time.monotonic()))
            broken = asyncio.create_task(decoder.image(b"broken", LATER_S))
            while decoder.pending < 4:
                await asyncio.sleep(0)
            left.cancel()
            with pytest.raises(asyncio.CancelledError):
                await left  # only then does the pool know
            held.free.set()
            await first
            with pytest.raises(TooLate):
                await late
            with pytest.raises(InvalidInput):
                await broken
            while decoder.pending:
                await asyncio.sleep(0)

    asyncio.run(asyncio.wait_for(scenario(), WAIT_S))
    assert held.done == [b"first"]


def test_room_is_bounded_and_given_back_whatever_happens() -> None:
    room = Room(10)
    with room.of(6):
        with pytest.raises(Busy), room.of(5):
            pytest.fail("there is no room")
        with pytest.raises(ValueError), room.of(4):
            raise ValueError
        assert room.taken_bytes == 6
    assert room.taken_bytes == 0
