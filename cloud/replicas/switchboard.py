"""Calls an ASGI application without a socket: requests come as messages, and all answers leave by one line.

Two parties share one lock: the thread of the application's event loop, and whoever begins requests and hears answers.
One ``hear`` brings what all requests have got since the last one, so a step of the model costs one message however many
requests it serves.
"""

import asyncio
import threading
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any

Heard = tuple[int, int | None, bytes, bool]
"""Of one request, since the last look: its number, its status once that is known, bytes of its body, and whether it has
ended. A request that failed ends without a status, or before its body has."""


@dataclass
class _Line:
    status: int | None = None
    body: bytearray = field(default_factory=bytearray)
    over: bool = False
    fresh: bool = False
    left: asyncio.Event = field(default_factory=asyncio.Event)


class Switchboard:
    """Calls ``app`` on ``loop``. ``begin``, ``leave`` and ``hear`` may be called on any thread."""

    def __init__(self, app: Any, loop: asyncio.AbstractEventLoop) -> None:
        self._app = app
        self._loop = loop
        self._lines: dict[int, _Line] = {}
        self._changed = threading.Condition()
        self._calls: set[asyncio.Task[None]] = set()

    def begin(self, number: int, method: str, target: str, headers: Mapping[str, str], body: bytes) -> None:
        """Begins a request, whose ``number`` is new. ``target``: the path, and what is asked for behind it."""
        path, _, query = target.partition("?")
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": query.encode(),
            "headers": [
                *((name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()),
                (b"content-length", str(len(body)).encode()),
            ],
            "client": None,
            "server": None,
        }
        with self._changed:
            line = self._lines[number] = _Line()
        self._on_loop(lambda: self._start(self._call(scope, body, line)))

    def leave(self, number: int) -> None:
        """Gives a request up; nothing happens if it has ended."""
        with self._changed:
            line = self._lines.pop(number, None)
        if line is not None:
            self._on_loop(line.left.set)

    def hear(self, within_s: float) -> list[Heard]:
        """Waits until there is something to hear, at most so long, and returns all of it."""
        with self._changed:
            self._changed.wait_for(lambda: any(line.fresh for line in self._lines.values()), within_s)
            found = []
            for number, line in list(self._lines.items()):
                if line.fresh:
                    found.append((number, line.status, bytes(line.body), line.over))
                    line.body.clear()
                    line.fresh = False
                    if line.over:
                        del self._lines[number]
            return found

    async def close(self) -> None:
        """Gives all requests up, and waits until the application has ended them. Call it on the loop."""
        with self._changed:
            lines = list(self._lines.values())
            self._lines.clear()
        for line in lines:
            line.left.set()
        await asyncio.gather(*self._calls, return_exceptions=True)

    def _on_loop(self, act: Callable[[], object]) -> None:
        self._loop.call_soon_threadsafe(act)

    def _start(self, call: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(call)
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)

    async def _call(self, scope: dict[str, Any], body: bytes, line: _Line) -> None:
        bodies = [body]

        async def receive() -> dict[str, Any]:
            if bodies:
                return {"type": "http.request", "body": bodies.pop(), "more_body": False}
            await line.left.wait()
            return {"type": "http.disconnect"}

        async def send(message: Mapping[str, Any]) -> None:
            with self._changed:
                if message["type"] == "http.response.start":
                    line.status = message["status"]
                else:
                    line.body += message.get("body", b"")
                    line.over = not message.get("more_body", False)
                line.fresh = True
                self._changed.notify_all()

        try:
            await self._app(scope, receive, send)
        finally:
            with self._changed:
                line.fresh = line.fresh or not line.over
                line.over = True
                self._changed.notify_all()
