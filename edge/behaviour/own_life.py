"""PURE: what a device that captures its own clips does next for its personalisation."""

from dataclasses import dataclass
from enum import Enum
from typing import Final

from isthmus.edge.behaviour.state import Phase, Purpose, State, waits_to_begin

AGAIN_AFTER_S: Final = 86_400.0
"""A device personalises again at most once in this time."""


class Task(Enum):
    """``PREPARE``: enrol and fetch the base student. ``PERSONALISE``: go on to a finished student. ``AGAIN``: redo."""

    PREPARE = "prepare"
    PERSONALISE = "personalise"
    AGAIN = "again"


@dataclass(frozen=True)
class Clips:
    """``stored``: the clips that are here, and ``new``: those that are younger than the last upload.

    ``since_s``: seconds since the last upload, None if there was none. ``affordable``: the privacy budget allows one
    more upload.
    """

    stored: int
    new: int
    since_s: float | None
    affordable: bool


def due(state: State, clips: Clips, wanted: int) -> Task | None:
    """Return what to do now; None to wait for clips. ``wanted``: the clips that a personalisation needs.

    What was begun is always finished. A clock that was set back gives a negative ``since_s``: that is no reason to
    start over.
    """
    if not state.active_id or (state.purpose is Purpose.BASE and state.phase in _BEFORE_CLIPS):
        return Task.PREPARE
    enough = clips.stored >= wanted
    if waits_to_begin(state):
        return Task.PERSONALISE if enough and clips.affordable else None
    if state.phase is not Phase.SERVE:
        return Task.PERSONALISE
    rested = clips.since_s is not None and clips.since_s >= AGAIN_AFTER_S
    return Task.AGAIN if enough and clips.new >= wanted and rested and clips.affordable else None


_BEFORE_CLIPS = (Phase.ENROL, Phase.FETCH, Phase.VERIFY, Phase.SWAP, Phase.STOPPED)
