"""Calls that can be ended from outside: those of unknown callers if places are scarce, and a revoked device's."""

import asyncio
import random
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final

from isthmus.proto.errors import Busy, IsthmusError

_REFUSALS: Final = 32
_REFUSALS_S: Final = 10.0
_MOST_REMEMBERED: Final = 4_096


class Interruptible:
    """A block of the current task that ``end`` can leave with an error of ours."""

    def __init__(self) -> None:
        self._task: asyncio.Task[object] | None = None
        self._cancelling = 0
        self._error: IsthmusError | None = None

    def end(self, error: IsthmusError) -> None:
        """Leave the block with ``error``; nothing happens if it was left or ended before."""
        if self._task is not None and self._error is None:
            self._error = error
            self._task.cancel()

    def __enter__(self) -> "Interruptible":
        self._task = asyncio.current_task()
        assert self._task is not None
        self._cancelling = self._task.cancelling()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        task, self._task = self._task, None
        # An abandoned stream is closed in another task: then there is no cancellation to take back.
        if task is asyncio.current_task() and self._error is not None:
            ours = task is not None and task.uncancel() <= self._cancelling
            if ours and kind is not None and issubclass(kind, asyncio.CancelledError):
                raise self._error from error


@dataclass
class _Lane:
    """The calls of one connection: those that hold a place, oldest first, and how many hold one or wait."""

    turn: asyncio.Semaphore
    held: dict[Interruptible, None] = field(default_factory=dict)
    users: int = 0


class Places:
    """A bounded number of places for callers whose identity is unknown.

    A connection holds at most ``per_connection`` of them; its further calls are parked, which costs nothing but a
    little memory, and are refused after one to three times ``park_s``. Refusing them at once would only invite the next
    ones, and refusing all of a crowd at the same moment would hold up everybody else. If all places are taken, the
    connection that holds most loses its oldest. So a caller that opens many calls delays and ends its own, not those
    of others.
    """

    def __init__(self, most: int, *, per_connection: int = 8, most_parked: int = 4_000, park_s: float = 5.0) -> None:
        self._most = most
        self._per_connection = per_connection
        self._most_parked = most_parked
        self._park_s = park_s
        self._parked = 0
        self._lanes: dict[str, _Lane] = {}

    @asynccontextmanager
    async def place(self, connection: str) -> AsyncIterator[None]:
        """Hold a place during the block. Raises Busy, also in the block if another connection needs the place."""
        lane = self._lanes.setdefault(connection, _Lane(asyncio.Semaphore(self._per_connection)))
        lane.users += 1
        try:
            await self._wait_for(lane)
            try:
                self._make_room()
                with Interruptible() as call:
                    lane.held[call] = None
                    try:
                        yield
                    finally:
                        lane.held.pop(call, None)
            finally:
                lane.turn.release()
        finally:
            lane.users -= 1
            if not lane.users:
                del self._lanes[connection]

    async def park(self) -> None:
        """Keep a refused caller waiting for its answer, if there is room to."""
        if self._parked < self._most_parked:
            self._parked += 1
            try:
                await asyncio.sleep(self._parking_s())
            finally:
                self._parked -= 1

    async def _wait_for(self, lane: _Lane) -> None:
        if not lane.turn.locked():
            await lane.turn.acquire()
            return
        if self._parked >= self._most_parked:
            raise _full()
        self._parked += 1
        try:
            async with asyncio.timeout(self._parking_s()):
                await lane.turn.acquire()
        except TimeoutError:
            raise _full() from None
        finally:
            self._parked -= 1

    def _parking_s(self) -> float:
        return self._park_s * random.uniform(1.0, 3.0)

    def _make_room(self) -> None:
        if sum(len(lane.held) for lane in self._lanes.values()) >= self._most:
            fullest = max(self._lanes.values(), key=lambda lane: len(lane.held))
            oldest = next(iter(fullest.held))
            del fullest.held[oldest]
            oldest.end(_full())


def _full() -> Busy:
    return Busy("too many calls of unknown callers are open; try again", retry_after_s=1.0)


class Patience:
    """Counts refusals by connection: the first ones are answered at once, further ones are to be parked."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._refused: OrderedDict[str, tuple[float, int]] = OrderedDict()

    def is_over(self, connection: str) -> bool:
        """Count a refusal of ``connection``; return whether there were too many of late."""
        now_s = self._clock()
        since_s, count = self._refused.pop(connection, (now_s, 0))
        if now_s - since_s > _REFUSALS_S:
            since_s, count = now_s, 0
        self._refused[connection] = since_s, count + 1
        if len(self._refused) > _MOST_REMEMBERED:
            self._refused.popitem(last=False)
        return count >= _REFUSALS


class OpenCalls:
    """The calls that each device has in progress."""

    def __init__(self) -> None:
        self._calls: dict[str, set[Interruptible]] = {}
        self._endless: set[Interruptible] = set()
        self._closed: IsthmusError | None = None
        self._told: set[Callable[[IsthmusError], None]] = set()

    def __len__(self) -> int:
        return sum(map(len, self._calls.values()))

    def of(self, who: str) -> int:
        """Return how many calls ``who`` has in progress."""
        return len(self._calls.get(who, ()))

    @property
    def callers(self) -> tuple[str, ...]:
        """Everyone with a call in progress."""
        return tuple(self._calls)

    @asynccontextmanager
    async def open(self, who: str, *, endless: bool = False) -> AsyncIterator[None]:
        """Count a call of ``who`` during the block; ``end`` leaves it, and ``close`` if it is ``endless``.

        After ``close`` it raises that error for an endless call.
        """
        if endless and self._closed is not None:
            raise self._closed
        with Interruptible() as call:
            self._calls.setdefault(who, set()).add(call)
            if endless:
                self._endless.add(call)
            try:
                yield
            finally:
                self._endless.discard(call)
                calls = self._calls[who]
                calls.discard(call)
                if not calls:
                    del self._calls[who]

    @contextmanager
    def telling(self, stops: Callable[[IsthmusError], None]) -> Iterator[None]:
        """Call ``stops`` with the error of ``close`` if that comes during the block, or came before."""
        if self._closed is not None:
            stops(self._closed)
        self._told.add(stops)
        try:
            yield
        finally:
            self._told.discard(stops)

    def close(self, error: IsthmusError) -> None:
        """End all endless calls with ``error``, and call what was given to ``telling``. Later calls get it, too."""
        self._closed = error
        for call in tuple(self._endless):
            call.end(error)
        for stops in tuple(self._told):
            stops(error)

    def end(self, callers: Iterable[str], error: IsthmusError) -> None:
        """End all calls of ``callers`` with ``error``."""
        for who in callers:
            for call in tuple(self._calls.get(who, ())):
                call.end(error)
