"""What has just happened on a running device, for the pages that watch it: a bounded list that can be waited on."""

import secrets
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final

MOST: Final = 300
LONGEST_WAIT_S: Final = 5.0
PROGRESS_EVERY_S: Final = 0.25


class Happenings:
    """Events with increasing numbers, newest last. Any thread may use it.

    ``life`` differs from one start of the device to the next, so a page can tell that it must read everything again.
    An event is a dict with ``kind``, ``number`` and ``at_s`` (Unix time).
    """

    def __init__(self, *, unix_clock: Callable[[], float] = time.time) -> None:
        self.life = secrets.token_hex(8)
        self._unix_clock = unix_clock
        self._events: deque[dict[str, Any]] = deque(maxlen=MOST)
        self._changed = threading.Condition()  # its lock is reentrant
        self._number = 0
        self._progress: dict[str, Any] = {}

    def note(self, kind: str, **facts: Any) -> None:
        """Add an event. ``facts`` must be what JSON can hold."""
        with self._changed:
            self._number += 1
            self._events.append({"kind": kind, "number": self._number, "at_s": self._unix_clock(), **facts})
            self._changed.notify_all()

    def progress(self, **facts: Any) -> None:
        """Add an event of kind ``progress``. One that comes too soon after another of its stage replaces that one."""
        with self._changed:
            last = self._progress
            soon = last and self._unix_clock() - last["at_s"] < PROGRESS_EVERY_S
            if soon and last.get("stage") == facts.get("stage"):
                last.update(facts)
                return
            self.note("progress", **facts)
            self._progress = self._events[-1]

    def after(self, number: int, wait_s: float = 0.0) -> list[dict[str, Any]]:
        """Return the events with a higher number; wait up to ``wait_s`` if there is none."""
        with self._changed:
            self._changed.wait_for(lambda: self._number > number, min(max(0.0, wait_s), LONGEST_WAIT_S))
            return [dict(each) for each in self._events if each["number"] > number]
