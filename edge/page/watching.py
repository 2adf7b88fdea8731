"""Follows a running device for the pages that are open, and passes on what happens. It asks nothing if none is open."""

import asyncio
import contextlib
import json
from collections import deque
from collections.abc import AsyncIterator
from typing import Any, Final

from isthmus.edge.agent.device_state import DeviceState
from isthmus.edge.requests.requests import ask
from isthmus.edge.watched.happenings import MOST
from isthmus.proto.errors import Busy, IsthmusError

MOST_PAGES: Final = 8
LOOK_EVERY_S: Final = 0.2
AGAIN_S: Final = 0.5
WAIT_S: Final = 3.0
ALIVE_EVERY_S: Final = 10.0
_MOST_WAITING: Final = 2 * MOST

Queue = asyncio.Queue[tuple[str, Any]]


class Watching:
    """One follower for all pages of a device. Use it in one event loop."""

    def __init__(self, state: DeviceState) -> None:
        self._state = state
        self._pages: dict[Queue, bool] = {}
        self._recent: deque[dict[str, Any]] = deque(maxlen=MOST)
        self._device: dict[str, Any] | None = None
        self._tasks: list[asyncio.Task[None]] = []

    def open(self, *, look: bool) -> AsyncIterator[str]:
        """Return what happens, as server-sent events: ``device`` (does it run), ``hello`` with what is known, then
        each ``event``, and with ``look`` the picture and sound of now.

        Raises Busy if too many pages are open.
        """
        if len(self._pages) >= MOST_PAGES:
            raise Busy(f"{MOST_PAGES} pages of this device are open; close one", retry_after_s=5.0)
        queue: Queue = asyncio.Queue(_MOST_WAITING)
        self._pages[queue] = look
        if not self._tasks:
            self._device = None
            self._tasks = [asyncio.create_task(self._follow()), asyncio.create_task(self._look())]
        elif self._device is not None:
            queue.put_nowait(("device", self._device))
            queue.put_nowait(("hello", list(self._recent)))
        return self._events(queue)

    async def _events(self, queue: Queue) -> AsyncIterator[str]:
        try:
            while True:
                try:
                    kind, facts = await asyncio.wait_for(queue.get(), ALIVE_EVERY_S)
                except TimeoutError:
                    yield ": still here\n\n"  # A page that has gone is noticed by writing to it.
                    continue
                if kind == "end":
                    return
                yield f"event: {kind}\ndata: {json.dumps(facts)}\n\n"
        finally:
            self._pages.pop(queue, None)
            if not self._pages:
                for task in self._tasks:
                    task.cancel()
                self._tasks = []

    async def _follow(self) -> None:
        life, number, wait_s = None, 0, 0.0
        while True:
            try:
                reply = await asyncio.to_thread(ask, self._state, "events", after=number, wait_s=wait_s)
                problem = ""
            except IsthmusError as error:
                reply, problem = {"life": None, "events": []}, str(error)
            device = {"running": reply["life"] is not None, "problem": problem}
            if device != self._device or reply["life"] != life:
                # It was started, has ended, or is another one: everything is read again.
                if number and reply["life"] is not None:
                    number, wait_s = 0, 0.0
                    continue
                life, self._device = reply["life"], device
                self._recent = deque(reply["events"], MOST)
                self._pass("device", device)
                self._pass("hello", reply["events"])
            else:
                self._recent.extend(reply["events"])
                for event in reply["events"]:
                    self._pass("event", event)
            number = self._recent[-1]["number"] if self._recent else 0
            wait_s = WAIT_S
            if life is None:
                number = 0
                await asyncio.sleep(AGAIN_S)

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            if self._device is not None and self._device["running"] and any(self._pages.values()):
                with contextlib.suppress(IsthmusError):
                    self._pass("look", await asyncio.to_thread(ask, self._state, "look"))

    def _pass(self, kind: str, facts: Any) -> None:
        for queue, looks in list(self._pages.items()):
            if kind == "look" and (not looks or queue.qsize() > 2):
                continue  # A page that is slow misses pictures, and nothing else.
            try:
                queue.put_nowait((kind, facts))
            except asyncio.QueueFull:
                # Too slow altogether: it is asked to come again, and then reads everything again.
                while not queue.empty():
                    queue.get_nowait()
                queue.put_nowait(("end", None))
