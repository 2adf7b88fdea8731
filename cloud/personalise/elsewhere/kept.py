"""An actor that is kept for a moment after its work, because the next step mostly follows at once.

A new one imports torch and reads the release, which takes longer than many steps.
"""

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

from isthmus.cloud.cluster import connection as cluster

KEEP_S: Final = 10.0
"""A kept actor holds its CPU or GPU, which others may wait for."""
_ANSWER_S: Final = 10.0
_END_S: Final = 5.0


class KeptActor:
    """At most one actor that nobody uses. Actors have a method ``pid``. Safe to use from several threads."""

    def __init__(self, keep_s: float = KEEP_S) -> None:
        self._keep_s = keep_s
        self._turn = threading.Lock()
        self._actor: Any = None
        self._timer: threading.Timer | None = None

    def take(self, make: Callable[[], Any], start_s: float) -> tuple[Any, int]:
        """Return the kept actor if it still answers, else a new one of ``make``; and its process id.

        The caller gives it to ``keep`` or ``end`` afterwards. Raises what a new actor raises, TimeoutError if it does
        not answer within ``start_s``, and ConnectionError once no machine is left.
        """
        import ray

        actor = self._taken()
        if actor is not None:
            with suppress(Exception):  # its machine or its cluster is gone
                return actor, int(cluster.bounded(lambda: ray.get(actor.pid.remote()), _ANSWER_S))
            end(actor)
        actor = make()
        try:
            return actor, int(cluster.first_answer(actor.pid.remote(), start_s))
        except BaseException:
            end(actor)
            raise

    def keep(self, actor: Any) -> None:
        """Keep an actor whose work is done, and end it if nobody takes it in time."""
        with self._turn:
            before, self._actor = self._actor, actor
            if self._timer is not None:  # it would end the new one early
                self._timer.cancel()
            self._timer = threading.Timer(self._keep_s, self.let_go)
            self._timer.daemon = True
            self._timer.start()
        if before is not None:
            end(before)

    def let_go(self) -> None:
        """End the kept actor, if there is one: others may need its room."""
        actor = self._taken()
        if actor is not None:
            end(actor)

    def _taken(self) -> Any:
        with self._turn:
            actor, self._actor = self._actor, None
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
        return actor


def end(actor: Any) -> None:
    """End an actor. Nothing is raised: one whose cluster is gone has ended."""
    import ray

    with suppress(Exception):
        cluster.bounded(lambda: ray.kill(actor), _END_S)
