"""Blocking work of calls (database, files) on threads of its own, with a bounded wait in front.

What would wait too long is refused at once with Busy, which says when to try again. So an accepted call is answered in
time, however many arrive. How much this machine can do is not configured but measured: by the time that work takes, and
by how late the event loop is.
"""

import asyncio
import contextvars
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Final, ParamSpec, TypeVar

from isthmus.proto.errors import Busy

P = ParamSpec("P")
T = TypeVar("T")

_THREADS: Final = 8
_MOST_WAIT_S: Final = 2.0
"""Longest time that work may wait for a thread. A device waits 20 s for an answer, so the answer is still in time."""
_FIRST_GUESS_S: Final = 0.005
_SMOOTHING: Final = 0.1
_LOOK_S: Final = 0.05
_MOST_LATE_S: Final = 1.0
"""Lateness of the event loop from which new calls are refused."""


class Work:
    """Runs blocking functions for calls. For one event loop: ``start`` once, ``stop`` once."""

    def __init__(
        self, *, threads: int = _THREADS, most_wait_s: float = _MOST_WAIT_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._threads = threads
        self._most_wait_s = most_wait_s
        self._clock = clock
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="isthmus-work")
        self._waiting = 0
        self._takes_s = _FIRST_GUESS_S
        self._late_s = 0.0
        self._watch: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to measure how late the event loop is."""
        self._watch = asyncio.create_task(self._look(), name="lateness of the event loop")

    async def stop(self) -> None:
        """Let the work that runs end, and drop what waits."""
        if self._watch is not None:
            self._watch.cancel()
            with suppress(asyncio.CancelledError):
                await self._watch
        await asyncio.to_thread(self._pool.shutdown, cancel_futures=True)

    @property
    def waiting(self) -> int:
        """How much work waits for a thread or runs."""
        return self._waiting

    @property
    def late_s(self) -> float:
        """How late the event loop is, smoothed."""
        return self._late_s

    @property
    def expected_wait_s(self) -> float:
        """How long work that arrives now would wait for a thread."""
        return self._waiting * self._takes_s / self._threads

    def admit(self, remaining_s: float | None = None) -> None:
        """Check that new work can be answered in time. ``remaining_s``: until the caller's deadline, if it has one.

        Raises Busy.
        """
        wait_s = self.expected_wait_s
        longest_s = self._most_wait_s if remaining_s is None else min(self._most_wait_s, remaining_s / 2)
        if wait_s > longest_s or self._late_s > _MOST_LATE_S:
            raise busy(max(wait_s - longest_s / 2, self._late_s))

    async def do(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Return ``function(*args, **kwargs)``, run on a thread. Raises Busy if it would wait too long, or has."""
        self.admit()
        asked_s = self._clock()
        self._waiting += 1
        # Log lines of the work name the call's trace and tenant.
        within = contextvars.copy_context()

        def run() -> tuple[T, float]:
            began_s = self._clock()
            if began_s - asked_s > 2 * self._most_wait_s:
                raise busy(self._most_wait_s)
            return within.run(function, *args, **kwargs), self._clock() - began_s

        try:
            result, took_s = await asyncio.get_running_loop().run_in_executor(self._pool, run)
        finally:
            self._waiting -= 1
        self._takes_s += _SMOOTHING * (took_s - self._takes_s)
        return result

    async def _look(self) -> None:
        while True:
            before_s = self._clock()
            await asyncio.sleep(_LOOK_S)
            late_s = max(0.0, self._clock() - before_s - _LOOK_S)
            # A single late turn is no overload, a row of them is.
            self._late_s += (0.3 if late_s > self._late_s else 0.2) * (late_s - self._late_s)


def busy(after_s: float) -> Busy:
    """Return the refusal of a busy server. The time to wait is spread, so that not all callers return at once."""
    retry_s = round(max(0.5, after_s) * random.uniform(1.0, 2.0), 1)
    return Busy(f"the server is busy; try again in {retry_s:g} s", retry_after_s=retry_s)
