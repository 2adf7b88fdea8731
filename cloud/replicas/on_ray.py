"""A replica in an actor on a Ray cluster, on any machine that has room and the same model directory.

Requests go to it as they would go to a server, but as calls of Ray: it listens on no port. One call, which lasts until
there is something to hear, brings what all its requests have got (``switchboard.py``).

Ray may restart nothing by itself: the front starts a lost replica again, and sends its requests to others.
"""

import asyncio
import itertools
import logging
import os
import threading
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

from isthmus import __version__
from isthmus.cloud.cluster import connection as cluster
from isthmus.cloud.garbage import spare_what_is_there
from isthmus.cloud.generation.serve.carrier import SILENT_S, Lost, Response
from isthmus.cloud.replicas.hosted import START_S, Opening
from isthmus.cloud.replicas.switchboard import Heard, Switchboard
from isthmus.proto.errors import InvalidInput

log = logging.getLogger(__name__)

HEAR_S: Final = 5.0
"""Longest time that one call waits for something to hear."""
CALL_S: Final = 30.0
"""A call of Ray that takes so long beyond that has lost its actor."""
END_S: Final = 5.0


class Actor:
    """What runs on the cluster. Raises RuntimeError if the machine has another version of Isthmus, or not the model."""

    def __init__(self, opening: str, version: str) -> None:
        if version != __version__:
            raise RuntimeError(f"the cluster has isthmus {__version__}, the server {version}: install one version")
        ready: Future[Switchboard] = Future()
        threading.Thread(target=lambda: asyncio.run(_serve(opening, ready)), name="replica", daemon=True).start()
        self._board = ready.result()
        spare_what_is_there()

    def pid(self) -> int:
        """Returns the actor's process id."""
        return os.getpid()

    def begin(self, number: int, method: str, target: str, headers: dict[str, str], body: bytes) -> None:
        self._board.begin(number, method, target, headers, body)

    def leave(self, number: int) -> None:
        self._board.leave(number)

    def hear(self, within_s: float) -> list[Heard]:
        return self._board.hear(within_s)


async def _serve(opening: str, ready: "Future[Switchboard]") -> None:
    """Opens the model and serves for ever: the actor ends with its process."""
    from isthmus.cloud.generation.serve.opening import opened
    from isthmus.cloud.http.calls import Door
    from isthmus.cloud.http.openai import openai_app

    try:
        what = Opening.from_json(opening)
        async with opened(what.settings) as found:
            app = openai_app(found.answering, Door(what.key), moves=found.moves, move_key=what.key)
            ready.set_result(Switchboard(app, asyncio.get_running_loop()))
            await asyncio.Event().wait()
    except BaseException as error:
        if not ready.done():
            ready.set_exception(error)
        raise


@dataclass
class _Line:
    """One request at the actor, as the front hears it."""

    status: "asyncio.Future[int]"
    chunks: "asyncio.Queue[bytes | Lost | None]" = field(default_factory=asyncio.Queue)

    def end(self, error: Lost) -> None:
        if not self.status.done():
            self.status.set_exception(error)
            self.status.exception()  # whoever waits for it may have left
        self.chunks.put_nowait(error)


class RunningActor:
    """An actor that answers; it is its own carrier. Made on the loop that uses it.

    A thread hears what its requests have got, and another one says what is begun and given up, in order.
    """

    def __init__(self, actor: Any, pid: int) -> None:
        self._actor = actor
        self._pid = pid
        self._loop = asyncio.get_running_loop()
        self._gone: asyncio.Future[str] = self._loop.create_future()
        self._numbers = itertools.count(1)
        self._lines: dict[int, _Line] = {}
        self._saying = ThreadPoolExecutor(1, thread_name_prefix="isthmus-ray-say")
        threading.Thread(target=self._hear, name="ray-hear", daemon=True).start()

    @property
    def carrier(self) -> "RunningActor":
        return self

    @property
    def pid(self) -> int:
        return self._pid

    async def gone(self) -> str:
        return await asyncio.shield(self._gone)

    async def end(self) -> None:
        self._lose("the server has ended it")
        await asyncio.to_thread(_kill, self._actor)
        self._saying.shutdown(wait=False, cancel_futures=True)

    async def close(self) -> None:
        await self.end()

    @asynccontextmanager
    async def exchange(
        self, method: str, path: str, *, headers: Mapping[str, str], body: bytes | None, within_s: float | None = None
    ) -> AsyncIterator[Response]:
        if self._gone.done():
            raise Lost(f"a replica is gone: {self._gone.result()}")
        number, line = next(self._numbers), _Line(self._loop.create_future())
        self._lines[number] = line
        until_s = None if within_s is None else self._loop.time() + within_s
        self._say(self._actor.begin, number, method, path, dict(headers), body or b"")
        try:
            async with asyncio.timeout_at(self._next_s(until_s)):
                status = await line.status
            yield _RayResponse(status, self._chunks(line, until_s))
        except TimeoutError as error:
            raise Lost("a replica gave no answer in time") from error
        finally:
            if self._lines.pop(number, None) is not None and not self._gone.done():
                self._say(self._actor.leave, number)

    async def _chunks(self, line: _Line, until_s: float | None) -> AsyncIterator[bytes]:
        while True:
            try:
                async with asyncio.timeout_at(self._next_s(until_s)):
                    found = await line.chunks.get()
            except TimeoutError as error:
                raise Lost("a replica gave no answer in time") from error
            if isinstance(found, Lost):
                raise found
            if found is None:
                return
            yield found

    def _next_s(self, until_s: float | None) -> float:
        silent_s = self._loop.time() + SILENT_S
        return silent_s if until_s is None else min(silent_s, until_s)

    def _say(self, method: Any, *arguments: Any) -> None:
        self._saying.submit(self._call, partial(method.remote, *arguments))

    def _call(self, remote: Any) -> None:
        import ray

        try:
            cluster.bounded(lambda: ray.get(remote()), CALL_S)
        except Exception as error:  # many types: the actor, its machine, the cluster or the connection is gone
            self._lose_soon(cluster.last_words(error))

    def _hear(self) -> None:
        """Hears until the actor is gone."""
        import ray

        while not self._gone.done():
            try:
                heard = cluster.bounded(lambda: ray.get(self._actor.hear.remote(HEAR_S)), HEAR_S + CALL_S)
            except Exception as error:
                self._lose_soon(cluster.last_words(error))
                return
            if heard:
                with suppress(RuntimeError):  # the loop has ended
                    self._loop.call_soon_threadsafe(self._pass_on, heard)

    def _pass_on(self, heard: list[Heard]) -> None:
        for number, status, body, over in heard:
            line = self._lines.get(number)
            if line is None:  # it was given up
                continue
            if status is None:
                line.end(Lost("a replica failed on a request"))
            elif not line.status.done():
                line.status.set_result(status)
            if body:
                line.chunks.put_nowait(body)
            if over:
                line.chunks.put_nowait(None)
                del self._lines[number]

    def _lose_soon(self, why: str) -> None:
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._lose, why)

    def _lose(self, why: str) -> None:
        if not self._gone.done():
            self._gone.set_result(why)
        for line in self._lines.values():
            line.end(Lost(f"a replica is gone: {why}"))


@dataclass(frozen=True)
class _RayResponse:
    status: int
    _chunks: AsyncIterator[bytes]

    def chunks(self) -> AsyncIterator[bytes]:
        return self._chunks


async def start(executor: str, opening: Opening) -> RunningActor:
    """Starts an actor and waits until its model answers. Raises InvalidInput, with the way out, if it cannot.

    It takes ``threads`` of the cluster's CPUs, and a GPU if the model runs on one. A cluster that this process starts
    is for nobody else, so actors take none of its CPUs there.
    """
    making = _Making()
    try:
        pid = await asyncio.to_thread(_start, executor, opening, making)
    except asyncio.CancelledError:
        making.stopped = True
        await asyncio.to_thread(_kill, making.actor)
        raise
    log.info("a replica runs in an actor on %s", executor)
    return RunningActor(making.actor, pid)


@dataclass
class _Making:
    """An actor that a thread starts while its caller may stop waiting."""

    actor: Any = None
    stopped: bool = False


def _start(executor: str, opening: Opening, making: _Making) -> int:
    """Returns the actor's process id."""
    settings = opening.settings
    cluster.connect(executor, 1)
    try:
        own = executor == cluster.LOCAL
        made = cluster.actor(Actor, cpus=0 if own else settings.threads, gpus=int(settings.device.startswith("cuda")))
        making.actor = made.remote(opening.to_json(), __version__)
        if making.stopped:  # while it was made: its caller has not seen it
            raise ConnectionError("the server is stopping")
        pid: int = cluster.first_answer(making.actor.pid.remote(), START_S)
        return pid
    except Exception as error:  # many types: no room, no machine, no model
        _kill(making.actor)
        raise InvalidInput(f"Ray has started no replica: {cluster.last_words(error)}") from error


def _kill(actor: Any) -> None:
    if actor is not None:
        import ray

        with suppress(Exception):
            cluster.bounded(lambda: ray.kill(actor), END_S)
