"""PURE: the life of a personalisation, from a device's prototypes to its finished student.

    queued ──Taken──> selecting ──Selected──> distilling ──Distilled──┬─(last round)─> compressing ──HeadsTrained──┐
                          ^                                           │                                            v
                          └──Uploaded── awaiting_prototypes <─Exported┴────────────────────────────────────── exporting
                                                                                              ready <──Exported────┘
    any stage but ready ──Failed | Expired──> failed

After each round but the last the interim student is exported, and the device is asked for new prototypes. If a round's
selection is nearly that of the round before (``Selected.settled``), it is the last round: it trains all the epochs that
remain, so that only downloads and prototypes are saved.

``step`` is the only place where a job changes. It reads no clock and does no I/O: it returns the actions to perform,
and their outcome is the next event. If a worker died in the middle of a stage, the next one takes the job again
(``Taken``) and gets the action of that stage again, so each action must be safe to repeat.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final, assert_never

from isthmus.proto.errors import OutOfOrder, WrongState
from isthmus.proto.messages import JobStatus, Stage

MAX_ATTEMPTS: Final = 5
"""Number of times a job may kill its worker without progress before it fails."""

MAX_ERROR_CHARS: Final = 300

_RETRY_FIRST_S: Final = 5.0
_RETRY_LONGEST_S: Final = 300.0

# Share of the whole job, for the progress bar: (at the start of the stage, at its end), within the rounds or after.
_ROUNDS_SHARE: Final = 0.80
_SELECTING_SHARE: Final = 0.05
_COMPRESSED_AT: Final = 0.95


@dataclass(frozen=True)
class Job:
    """The whole state of a job; one row of the table ``jobs``. Times are Unix seconds."""

    job_id: str
    device_id: str
    idempotency_key: str
    release_hash: str
    seed: int
    rounds: int
    created_s: float
    updated_s: float
    stage: Stage = Stage.QUEUED
    round: int = 0
    epoch: int = 0
    epochs: int = 0
    progress: float = 0.0
    attempts: int = 0
    """Number of times the job killed its worker since it last made progress."""
    stalls: int = 0
    """Number of times the job stalled since it last made progress."""
    not_before_s: float = 0.0
    selected_per_class: tuple[int, ...] = ()
    stage_seconds: Mapping[str, float] = field(default_factory=dict)
    student_id: str = ""
    error: str = ""
    settled: bool = False
    """The current round is the last although ``rounds`` were planned, because its selection has settled."""

    @property
    def last_round(self) -> bool:
        return self.settled or self.round + 1 >= self.rounds


# ---- events


@dataclass(frozen=True)
class Taken:
    """A worker takes the job, for the first time or again.

    ``crashed``: the worker before died of this job. A worker that was stopped from outside (by ``kill -9``, with its
    server, or with the machine) is no failure of the job.
    """

    crashed: bool = False


@dataclass(frozen=True)
class Selected:
    """The round's public clips are selected and stored. ``settled``: nearly the same as those of the round before."""

    per_class: tuple[int, ...]
    settled: bool = False


@dataclass(frozen=True)
class EpochDone:
    """An epoch of distilling or compressing is done; counted from 1 over the stage."""

    epoch: int
    epochs: int


@dataclass(frozen=True)
class Distilled:
    """The round's student is trained and stored."""


@dataclass(frozen=True)
class HeadsTrained:
    """Compressors and heads are trained and stored."""


@dataclass(frozen=True)
class Exported:
    """The student is published under ``student_id``."""

    student_id: str


@dataclass(frozen=True)
class Uploaded:
    """The device sent the prototypes of ``round``."""

    round: int


@dataclass(frozen=True)
class Stalled:
    """Something outside the job (a full disk) stopped it. The same stage is tried again later, as often as it takes."""

    reason: str


@dataclass(frozen=True)
class Failed:
    reason: str


@dataclass(frozen=True)
class Expired:
    """The device has not sent its prototypes for too long."""


Event = Taken | Selected | EpochDone | Distilled | HeadsTrained | Exported | Uploaded | Stalled | Failed | Expired

# ---- actions


@dataclass(frozen=True)
class Select:
    round: int


@dataclass(frozen=True)
class Distil:
    round: int


@dataclass(frozen=True)
class TrainHeads:
    round: int


@dataclass(frozen=True)
class Export:
    round: int
    final: bool


@dataclass(frozen=True)
class Discard:
    """Remove the job's working files: it has ended."""


Action = Select | Distil | TrainHeads | Export | Discard
Step = tuple[Job, tuple[Action, ...]]

SUCCESSORS: Final[Mapping[Stage, frozenset[Stage]]] = {
    Stage.QUEUED: frozenset({Stage.SELECTING, Stage.FAILED}),
    Stage.SELECTING: frozenset({Stage.DISTILLING, Stage.FAILED}),
    Stage.DISTILLING: frozenset({Stage.EXPORTING, Stage.COMPRESSING, Stage.FAILED}),
    Stage.AWAITING_PROTOTYPES: frozenset({Stage.SELECTING, Stage.FAILED}),
    Stage.COMPRESSING: frozenset({Stage.EXPORTING, Stage.FAILED}),
    Stage.EXPORTING: frozenset({Stage.AWAITING_PROTOTYPES, Stage.READY, Stage.FAILED}),
    Stage.READY: frozenset(),
    Stage.FAILED: frozenset(),
}
"""The graph of stages: where a single step may lead from each stage, besides staying there."""

RUNNABLE: Final = frozenset({Stage.QUEUED, Stage.SELECTING, Stage.DISTILLING, Stage.COMPRESSING, Stage.EXPORTING})
"""Stages in which a job needs a worker."""


def step(job: Job, event: Event, now_s: float) -> Step:
    """Return the job after ``event`` and the actions to perform next.

    Raises OutOfOrder for prototypes of a round that is not awaited, and WrongState for any other event that does not
    fit the job's stage. The job is then unchanged.
    """
    match event:
        case Taken(crashed):
            return _taken(job, crashed, now_s)
        case Selected(per_class, settled):
            _require(job, Stage.SELECTING, event)
            # Round 0 has no predecessor to compare with, and the last planned round has nothing to cut.
            cut = settled and job.round > 0 and not job.last_round
            job = replace(_enter(job, Stage.DISTILLING, now_s, selected_per_class=per_class), settled=cut)
            return job, (Distil(job.round),)
        case EpochDone(epoch, epochs):
            _require(job, (Stage.DISTILLING, Stage.COMPRESSING), event)
            job = replace(_timed(job, now_s), epoch=epoch, epochs=epochs, attempts=0, stalls=0, error="")
            return _measured(job), ()
        case Distilled():
            _require(job, Stage.DISTILLING, event)
            if job.last_round:
                job = _enter(job, Stage.COMPRESSING, now_s, epoch=0, epochs=0)
                return job, (TrainHeads(job.round),)
            return _enter(job, Stage.EXPORTING, now_s), (Export(job.round, final=False),)
        case HeadsTrained():
            _require(job, Stage.COMPRESSING, event)
            return _enter(job, Stage.EXPORTING, now_s), (Export(job.round, final=True),)
        case Exported(student_id):
            _require(job, Stage.EXPORTING, event)
            if job.last_round:
                return _enter(job, Stage.READY, now_s, student_id=student_id), (Discard(),)
            return _enter(job, Stage.AWAITING_PROTOTYPES, now_s, student_id=student_id, round=job.round + 1), ()
        case Uploaded(round):
            _require(job, Stage.AWAITING_PROTOTYPES, event)
            if round != job.round:
                raise OutOfOrder(f"prototypes of round {job.round} are awaited, not of round {round}")
            job = _enter(job, Stage.SELECTING, now_s)
            return job, (Select(job.round),)
        case Stalled(reason):
            return _stalled(job, reason, now_s)
        case Failed(reason):
            if job.stage.ended:
                raise WrongState(f"the job has ended ({job.stage.value})")
            return _enter(job, Stage.FAILED, now_s, error=reason[:MAX_ERROR_CHARS]), (Discard(),)
        case Expired():
            _require(job, Stage.AWAITING_PROTOTYPES, event)
            reason = f"the prototypes of round {job.round} never arrived; start again"
            return _enter(job, Stage.FAILED, now_s, error=reason), (Discard(),)
        case _:
            assert_never(event)


def status(job: Job) -> JobStatus:
    """Return the status of a job as the device sees it."""
    spent_s = sum(job.stage_seconds.get(stage.value, 0.0) for stage in RUNNABLE - {Stage.QUEUED})
    running = not job.stage.ended and job.progress > 0
    return JobStatus(
        job_id=job.job_id,
        stage=job.stage,
        round=job.round,
        rounds=job.rounds,
        epoch=job.epoch,
        epochs=job.epochs,
        progress=job.progress,
        eta_s=spent_s * (1 - job.progress) / job.progress if running else 0.0,
        student_id=job.student_id,
        selected_per_class=job.selected_per_class,
        stage_seconds=dict(job.stage_seconds),
        error=job.error,
        settled=job.settled,
    )


def _taken(job: Job, crashed: bool, now_s: float) -> Step:
    if job.stage not in RUNNABLE:
        raise WrongState(f"a job that is {job.stage.value} needs no worker")
    attempts = job.attempts + 1 if crashed else job.attempts
    if attempts >= MAX_ATTEMPTS:
        reason = job.error or f"the worker crashed {attempts} times while {job.stage.value}; see the server's log"
        return _enter(job, Stage.FAILED, now_s, error=reason), (Discard(),)
    if job.stage is Stage.QUEUED:
        job = replace(_enter(job, Stage.SELECTING, now_s), attempts=attempts)
    else:
        # The time since the last step was lost with the worker that died. It does not count as work of this stage.
        job = replace(job, attempts=attempts, updated_s=now_s)
    return job, (_work(job),)


def _work(job: Job) -> Action:
    match job.stage:
        case Stage.SELECTING:
            return Select(job.round)
        case Stage.DISTILLING:
            return Distil(job.round)
        case Stage.COMPRESSING:
            return TrainHeads(job.round)
        case _:
            return Export(job.round, final=job.last_round)


def _stalled(job: Job, reason: str, now_s: float) -> Step:
    if job.stage not in RUNNABLE:
        raise WrongState(f"a job that is {job.stage.value} cannot stall")
    wait_s = min(_RETRY_LONGEST_S, _RETRY_FIRST_S * 2.0 ** min(job.stalls, 20))
    job = replace(
        _timed(job, now_s), stalls=job.stalls + 1, error=reason[:MAX_ERROR_CHARS], not_before_s=now_s + wait_s
    )
    return job, ()


def _require(job: Job, stage: Stage | tuple[Stage, ...], event: Event) -> None:
    allowed = stage if isinstance(stage, tuple) else (stage,)
    if job.stage not in allowed:
        raise WrongState(f"the job is {job.stage.value}: {_named(event)} does not fit")


def _named(event: Event) -> str:
    return "an upload of prototypes" if isinstance(event, Uploaded) else type(event).__name__


def _timed(job: Job, now_s: float) -> Job:
    """Add the time since the last step to the stage. If the clock was set back, add nothing."""
    seconds = dict(job.stage_seconds)
    seconds[job.stage.value] = seconds.get(job.stage.value, 0.0) + max(0.0, now_s - job.updated_s)
    return replace(job, stage_seconds=seconds, updated_s=now_s)


def _enter(
    job: Job,
    stage: Stage,
    now_s: float,
    *,
    error: str = "",
    round: int | None = None,
    epoch: int | None = None,
    epochs: int | None = None,
    student_id: str | None = None,
    selected_per_class: tuple[int, ...] | None = None,
) -> Job:
    job = replace(
        _timed(job, now_s),
        stage=stage,
        attempts=0,
        stalls=0,
        not_before_s=0.0,
        error=error,
        round=job.round if round is None else round,
        epoch=job.epoch if epoch is None else epoch,
        epochs=job.epochs if epochs is None else epochs,
        student_id=job.student_id if student_id is None else student_id,
        selected_per_class=job.selected_per_class if selected_per_class is None else selected_per_class,
    )
    return _measured(job)


def _measured(job: Job) -> Job:
    """Update the progress of the whole job. It never decreases."""
    done = min(1.0, job.epoch / job.epochs) if job.epochs else 0.0
    per_round = _ROUNDS_SHARE / job.rounds
    match job.stage:
        case Stage.QUEUED | Stage.FAILED:
            progress = job.progress
        case Stage.SELECTING | Stage.AWAITING_PROTOTYPES:
            progress = job.round * per_round
        case Stage.DISTILLING:
            # Epochs count over all rounds, so their share is already that of the whole job.
            progress = job.round * per_round + _SELECTING_SHARE * per_round
            progress = max(progress, done * _ROUNDS_SHARE)
        case Stage.EXPORTING:
            progress = _COMPRESSED_AT if job.last_round else (job.round + 1) * per_round
        case Stage.COMPRESSING:
            progress = _ROUNDS_SHARE + done * (_COMPRESSED_AT - _ROUNDS_SHARE)
        case Stage.READY:
            progress = 1.0
        case _:
            assert_never(job.stage)
    return replace(job, progress=max(job.progress, progress))
