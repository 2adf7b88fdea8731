"""Asks the scaler once per second how many executors are wanted, and tells the engine."""

import logging
import threading
import time
from collections.abc import Callable
from typing import Final

from isthmus.cloud.elastic.scheduling.scaling import Scaler
from isthmus.cloud.elastic.serve.live import LiveEngine

log = logging.getLogger(__name__)

EVERY_S: Final = 1.0


class Growth:
    """Changes the number of executors with the load. Call ``start`` and ``stop`` once each.

    The engine must have ``scaler.rule.most`` executors, and those beyond the least outside this process. ValueError is
    raised otherwise.
    """

    def __init__(
        self, live: LiveEngine, scaler: Scaler, *, every_s: float = EVERY_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._live = live
        self._scaler = scaler
        self._every_s = every_s
        self._clock = clock
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="elastic-growth", daemon=True)
        live.want(scaler.rule.least)

    def start(self) -> None:
        """Begins to ask."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread; the number of executors stays."""
        self._ended.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(self._every_s):
            arrived, waiting, pace = self._live.pressure()
            before = self._scaler.wanted
            wanted = self._scaler.look(arrived, waiting, self._clock(), pace)
            if wanted != before:
                log.info("%d executors are wanted instead of %d: %d images wait", wanted, before, waiting)
                self._live.want(wanted)
