"""A faulty link in a thread of its own, for tests and measurements whose own code is not asyncio."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from isthmus.link.proxy import FaultyLink
from isthmus.link.script import Script
from tests.rigs.project.patience import HANGS_S


class LinkInThread:
    """``link`` runs in the thread's loop; ``do`` calls a function there and returns its result."""

    def __init__(self, script: Script, port: int) -> None:
        self.link = FaultyLink(script, "127.0.0.1", port)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="faulty-link", daemon=True)
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self.link.start(), self._loop).result(HANGS_S)
        self.address = self.link.address

    def do(self, call: Callable[[], Any]) -> Any:
        async def called() -> Any:
            return call()

        return asyncio.run_coroutine_threadsafe(called(), self._loop).result(HANGS_S)

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self.link.close(), self._loop).result(HANGS_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(HANGS_S)
        self._loop.close()


@contextmanager
def faulty_link(port: int, script: Script | None = None) -> Iterator[LinkInThread]:
    """Yield a link to ``port`` of this machine. Without a script it passes everything, until a fault is caused."""
    link = LinkInThread(script or Script(), port)
    try:
        yield link
    finally:
        link.close()
