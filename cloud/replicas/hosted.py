"""A replica that this server runs: it is started, and again when it ends. Requests reach it as any other server.

How it runs is another matter: in a process (``process.py``), or in an actor on a Ray cluster (``on_ray.py``).
"""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final, Protocol

from isthmus.cloud.generation.serve.carrier import Carrier, Lost, Response
from isthmus.cloud.generation.serve.settings import GenerationSettings
from isthmus.command_line import from_plain, to_plain
from isthmus.proto.errors import InvalidInput, IsthmusError

log = logging.getLogger(__name__)

_FRONT: Final[Mapping[str, Any]] = {
    "replicas": 1,
    "executor": "thread",
    "drained": None,
    "cache": None,
    "cache_embedder": None,
    "key_file": None,
}
"""Settings of the front, as a replica gets them."""
START_S: Final = 600.0
"""Longest time until a replica has found room and its model is loaded."""
FIRST_PAUSE_S: Final = 1.0
MOST_PAUSE_S: Final = 30.0
"""A replica that cannot be started is tried again after FIRST_PAUSE_S, then after twice as long each time."""
CHECK_S: Final = 10.0
"""Time between two looks at whether a replica still answers."""
PATIENCE_S: Final = 30.0
"""A replica that does not answer within this time is ended."""


class Running(Protocol):
    """A replica that answers."""

    @property
    def carrier(self) -> Carrier: ...

    @property
    def pid(self) -> int:
        """The id of its process, on its machine."""

    async def gone(self) -> str:
        """Waits until it has ended, and returns why."""

    async def end(self) -> None:
        """Ends it, and waits until it has ended."""


@dataclass(frozen=True)
class Opening:
    """What a replica needs to open the same model elsewhere, as plain data with a JSON form.

    ``key`` is that of the front, which alone asks a replica and moves requests between replicas.
    """

    settings: GenerationSettings
    key: str

    @staticmethod
    def of(settings: GenerationSettings, key: str) -> "Opening":
        """Returns what one replica of ``settings`` needs. What belongs to the front is left out."""
        every = {name: getattr(settings, name) for name in GenerationSettings.__dataclass_fields__}
        return Opening(GenerationSettings(**{**every, **_FRONT}), key)

    def to_json(self) -> str:
        return json.dumps({"settings": to_plain(self.settings), "key": self.key})

    @staticmethod
    def from_json(text: str) -> "Opening":
        raw = json.loads(text)
        return Opening(from_plain(GenerationSettings, raw["settings"]), raw["key"])


class Hosted:
    """A carrier to one replica that is kept running. ``open`` it once and ``close`` it once, on the loop that uses it.

    While it is being started again, requests to it are refused for now (``Lost.full``).
    """

    def __init__(
        self,
        name: str,
        start: Callable[[], Awaitable[Running]],
        *,
        check_s: float = CHECK_S,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self._name = name
        self._start = start
        self._check_s, self._patience_s = check_s, patience_s
        self._running: Running | None = None
        self._keeping: asyncio.Task[None] | None = None
        self.starts = 0

    @property
    def pid(self) -> int | None:
        """The id of its process on its machine, while it runs."""
        return None if self._running is None else self._running.pid

    async def open(self) -> None:
        """Starts it and waits until it answers. Raises InvalidInput, with the way out, if that is not possible."""
        self._running = await self._started()
        self._keeping = asyncio.create_task(self._keep(), name=f"keep-{self._name}")

    @asynccontextmanager
    async def exchange(
        self, method: str, path: str, *, headers: Mapping[str, str], body: bytes | None, within_s: float | None = None
    ) -> AsyncIterator[Response]:
        running = self._running
        if running is None:
            raise Lost(f"{self._name} is being started again", full=True)
        sent = running.carrier.exchange(method, path, headers=headers, body=body, within_s=within_s)
        async with sent as response:
            yield response

    async def close(self) -> None:
        try:
            if self._keeping is not None:
                self._keeping.cancel()
                await asyncio.gather(self._keeping, return_exceptions=True)
        finally:
            running, self._running = self._running, None
            if running is not None:
                await running.end()

    async def _started(self) -> Running:
        self.starts += 1
        try:
            async with asyncio.timeout(START_S):
                return await self._start()
        except TimeoutError as error:
            raise InvalidInput(
                f"{self._name} did not answer within {START_S:g} s of its start: give a smaller model, more --threads, "
                "or a --profile, without which it measures the machine"
            ) from error

    async def _keep(self) -> None:
        """Starts the replica again whenever it has ended. Nothing but ``close`` ends this."""
        pause_s = FIRST_PAUSE_S
        while True:
            try:
                if self._running is not None:
                    why = await self._end_of(self._running)
                    log.error("%s has ended: %s", self._name, why)
                    ended, self._running = self._running, None
                    await ended.end()
                self._running = await self._started()
                log.info("%s runs again", self._name)
                pause_s = FIRST_PAUSE_S
            except Exception as error:
                expected = isinstance(error, IsthmusError | OSError)
                log.warning("%s: %s; it is tried again", self._name, error, exc_info=None if expected else error)
                await asyncio.sleep(pause_s)
                pause_s = min(MOST_PAUSE_S, 2 * pause_s)

    async def _end_of(self, running: Running) -> str:
        """Waits until a replica has ended or answers no more, and returns why."""
        gone, silent = asyncio.ensure_future(running.gone()), asyncio.ensure_future(self._silence_of(running))
        try:
            done, _ = await asyncio.wait({gone, silent}, return_when=asyncio.FIRST_COMPLETED)
            return done.pop().result()
        finally:
            for each in (gone, silent):
                each.cancel()
            await asyncio.gather(gone, silent, return_exceptions=True)

    async def _silence_of(self, running: Running) -> str:
        clock = asyncio.get_running_loop().time
        silent_since_s: float | None = None
        while True:
            began_s = clock()
            try:
                asked = running.carrier.exchange("GET", "/health", headers={}, body=None, within_s=self._patience_s)
                async with asked as response:
                    if response.status != 200:
                        return "its engine has failed"
            except Lost:  # a connection may break; only silence is an end
                silent_since_s = began_s if silent_since_s is None else silent_since_s
                if clock() - silent_since_s >= self._patience_s:
                    return f"it gave no answer for {self._patience_s:g} s"
                await asyncio.sleep(min(1.0, self._check_s))
            else:
                silent_since_s = None
                await asyncio.sleep(self._check_s)
