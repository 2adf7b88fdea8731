"""PURE. What a device does by itself when its cloud offers it another release of the base student."""

from enum import Enum

from isthmus.edge.behaviour.state import Phase, State


class Move(Enum):
    """``STAY``: nothing. ``BACK``: use the student before, which is of that release. ``AGAIN``: personalise again."""

    STAY = "stay"
    BACK = "back"
    AGAIN = "again"


def move(state: State, *, offered: str, active: str, previous: str) -> Move:
    """Return what to do. The arguments are the releases of the offered base student, of the student in use, and of the
    one before; "" if that is unknown.

    Each offer is followed once (``State.moved_to``): if the new student was refused, or the person went back, the
    device stays as it is until the cloud offers another release. A device whose student's release is unknown stays.
    """
    settled = state.phase is Phase.SERVE and not state.repair_id and bool(state.active_id)
    if not settled or not offered or not active or offered in (active, state.moved_to):
        return Move.STAY
    return Move.BACK if offered == previous else Move.AGAIN
