"""The state of a device's behaviour, and how a person or a start changes it. ``step`` (step.py) does the rest."""

from dataclasses import dataclass, replace
from enum import Enum

from isthmus.proto.limits import MAX_ROUNDS


class Phase(Enum):
    ENROL = "enrol"
    FETCH = "fetch"
    VERIFY = "verify"
    JUDGE = "judge"
    SWAP = "swap"
    ENCODE = "encode"
    UPLOAD = "upload"
    WATCH = "watch"
    SERVE = "serve"
    STOPPED = "stopped"
    """Written by development versions before 0.1.0, which gave up without a student. A start leaves it."""


class Purpose(Enum):
    """Why a student is being fetched."""

    BASE = "base"
    INTERIM = "interim"
    FINAL = "final"


class Answering(Enum):
    """How a clip is answered now."""

    NOT_YET = "not_yet"
    LOCAL = "local"
    CLOUD = "cloud"


@dataclass(frozen=True)
class State:
    """Everything the agent remembers.

    ``wanted_id``: the student being fetched ("" = the newest). ``active_id``: the student in use. ``base_id``: the
    student that this personalisation started from. ``repair_id``: the damaged student that ``active_id`` stands in
    for. ``round``: of the prototypes being made or last sent. ``uploaded_round``: the last one that the cloud has
    acknowledged. ``most_rounds``: the allowed number of uploads. ``jobs``: jobs of this personalisation that were
    lost or failed. ``attempt`` counts tries since the link last worked, ``refusals`` errors of any other kind since
    the last progress. ``failure``: the last such error, "" after progress. ``verdict``: the result of comparing the
    last final student with the active one. ``refused_id``: that student if it was refused. ``done``: the last
    personalisation reached its end. ``moved_to``: the offered release that the device followed last, see moving.py.
    """

    phase: Phase = Phase.ENROL
    purpose: Purpose = Purpose.BASE
    wanted_id: str = ""
    active_id: str = ""
    base_id: str = ""
    repair_id: str = ""
    job_id: str = ""
    round: int = 0
    uploaded_round: int = -1
    most_rounds: int = MAX_ROUNDS
    jobs: int = 0
    link_up: bool = False
    attempt: int = 0
    refusals: int = 0
    retry_at_s: float | None = None
    failure: str = ""
    verdict: str = ""
    refused_id: str = ""
    done: bool = False
    moved_to: str = ""


def waits_to_begin(state: State) -> bool:
    """Return whether a personalisation waits for clips, or for a privacy budget: nothing of it has been sent."""
    return state.phase is Phase.ENCODE and state.purpose is not Purpose.INTERIM and state.round == 0


def answering(state: State, *, finished: bool = False) -> Answering:
    """Return how a clip that arrives now is answered: through the cloud only by a finished student with a link.

    ``finished``: the active student is the outcome of an earlier personalisation. The cloud then answers while the next
    one waits to begin, however long that is.
    """
    if not state.active_id:
        return Answering.NOT_YET
    serves = state.phase is Phase.SERVE or (finished and waits_to_begin(state))
    return Answering.CLOUD if serves and state.link_up and not state.repair_id else Answering.LOCAL


def personalise_again(state: State) -> State:
    """Return the state in which a finished device starts another personalisation, with its active student."""
    phase = Phase.ENCODE if state.active_id else Phase.ENROL
    return State(
        phase=phase,
        active_id=state.active_id,
        base_id=state.active_id,
        repair_id=state.repair_id,
        moved_to=state.moved_to,
    )


def enrol_anew(state: State) -> State:
    """Return the state of a device that has lost its identity and keeps its students, if they are sound."""
    return State(
        active_id=state.active_id,
        base_id=state.base_id,
        most_rounds=rounds_left(state),
        jobs=state.jobs + (state.uploaded_round >= 0),
        verdict=state.verdict,
        refused_id=state.refused_id,
        done=state.done or (state.phase is Phase.SERVE and not state.failure),
    )


def rolled_back(state: State, student_id: str) -> State:
    """Return the state in which the device uses the student before; whatever it was doing goes on."""
    return replace(state, active_id=student_id, repair_id="")


def moved(state: State, release: str) -> State:
    """Return the state in which the device has followed the offer of a release, or uses it already."""
    return replace(state, moved_to=release)


def withdrawn(state: State, student_id: str, substitute_id: str, reason: str) -> State:
    """Return the state in which another student has replaced the one in use, which did not prove itself."""
    if student_id != state.active_id:
        return state
    return replace(state, active_id=substitute_id, verdict=reason, refused_id=student_id)


def rounds_left(state: State) -> int:
    """Return the uploads that another job may have: round 0 is sent again as it is, later rounds remain counted."""
    return max(1, state.most_rounds - max(0, state.uploaded_round))
