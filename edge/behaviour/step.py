"""The device's whole behaviour as data: ``step(state, event, now_s) -> (state, actions)``. Pure.

The runtime performs actions and reports the results as events; it decides nothing. An event that does not belong to
the present phase changes nothing, so late, repeated or reordered events are harmless. The small state is written to
disk after every step: a device that restarts reports ``Started`` and continues.

    ENROL -> FETCH base -> VERIFY -> SWAP -> ENCODE -> UPLOAD -> WATCH -> FETCH final -> VERIFY -> JUDGE
                                               ^                   |                                 |  |
                                               +- VERIFY <- FETCH interim (a later round)     refused|  +-> SWAP
                                                                                                     v       v
                                                                                                     SERVE <-+

A student becomes the active one only by ``Swap``. ``Swap`` follows ``Verified`` for the same student, and for a final
student also ``Judged`` with acceptance. A refused student stays installed, and the active one goes on. An interim
student makes prototypes and is never swapped in, because it cannot answer.

No error is final. Errors of the link are tried again after at most a minute, or when a busy cloud has asked for it.
Every other error is tried again after pauses that grow to an hour, in the same phase; ``failure`` says why. A student
that is damaged on disk is fetched again (``Repair``) while another sound one answers. If the cloud has lost or failed
a job, the same prototypes start another one, with the rounds that are left.

The cloud never gets more uploads than ``most_rounds`` in one personalisation, whatever it asks for.
"""

from collections.abc import Sequence
from dataclasses import replace

from isthmus.edge.behaviour.events import (
    Accepted,
    Action,
    Answered,
    Damaged,
    Encoded,
    Enrol,
    Enrolled,
    Event,
    Failed,
    Fetch,
    Fetched,
    JobChanged,
    Judge,
    Judged,
    MakePrototypes,
    Repair,
    Repaired,
    Serve,
    Started,
    Swap,
    Swapped,
    Tick,
    Upload,
    Verified,
    Verify,
    Wait,
    Watch,
    WatchEnded,
)
from isthmus.edge.behaviour.pauses import HINT_MOST_S, NEEDS_A_PERSON, TROUBLE_MOST_S, backoff_s
from isthmus.edge.behaviour.state import Phase, Purpose, State, rounds_left
from isthmus.edge.own_clips.budget import BudgetSpent
from isthmus.edge.student.trust import Refused
from isthmus.proto.errors import (
    Busy,
    Corrupt,
    InvalidInput,
    IsthmusError,
    NotYours,
    OutOfOrder,
    Unauthenticated,
    Unavailable,
    WrongState,
)
from isthmus.proto.messages import JobStatus, Stage


class NothingToSend(IsthmusError):
    """The prototypes that were to be sent are gone from the outbox; they are made again."""


def step(state: State, event: Event, now_s: float) -> tuple[State, Sequence[Action]]:
    """Return the state after ``event`` and the next actions. ``now_s`` is a monotonic clock."""
    match event:
        case Started(most_rounds):
            return _started(state, most_rounds)
        case Tick():
            return _tick(state, now_s)
        case Failed(error, jitter, progress):
            return _failed(replace(state, attempt=0) if progress else state, error, jitter, now_s)
        case WatchEnded(jitter):
            if state.phase is not Phase.WATCH or state.repair_id or state.retry_at_s is not None:
                return state, ()
            return _retry_later(state, jitter, now_s)
        case Answered():
            return (_link_works(state), ()) if state.phase is Phase.SERVE and not state.repair_id else (state, ())
        case JobChanged(status, jitter):
            return _job_changed(state, status, jitter, now_s)
        case Damaged(student_id, substitute_id):
            return _damaged(state, student_id, substitute_id)
        case Repaired(student_id):
            if not state.repair_id or student_id != state.repair_id:
                return state, ()
            return _enter(_link_works(state), state.phase, active_id=student_id, repair_id="")
        case _:
            return _finished(state, event)


def _started(state: State, most_rounds: int) -> tuple[State, Sequence[Action]]:
    if state.uploaded_round >= 0 or state.jobs:
        most_rounds = min(most_rounds, state.most_rounds)  # What was agreed for this personalisation is never raised.
    fresh = replace(state, attempt=0, refusals=0, retry_at_s=None, most_rounds=most_rounds)
    if state.phase is Phase.STOPPED:
        fresh = replace(fresh, phase=Phase.ENROL, failure="")
    elif state.phase is Phase.SERVE and state.failure and not state.repair_id:
        # Development versions before 0.1.0 gave up here; their state does not say in which phase.
        fresh = replace(fresh, phase=Phase.WATCH if state.job_id else Phase.ENCODE, failure="")
    fresh = replace(fresh, link_up=fresh.phase is Phase.SERVE)
    return fresh, (_due(fresh),)


def _due(state: State) -> Action:
    """Return the action of the phase. A retry or restart repeats it, so every action must be safe to repeat."""
    if state.repair_id and state.phase is not Phase.ENROL:
        return Repair(state.repair_id)
    match state.phase:
        case Phase.ENROL | Phase.STOPPED:
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


_AFTER_VERIFY = {Purpose.BASE: Phase.SWAP, Purpose.INTERIM: Phase.ENCODE, Purpose.FINAL: Phase.JUDGE}


_ABOUT_FINAL = (Phase.FETCH, Phase.VERIFY, Phase.JUDGE, Phase.SWAP)


def _enter(state: State, phase: Phase, **changes: object) -> tuple[State, Sequence[Action]]:
    entered = replace(
        state,
        phase=phase,
        attempt=0,
        refusals=0,
        retry_at_s=None,
        failure="",
        **changes,  # type: ignore[arg-type]
    )
    return entered, (_due(entered),)


def _finished(state: State, event: Event) -> tuple[State, Sequence[Action]]:
    """Handle the success of the present action; a report of any other action changes nothing."""
    if state.repair_id and state.phase is not Phase.ENROL:
        return state, ()
    match state.phase, event:
        case Phase.ENROL, Enrolled(keeps, most_rounds):
            state = replace(state, most_rounds=min(state.most_rounds, most_rounds))
            if keeps and state.active_id:
                return _enter(state, Phase.SERVE if state.done else Phase.ENCODE, link_up=True)
            return _fetch_base(state)
        case Phase.FETCH, Fetched(student_id) if student_id and state.wanted_id in ("", student_id):
            # Refusals are kept: if a complete download fails its hash every time, the pauses must grow.
            verifying = replace(_link_works(state), phase=Phase.VERIFY, wanted_id=student_id)
            return verifying, (_due(verifying),)
        case Phase.VERIFY, Verified(student_id) if student_id == state.wanted_id:
            return _enter(state, _AFTER_VERIFY[state.purpose])
        case Phase.JUDGE, Judged(student_id, accept, reason) if student_id == state.wanted_id:
            if accept:
                return _enter(state, Phase.SWAP, verdict=reason, refused_id="")
            return _enter(state, Phase.SERVE, verdict=reason, refused_id=student_id, done=True)
        case Phase.SWAP, Swapped(student_id) if student_id == state.wanted_id:
            if state.purpose is Purpose.BASE:
                return _enter(state, Phase.ENCODE, active_id=student_id, base_id=student_id)
            return _enter(state, Phase.SERVE, active_id=student_id, done=True)
        case Phase.ENCODE, Encoded(round) if round == state.round:
            return _enter(state, Phase.UPLOAD)
        case Phase.UPLOAD, Accepted(round, status) if round == state.round and state.job_id in ("", status.job_id):
            return _enter(state, Phase.WATCH, job_id=status.job_id, uploaded_round=round, link_up=True)
        case _:
            return state, ()


def _fetch_base(state: State) -> tuple[State, Sequence[Action]]:
    return _enter(
        state,
        Phase.FETCH,
        purpose=Purpose.BASE,
        wanted_id="",
        active_id="",
        base_id="",
        repair_id="",
        done=False,
        link_up=True,
    )


def _job_changed(state: State, status: JobStatus, jitter: float, now_s: float) -> tuple[State, Sequence[Action]]:
    if state.phase is not Phase.WATCH or state.repair_id or status.job_id != state.job_id:
        return state, ()
    state = _link_works(state)
    match status.stage:
        case Stage.READY if status.student_id:
            return _enter(state, Phase.FETCH, purpose=Purpose.FINAL, wanted_id=status.student_id)
        case Stage.READY:
            return _job_lost(state, "the cloud finished the job but names no student", jitter, now_s)
        case Stage.FAILED:
            reason = f"the cloud could not personalise: {status.error or 'no reason given'}"
            return _job_lost(state, reason, jitter, now_s)
        case Stage.AWAITING_PROTOTYPES if status.round > state.uploaded_round and status.student_id:
            if status.round >= state.most_rounds:
                reason = (
                    f"the cloud asks for prototypes of round {status.round + 1}, but {state.most_rounds} are allowed; "
                    "nothing more is sent"
                )
                return _trouble(state, reason, jitter, now_s, least=NEEDS_A_PERSON)
            return _enter(state, Phase.FETCH, purpose=Purpose.INTERIM, wanted_id=status.student_id, round=status.round)
        case _:
            return replace(state, failure="", refusals=0), ()


def _damaged(state: State, student_id: str, substitute_id: str) -> tuple[State, Sequence[Action]]:
    if not student_id or student_id != state.active_id or substitute_id == student_id:
        return state, ()
    # A substitute that is damaged itself does not change which student is missing.
    wanted = state.repair_id or student_id
    damaged = replace(state, active_id=substitute_id, repair_id=wanted, attempt=0, refusals=0, retry_at_s=None)
    return damaged, (_due(damaged),)


def _tick(state: State, now_s: float) -> tuple[State, Sequence[Action]]:
    if state.retry_at_s is None:
        return state, ()
    if now_s < state.retry_at_s:
        return state, (Wait(state.retry_at_s),)
    due = replace(state, retry_at_s=None)
    if due.phase is Phase.SERVE and not due.repair_id:
        return replace(due, link_up=True), ()
    return due, (_due(due),)


def _failed(state: State, error: IsthmusError, jitter: float, now_s: float) -> tuple[State, Sequence[Action]]:
    if state.retry_at_s is not None:
        return state, ()
    if state.phase is Phase.SERVE and not state.repair_id:
        return _retry_later(state, jitter, now_s, error) if isinstance(error, Unavailable | Busy) else (state, ())
    if isinstance(error, Unavailable | Busy):
        return _retry_later(state, jitter, now_s, error)
    if state.repair_id and state.phase is not Phase.ENROL:
        if isinstance(error, NotYours) and not state.active_id:
            return _fetch_base(state)  # The cloud no longer has that student, and there is none to go on with.
        return _trouble(state, str(error), jitter, now_s)
    if isinstance(error, NothingToSend) and state.phase is Phase.UPLOAD:
        return _enter(state, Phase.ENCODE)
    if state.phase is Phase.UPLOAD and state.round > 0 and isinstance(error, WrongState | OutOfOrder):
        # The cloud is past this round: an earlier try arrived, and only its answer was lost.
        return _enter(state, Phase.WATCH, uploaded_round=state.round)
    if isinstance(error, NotYours) and state.job_id:
        return _job_lost(state, f"the cloud no longer has this job: {error}", jitter, now_s)
    if isinstance(error, Corrupt) and state.phase is Phase.JUDGE:
        return _finished(
            state, Judged(state.wanted_id, False, f"the new student fails on this device's clips: {error}")
        )
    refused = isinstance(error, Refused) or (state.phase is Phase.VERIFY and isinstance(error, InvalidInput))
    if state.purpose is Purpose.FINAL and state.phase in _ABOUT_FINAL and state.active_id and refused:
        # Its bytes are those that the cloud signed: fetching them again would not help.
        return _enter(state, Phase.SERVE, verdict=str(error), refused_id=state.wanted_id, done=True)
    again = Phase.FETCH if state.phase is Phase.VERIFY else state.phase
    hopeless = isinstance(error, InvalidInput | Unauthenticated | BudgetSpent)
    return _trouble(replace(state, phase=again), str(error), jitter, now_s, least=NEEDS_A_PERSON if hopeless else 1)


def _job_lost(state: State, reason: str, jitter: float, now_s: float) -> tuple[State, Sequence[Action]]:
    """Start another job after a pause. Round 0 sends the same prototypes; uploads of later rounds remain counted."""
    lost = replace(
        state,
        phase=Phase.UPLOAD,
        purpose=Purpose.BASE,
        wanted_id="",
        job_id="",
        round=0,
        uploaded_round=-1,
        most_rounds=rounds_left(state),
        jobs=state.jobs + 1,
    )
    return _trouble(lost, reason, jitter, now_s, least=NEEDS_A_PERSON)


def _trouble(
    state: State, reason: str, jitter: float, now_s: float, *, least: int = 1
) -> tuple[State, Sequence[Action]]:
    """Try the phase again after a pause that grows to an hour."""
    refusals = max(state.refusals + 1, least)
    retry_at_s = now_s + backoff_s(refusals, jitter, TROUBLE_MOST_S)
    return replace(state, refusals=refusals, retry_at_s=retry_at_s, failure=reason), (Wait(retry_at_s),)


def _retry_later(
    state: State, jitter: float, now_s: float, error: IsthmusError | None = None
) -> tuple[State, Sequence[Action]]:
    """Try again after a pause that grows to a minute, and not before the time that a busy cloud has named."""
    attempt = state.attempt + 1
    hint_s = (isinstance(error, Busy) and error.retry_after_s) or 0.0
    retry_at_s = now_s + max(backoff_s(attempt, jitter), min(hint_s, HINT_MOST_S) * (1.0 + 0.5 * jitter))
    return replace(state, attempt=attempt, retry_at_s=retry_at_s, link_up=False), (Wait(retry_at_s),)


def _link_works(state: State) -> State:
    return replace(state, link_up=True, attempt=0, retry_at_s=None)
