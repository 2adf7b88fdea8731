"""The device's whole behaviour as data: ``step(state, event, now_s) -> (state, actions)``. Pure.

The runtime performs actions and reports what happened as events; it never decides. An event that does not belong to
the present phase changes nothing, so late, doubled or reordered events are harmless. The state is small and is
written to disk after every step: a device that restarts says ``Started`` and goes on where it was.

    ENROL -> FETCH base -> VERIFY -> SWAP -> ENCODE -> UPLOAD -> WATCH -> FETCH final -> VERIFY -> JUDGE
                                               ^                   |                                 |  |
                                               +- VERIFY <- FETCH interim (a later round)     refused|  +-> SWAP
                                                                                                     v       v
                                                                                                     SERVE <-+

A student becomes the current one only by ``Swap``, and ``Swap`` is asked for only after ``Verified`` for that very
student, and for a final one after ``Judged`` accepted it: a refused student stays installed, and the present one goes
on. An interim student makes prototypes and is never swapped in: it cannot answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum

from isthmus.proto.errors import Busy, Corrupt, IsthmusError, OutOfOrder, StorageFull, Unavailable, WrongState
from isthmus.proto.messages import JobStatus, Stage

BACKOFF_FIRST_S = 0.5
BACKOFF_MOST_S = 60.0
MOST_REFUSALS = 5
"""Tries for errors that a retry may mend but that are not the link's: a damaged download, a full disk."""


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
    """``wanted_id``: the student being fetched ("" = the newest). ``active_id``: the one in use. ``base_id``: the one
    that personalisation began with. ``round``: of the prototypes being made or last sent. ``uploaded_round``: the
    last one the cloud has acknowledged. ``attempt`` counts tries since the link last worked, ``refusals`` those that
    failed for another reason than the link. ``verdict``: what came of comparing the last final student with the one
    in use; ``refused_id``: that student, where it was refused."""

    phase: Phase = Phase.ENROL
    purpose: Purpose = Purpose.BASE
    wanted_id: str = ""
    active_id: str = ""
    base_id: str = ""
    job_id: str = ""
    round: int = 0
    uploaded_round: int = -1
    link_up: bool = False
    attempt: int = 0
    refusals: int = 0
    retry_at_s: float | None = None
    failure: str = ""
    verdict: str = ""
    refused_id: str = ""


@dataclass(frozen=True)
class Started:
    """The process began, with a fresh or a stored state."""


@dataclass(frozen=True)
class Enrolled:
    pass


@dataclass(frozen=True)
class Fetched:
    student_id: str


@dataclass(frozen=True)
class Verified:
    student_id: str


@dataclass(frozen=True)
class Judged:
    """The verified student was compared with the one in use."""

    student_id: str
    accept: bool
    reason: str


@dataclass(frozen=True)
class Swapped:
    student_id: str


@dataclass(frozen=True)
class Encoded:
    """The prototypes of ``round`` lie in the outbox."""

    round: int


@dataclass(frozen=True)
class Accepted:
    """The cloud holds the prototypes of ``round``."""

    round: int
    status: JobStatus


@dataclass(frozen=True)
class JobChanged:
    status: JobStatus


@dataclass(frozen=True)
class WatchEnded:
    """The stream closed before the job did. ``jitter`` is uniform in [0, 1)."""

    jitter: float


@dataclass(frozen=True)
class Failed:
    """An action did not succeed. ``jitter`` is uniform in [0, 1)."""

    error: IsthmusError
    jitter: float


@dataclass(frozen=True)
class Tick:
    """Time has passed."""


@dataclass(frozen=True)
class Answered:
    """The cloud answered a clip."""


Event = (
    Started
    | Enrolled
    | Fetched
    | Verified
    | Judged
    | Swapped
    | Encoded
    | Accepted
    | JobChanged
    | WatchEnded
    | Failed
    | Tick
    | Answered
)


@dataclass(frozen=True)
class Enrol:
    pass


@dataclass(frozen=True)
class Fetch:
    """Bring every file of the student to the staging folder. "" names the newest."""

    student_id: str


@dataclass(frozen=True)
class Verify:
    """Check sizes, hashes and signature of the fetched student, and that it runs."""

    student_id: str


@dataclass(frozen=True)
class Judge:
    """Compare the verified student with the one in use, on the device's own clips."""

    old_id: str
    new_id: str


@dataclass(frozen=True)
class Swap:
    """Make the verified student the current one, atomically."""

    student_id: str


@dataclass(frozen=True)
class MakePrototypes:
    """Encode the selection clips with this student and put the prototypes of ``round`` into the outbox."""

    student_id: str
    round: int


@dataclass(frozen=True)
class Upload:
    """Send the outbox's prototypes of ``round``. An empty job id starts a job."""

    job_id: str
    round: int


@dataclass(frozen=True)
class Watch:
    """Follow the job; stop as soon as the agent asks for something else."""

    job_id: str


@dataclass(frozen=True)
class Wait:
    """Nothing to do before ``until_s``; then say Tick."""

    until_s: float


@dataclass(frozen=True)
class Serve:
    """Personalisation is over, well or badly: answer clips as ``answering`` says."""


@dataclass(frozen=True)
class Stop:
    """Nothing can be done without a person."""

    reason: str


Action = Enrol | Fetch | Verify | Judge | Swap | MakePrototypes | Upload | Watch | Wait | Serve | Stop


def answering(state: State) -> Answering:
    """How a clip that comes now is answered: the finished student through the cloud while the link stands."""
    if not state.active_id:
        return Answering.NOT_YET
    return Answering.CLOUD if state.link_up and state.phase is Phase.SERVE else Answering.LOCAL


def backoff_s(attempt: int, jitter: float) -> float:
    """Seconds before try ``attempt`` (from 1): doubling up to a minute, the upper half of it random."""
    longest_s = min(BACKOFF_MOST_S, BACKOFF_FIRST_S * 2.0 ** min(attempt - 1, 16))
    return longest_s * (0.5 + 0.5 * jitter)


def personalise_again(state: State) -> State:
    """The state from which a device that has finished starts another personalisation, with its present student."""
    phase = Phase.ENCODE if state.active_id else Phase.ENROL
    return State(phase=phase, active_id=state.active_id, base_id=state.active_id)


def step(state: State, event: Event, now_s: float) -> tuple[State, Sequence[Action]]:
    """The state after ``event`` and what to do next. ``now_s`` is a monotonic clock."""
    match event:
        case Started():
            fresh = replace(state, attempt=0, refusals=0, retry_at_s=None, link_up=state.phase is Phase.SERVE)
            return fresh, (_due(fresh),)
        case Tick():
            return _tick(state, now_s)
        case Failed(error, jitter):
            return _failed(state, error, jitter, now_s)
        case WatchEnded(jitter):
            if state.phase is not Phase.WATCH or state.retry_at_s is not None:
                return state, ()
            return _retry_later(state, jitter, now_s)
        case Answered():
            return (_link_works(state), ()) if state.phase is Phase.SERVE else (state, ())
        case JobChanged(status):
            return _job_changed(state, status)
        case _:
            return _finished(state, event)


def _due(state: State) -> Action:
    """What the phase asks for: also what a retry or a restart does again, so every action is safe to repeat."""
    match state.phase:
        case Phase.ENROL:
            return Enrol()
        case Phase.FETCH:
            return Fetch(state.wanted_id)
        case Phase.VERIFY:
            return Verify(state.wanted_id)
        case Phase.JUDGE:
            return Judge(state.active_id, state.wanted_id)
        case Phase.SWAP:
            return Swap(state.wanted_id)
        case Phase.ENCODE:
            interim = state.purpose is Purpose.INTERIM
            return MakePrototypes(state.wanted_id if interim else state.active_id, state.round)
        case Phase.UPLOAD:
            return Upload(state.job_id, state.round)
        case Phase.WATCH:
            return Watch(state.job_id)
        case Phase.SERVE:
            return Serve()
        case Phase.STOPPED:
            return Stop(state.failure)


_AFTER_VERIFY = {Purpose.BASE: Phase.SWAP, Purpose.INTERIM: Phase.ENCODE, Purpose.FINAL: Phase.JUDGE}


def _enter(state: State, phase: Phase, **changes: object) -> tuple[State, Sequence[Action]]:
    entered = replace(state, phase=phase, attempt=0, refusals=0, retry_at_s=None, **changes)  # type: ignore[arg-type]
    return entered, (_due(entered),)


def _finished(state: State, event: Event) -> tuple[State, Sequence[Action]]:
    """The present action succeeded; a report of any other action changes nothing."""
    match state.phase, event:
        case Phase.ENROL, Enrolled():
            return _enter(state, Phase.FETCH, purpose=Purpose.BASE, wanted_id="", link_up=True)
        case Phase.FETCH, Fetched(student_id) if student_id and state.wanted_id in ("", student_id):
            # Refusals are kept: a download that arrives whole and fails its hash every time must end somewhere.
            verifying = replace(_link_works(state), phase=Phase.VERIFY, wanted_id=student_id)
            return verifying, (_due(verifying),)
        case Phase.VERIFY, Verified(student_id) if student_id == state.wanted_id:
            return _enter(state, _AFTER_VERIFY[state.purpose])
        case Phase.JUDGE, Judged(student_id, accept, reason) if student_id == state.wanted_id:
            if accept:
                return _enter(state, Phase.SWAP, verdict=reason, refused_id="")
            return _enter(state, Phase.SERVE, verdict=reason, refused_id=student_id)
        case Phase.SWAP, Swapped(student_id) if student_id == state.wanted_id:
            if state.purpose is Purpose.BASE:
                return _enter(state, Phase.ENCODE, active_id=student_id, base_id=student_id)
            return _enter(state, Phase.SERVE, active_id=student_id)
        case Phase.ENCODE, Encoded(round) if round == state.round:
            return _enter(state, Phase.UPLOAD)
        case Phase.UPLOAD, Accepted(round, status) if round == state.round and state.job_id in ("", status.job_id):
            return _enter(state, Phase.WATCH, job_id=status.job_id, uploaded_round=round, link_up=True)
        case _:
            return state, ()


def _job_changed(state: State, status: JobStatus) -> tuple[State, Sequence[Action]]:
    if state.phase is not Phase.WATCH or status.job_id != state.job_id:
        return state, ()
    state = _link_works(state)
    match status.stage:
        case Stage.READY if status.student_id:
            return _enter(state, Phase.FETCH, purpose=Purpose.FINAL, wanted_id=status.student_id)
        case Stage.READY:
            return _give_up(state, "the cloud finished the job but names no student")
        case Stage.FAILED:
            return _give_up(state, f"the cloud could not personalise: {status.error or 'no reason given'}")
        case Stage.AWAITING_PROTOTYPES if status.round > state.uploaded_round and status.student_id:
            return _enter(state, Phase.FETCH, purpose=Purpose.INTERIM, wanted_id=status.student_id, round=status.round)
        case _:
            return state, ()


def _tick(state: State, now_s: float) -> tuple[State, Sequence[Action]]:
    if state.retry_at_s is None:
        return state, ()
    if now_s < state.retry_at_s:
        return state, (Wait(state.retry_at_s),)
    due = replace(state, retry_at_s=None)
    if due.phase is Phase.SERVE:
        return replace(due, link_up=True), ()
    return due, (_due(due),)


def _failed(state: State, error: IsthmusError, jitter: float, now_s: float) -> tuple[State, Sequence[Action]]:
    if state.phase is Phase.STOPPED or state.retry_at_s is not None:
        return state, ()
    if state.phase is Phase.SERVE:
        if not isinstance(error, Unavailable):
            return state, ()
        return _retry_later(state, jitter, now_s)
    if state.phase is Phase.UPLOAD and state.round > 0 and isinstance(error, (WrongState, OutOfOrder)):
        # The cloud is past this round: an earlier try arrived and only its answer was lost.
        return _enter(state, Phase.WATCH, uploaded_round=state.round)
    if isinstance(error, (Unavailable, Busy)):
        return _retry_later(state, jitter, now_s)
    if isinstance(error, (Corrupt, StorageFull)) and state.refusals < MOST_REFUSALS:
        again = Phase.FETCH if state.phase is Phase.VERIFY else state.phase
        refused = replace(state, phase=again, refusals=state.refusals + 1)
        return _retry_later(refused, jitter, now_s, link_up=state.link_up)
    return _give_up(state, str(error))


def _retry_later(state: State, jitter: float, now_s: float, *, link_up: bool = False) -> tuple[State, Sequence[Action]]:
    attempt = state.attempt + 1
    retry_at_s = now_s + backoff_s(attempt, jitter)
    return replace(state, attempt=attempt, retry_at_s=retry_at_s, link_up=link_up), (Wait(retry_at_s),)


def _link_works(state: State) -> State:
    return replace(state, link_up=True, attempt=0, retry_at_s=None)


def _give_up(state: State, reason: str) -> tuple[State, Sequence[Action]]:
    """Personalisation ends here. With a student in place the device goes on answering with it."""
    return _enter(state, Phase.SERVE if state.active_id else Phase.STOPPED, failure=reason)
