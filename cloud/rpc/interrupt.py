"""Calls that can be ended from outside: those of unknown callers if places are scarce, and a revoked device's."""

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from types import TracebackType

from isthmus.proto.errors import Busy, IsthmusError


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


class Places:
    """A bounded number of places for callers whose identity is unknown.

    If all are taken, the connection that holds most of them loses its oldest. A caller that opens many calls therefore
    ends its own, not those of others.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._held: dict[str, dict[Interruptible, None]] = {}

    @asynccontextmanager
    async def place(self, connection: str) -> AsyncIterator[None]:
        """Hold a place during the block. The block is left with Busy if the place is needed for another connection."""
        if sum(map(len, self._held.values())) >= self._most:
            fullest = max(self._held, key=lambda name: len(self._held[name]))
            oldest = next(iter(self._held[fullest]))
            self._remove(fullest, oldest)
            oldest.end(Busy("too many calls of unknown callers are open; try again", retry_after_s=1.0))
        with Interruptible() as call:
            self._held.setdefault(connection, {})[call] = None
            try:
                yield
            finally:
                self._remove(connection, call)

    def _remove(self, connection: str, call: Interruptible) -> None:
        held = self._held.get(connection, {})
        held.pop(call, None)
        if not held:
            self._held.pop(connection, None)


class OpenCalls:
    """The calls that each device has in progress."""

    def __init__(self) -> None:
        self._calls: dict[str, set[Interruptible]] = {}

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
    async def open(self, who: str) -> AsyncIterator[None]:
        """Count a call of ``who`` during the block; ``end`` leaves it."""
        with Interruptible() as call:
            self._calls.setdefault(who, set()).add(call)
            try:
                yield
            finally:
                calls = self._calls[who]
                calls.discard(call)
                if not calls:
                    del self._calls[who]

    def end(self, callers: Iterable[str], error: IsthmusError) -> None:
        """End all calls of ``callers`` with ``error``."""
        for who in callers:
            for call in tuple(self._calls.get(who, ())):
                call.end(error)
