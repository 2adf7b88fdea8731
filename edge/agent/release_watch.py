"""The release that the cloud offers: a device that keeps running looks every few hours, and follows it by itself."""

import logging
from collections.abc import Callable
from typing import Final

from isthmus.edge.agent.live import Worker
from isthmus.edge.agent.runtime import Runtime
from isthmus.edge.behaviour.moving import Move, move
from isthmus.edge.behaviour.state import Phase
from isthmus.proto.errors import IsthmusError, NotYours

log = logging.getLogger(__name__)

EVERY_S: Final = 6 * 3600.0
"""Between two looks, on average three quarters of it: devices that started together do not ask together."""
FIRST_S: Final = 600.0
"""The first look comes within this time after the start."""


class ReleaseWatch:
    """Gives the worker a look at the offered release when one is due.

    ``may_personalise`` returns whether there are clips enough for a personalisation. ``jitter`` returns numbers from 0
    to 1.
    """

    def __init__(
        self,
        runtime: Runtime,
        jitter: Callable[[], float],
        *,
        may_personalise: Callable[[], bool] = lambda: True,
        every_s: float = EVERY_S,
        first_s: float = FIRST_S,
    ) -> None:
        self._runtime = runtime
        self._jitter = jitter
        self._may_personalise = may_personalise
        self._every_s = every_s
        self._next_s = runtime.clock() + first_s * jitter()

    def look(self, worker: Worker) -> bool:
        """Start a look in the worker if one is due and nothing else is under way. Returns whether it started."""
        runtime = self._runtime
        if worker.busy or runtime.clock() < self._next_s or runtime.state.phase is not Phase.SERVE:
            return False
        self._next_s = runtime.clock() + self._every_s * (0.5 + 0.5 * self._jitter())
        may = self._may_personalise()
        worker.start(lambda: follow(runtime, may_personalise=may))
        return True


def follow(runtime: Runtime, *, may_personalise: bool = True) -> Move:
    """Ask which release the cloud offers, and follow it, see moving.py. Returns what was done.

    The device goes back to its student before if that is sound and of the offered release; nothing is sent then. Else
    it personalises again, if it has the clips (``may_personalise``) and the person's privacy budget allows it, and
    judges the new student like any other. What cannot be done now is left for the next look; nothing is raised for it.
    """
    try:
        offered = runtime.slot.offered_release(runtime.link.describe_offered())
        active = _release_of(runtime, runtime.state.active_id)
        before = "" if offered == active else runtime.slot.previous_id()
        # A damaged student is none to go back to, and must not keep the device from following for good.
        previous = _release_of(runtime, before) if runtime.slot.is_sound(before) else ""
        wanted = move(runtime.state, offered=offered, active=active, previous=previous)
        if wanted is Move.BACK:
            runtime.observer.on_stage("follow_release")
            runtime.rollback()
            runtime.note_moved(offered)
        if wanted is Move.AGAIN:
            if not (may_personalise and runtime.affordable):
                return Move.STAY
            runtime.observer.on_stage("follow_release")
            runtime.personalise_again(following=offered)
    except IsthmusError as error:
        log.info("the offered release is not followed now: %s", error)
        return Move.STAY
    if wanted is Move.STAY and offered and offered == active != runtime.state.moved_to:
        runtime.note_moved(offered)
    if wanted is Move.AGAIN:
        runtime.run(patient=True)
    return wanted


def _release_of(runtime: Runtime, student_id: str) -> str:
    """Return the release of an installed student, "" if it is unknown. If its manifest is of an older cloud, ask."""
    if not student_id:
        return ""
    known = runtime.slot.installed(student_id).manifest.release
    if known:
        return known
    try:
        return runtime.slot.signed_release(runtime.link.describe_student(student_id), student_id)
    except NotYours:
        return ""
