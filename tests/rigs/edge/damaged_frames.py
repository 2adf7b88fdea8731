"""Feature frames through a link that flips bits: which of the damaged ones are accepted."""

import asyncio
import random
from dataclasses import dataclass

import numpy as np

from isthmus.link.model import Direction, Phase
from isthmus.link.proxy import FaultyLink
from isthmus.link.script import Script
from isthmus.proto.codec import pack_frame, unpack_frame
from isthmus.proto.errors import BadFrame
from isthmus.proto.messages import FeatureFrame, Features, NumberType, compressed_width

WIDTH = 24
RATIOS = (1.0, 3.0)
BATCH = 2_000
"""Frames on the way before their damage is looked at."""


@dataclass
class Frames:
    """``accepted``: damaged frames that were read as frames. The others were refused or came undamaged."""

    sent: int = 0
    damaged: int = 0
    accepted: int = 0
    refused_undamaged: int = 0


def damaged_frames(wanted: int, *, seed: int = 0, flip_every_bytes: float = 60.0) -> Frames:
    """Send frames until ``wanted`` of them have arrived damaged.

    Every frame has a known length, so that damage cannot shift where the next one begins.
    """
    return asyncio.run(_run(wanted, seed, flip_every_bytes))


async def _run(wanted: int, seed: int, flip_every_bytes: float) -> Frames:
    found, rng = Frames(), random.Random(seed)
    arrived: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Queue()
    server = await asyncio.start_server(lambda *ends: arrived.put_nowait(ends), "127.0.0.1", 0)
    script = Script(up=Direction((Phase(corrupt_every_bytes=flip_every_bytes),)), seed=seed)
    link = FaultyLink(script, "127.0.0.1", server.sockets[0].getsockname()[1])
    await link.start()
    host, port = link.address.rsplit(":", 1)
    _, writer = await asyncio.open_connection(host, int(port))
    reader, back = await arrived.get()
    try:
        while found.damaged < wanted:
            frames = [_frame(rng) for _ in range(BATCH)]
            writer.write(b"".join(frames))
            for frame in frames:
                _look(frame, await reader.readexactly(len(frame)), found)
    finally:
        writer.close()
        back.close()  # and kept until here: a writer that nothing names closes its connection
        await link.close()
        server.close()
    return found


def _look(sent: bytes, came: bytes, found: Frames) -> None:
    found.sent += 1
    found.damaged += came != sent
    try:
        unpack_frame(came, feature_width=WIDTH, ratios=RATIOS)
    except BadFrame:
        found.refused_undamaged += came == sent
    else:
        found.accepted += came != sent


def _frame(rng: random.Random) -> bytes:
    ratio = rng.choice(RATIOS)
    values_W = np.array([rng.gauss(0, 1) for _ in range(compressed_width(WIDTH, ratio))], np.float32)
    sides = rng.choice(((values_W, values_W[::-1]), (values_W, None), (None, values_W)))
    return pack_frame(FeatureFrame(Features(*sides), ratio, rng.choice(tuple(NumberType))))
