"""A TCP proxy that treats what passes as a script says. The model decides when bytes arrive; this file moves them.

Memory is bounded: a direction of a connection holds at most ``_QUEUE_PACKETS`` packets, and then reads no more, so that
TCP slows the sender down as on a real link.
"""

import asyncio
import contextlib
import math
import socket
import struct
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Final, Literal, NoReturn

from isthmus.link.model import (
    PACKET_BYTES,
    Direction,
    LinkState,
    Phase,
    next_distance,
    transmit,
    uniform,
)
from isthmus.link.script import Script

Way = Literal["up", "down"]

MAX_CONNECTIONS: Final = 2_048
_QUEUE_PACKETS: Final = 256
_READ_BYTES: Final = 16 << 10
_RESET_ON_CLOSE: Final = struct.pack("ii", 1, 0)
"""SO_LINGER that is on with a timeout of 0: closing sends RST, as a broken link's end does."""


@dataclass
class Counts:
    """What has passed and what was done to it."""

    connections: int = 0
    refused: int = 0
    cut: int = 0
    half_open: int = 0
    up_bytes: int = 0
    down_bytes: int = 0
    swallowed_bytes: int = 0
    damaged_bytes: int = 0


class FaultyLink:
    """Listens, and passes each connection on to (``host``, ``port``) under ``script``. Time runs from ``start``.

    Faults can also be caused by hand: ``half_open`` and ``cut`` act on the connections that are open now.

    >>> link = FaultyLink(script, "127.0.0.1", 50051)
    >>> await link.start()  # doctest: +SKIP
    >>> link.address  # doctest: +SKIP
    '127.0.0.1:40123'
    """

    def __init__(
        self, script: Script, host: str, port: int, *, on_event: Callable[[float, str], None] = lambda at_s, what: None
    ) -> None:
        self.counts = Counts()
        self._script = script
        self._target = (host, port)
        self._on_event = on_event
        self._directions: dict[Way, Direction] = {"up": script.up, "down": script.down}
        self._states: dict[Way, LinkState] = {"up": LinkState(), "down": LinkState()}
        self._began_s = 0.0
        self._server: asyncio.Server | None = None
        self._open: dict[int, _Connection] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def address(self) -> str:
        """HOST:PORT of the listening socket. Raises RuntimeError before ``start``."""
        if self._server is None:
            raise RuntimeError("the link has not been started")
        host, port = self._server.sockets[0].getsockname()[:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    async def start(self, host: str = "127.0.0.1", port: int = 0) -> None:
        """Listen; port 0 takes a free one. Raises OSError."""

        def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self._spawn(self._pass_on(reader, writer))

        self._server = await asyncio.start_server(accepted, host, port, limit=_READ_BYTES)
        self._began_s = asyncio.get_running_loop().time()
        for direction in self._directions.values():
            if any(phase.cut or phase.half_open for phase in direction.phases):
                self._spawn(self._follow(direction))

    async def close(self) -> None:
        """Cut every connection and stop listening."""
        if self._server is not None:
            self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for connection in [*self._open.values()]:
            connection.abort()
        self._open.clear()

    def half_open(self, *ways: Way) -> None:
        """Let the present connections swallow everything in these directions (default: both), and never recover."""
        for connection in self._open.values():
            if not connection.dead:
                self.counts.half_open += 1
                self._say(f"connection {connection.number} is half-open from now on")
            connection.dead |= set(ways or ("up", "down"))

    def cut(self) -> None:
        """Reset the present connections on both sides."""
        for number in [*self._open]:
            self._cut(number)

    def now_s(self) -> float:
        """Return the time of the script."""
        return asyncio.get_running_loop().time() - self._began_s

    def _say(self, what: str) -> None:
        self._on_event(self.now_s(), what)

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _follow(self, direction: Direction) -> None:
        """Cause the faults that belong to the start of a phase."""
        way: Way = "up" if direction is self._script.up else "down"
        for start_s, phase in direction.starts():
            await asyncio.sleep(max(0.0, start_s - self.now_s()))
            if phase.cut:
                self.cut()
            if phase.half_open:
                self.half_open(way)

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        phases: dict[Way, Phase] = {way: each.at(self.now_s())[1] for way, each in self._directions.items()}
        self.counts.connections += 1
        number = self.counts.connections
        near = _Side(reader, writer)
        if any(phase.refuse for phase in phases.values()) or len(self._open) >= MAX_CONNECTIONS:
            self.counts.refused += 1
            self._say(f"connection {number} is refused")
            near.abort()
            return
        await asyncio.sleep(max(phase.connect_delay_s for phase in phases.values()))
        try:
            far = _Side(*await asyncio.open_connection(*self._target, limit=_READ_BYTES))
        except OSError as error:
            self._say(f"connection {number}: {self._target[0]}:{self._target[1]} cannot be reached: {error}")
            near.abort()
            return
        connection = self._open[number] = _Connection(number, near, far)
        self._say(f"connection {number} opens")
        try:
            async with asyncio.TaskGroup() as group:
                way: Way
                for way, source, sink in (("up", near, far), ("down", far, near)):
                    pump = _Pump(self, way, connection, phases[way])
                    group.create_task(pump.read(source))
                    group.create_task(pump.deliver(sink))
        except* (OSError, _Cut):
            pass
        if connection.dead and number in self._open:
            return  # One side has gone. The other must not notice, until the link closes.
        self._open.pop(number, None)
        connection.abort()

    def _cut(self, number: int) -> None:
        connection = self._open.pop(number, None)
        if connection is not None:
            self.counts.cut += 1
            self._say(f"connection {number} is cut")
            connection.abort()

    def _transmit(self, way: Way, size_bytes: int) -> float:
        key = f"{self._script.seed}/{way}"
        self._states[way], arrives_s = transmit(
            self._directions[way], self._states[way], self.now_s(), size_bytes, key=key
        )
        return arrives_s


class _Cut(Exception):
    """The script cuts the connection here."""


@dataclass
class _Side:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    def abort(self) -> None:
        end: socket.socket | None = self.writer.get_extra_info("socket")
        with contextlib.suppress(OSError, AttributeError):
            if end is not None:
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        self.writer.transport.abort()


@dataclass
class _Connection:
    """``dead``: the directions that swallow everything."""

    number: int
    near: _Side
    far: _Side
    dead: set[Way] = field(default_factory=set)

    def abort(self) -> None:
        self.near.abort()
        self.far.abort()


class _Pump:
    """One direction of one connection: a queue of (time of arrival, bytes); None ends it, an exception cuts it."""

    def __init__(self, link: FaultyLink, way: Way, connection: _Connection, phase: Phase) -> None:
        self._link = link
        self._way: Way = way
        self._connection = connection
        self._key = f"{link._script.seed}/{way}/{connection.number}"
        self._queue: asyncio.Queue[tuple[float, bytes | _Cut | None]] = asyncio.Queue(_QUEUE_PACKETS)
        self._passed = 0
        self._cut_at = _cut_at(phase, connection.number, self._key)
        self._every = 0.0
        self._damage_at = math.inf
        self._damaged = 0

    async def read(self, source: _Side) -> None:
        while data := await source.reader.read(_READ_BYTES):
            if self._way in self._connection.dead:
                self._link.counts.swallowed_bytes += len(data)
                continue
            data = data[: max(0, int(self._cut_at) - self._passed)] if math.isfinite(self._cut_at) else data
            data = self._damage(data)
            self._passed += len(data)
            for start in range(0, len(data), PACKET_BYTES):
                packet = data[start : start + PACKET_BYTES]
                await self._queue.put((self._link._transmit(self._way, len(packet)), packet))
            if self._passed >= self._cut_at:
                await self._queue.put((self._link.now_s(), _Cut()))
                return
        await self._queue.put((self._link.now_s(), None))

    async def deliver(self, sink: _Side) -> None:
        while True:
            at_s, what = await self._queue.get()
            if not math.isfinite(at_s):
                await _forever()
            while (wait_s := at_s - self._link.now_s()) > 0:
                await asyncio.sleep(wait_s)
            if self._way in self._connection.dead:
                if not isinstance(what, bytes):
                    await _forever()
                self._link.counts.swallowed_bytes += len(what)
                continue
            if isinstance(what, _Cut):
                self._link._cut(self._connection.number)
                raise what
            if what is None:
                if sink.writer.can_write_eof():
                    sink.writer.write_eof()
                return
            sink.writer.write(what)
            await sink.writer.drain()
            if self._way == "up":
                self._link.counts.up_bytes += len(what)
            else:
                self._link.counts.down_bytes += len(what)

    def _damage(self, data: bytes) -> bytes:
        """Flip one bit in each byte that the script damages; its place depends on the seed and the byte's number."""
        every = self._link._directions[self._way].at(self._link.now_s())[1].corrupt_every_bytes
        if every != self._every:
            self._every = every
            self._damage_at = self._passed - 1 + self._distance() if every else math.inf
        if self._damage_at >= self._passed + len(data):
            return data
        changed = bytearray(data)
        while self._damage_at < self._passed + len(data):
            bit = int(8 * uniform(self._key, "bit", self._damaged))
            changed[int(self._damage_at) - self._passed] ^= 1 << bit
            self._link.counts.damaged_bytes += 1
            self._damage_at += self._distance()
        return bytes(changed)

    def _distance(self) -> int:
        self._damaged += 1
        return next_distance(self._every, self._key, self._damaged)


def _cut_at(phase: Phase, number: int, key: str) -> float:
    """Return the count of bytes after which a connection is cut that opens in this phase; infinity for never."""
    cuts = phase.cut_at_byte
    exactly: float = math.inf
    if isinstance(cuts, int):
        exactly = cuts
    elif cuts is not None and number <= len(cuts):
        exactly = cuts[number - 1]
    if phase.cut_every_bytes:
        exactly = min(exactly, next_distance(phase.cut_every_bytes, key + "/cut", 0))
    return exactly


async def _forever() -> NoReturn:
    await asyncio.Event().wait()
    raise AssertionError("nobody sets this event")
