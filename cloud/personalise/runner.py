"""Perform the actions of the state machine one at a time. Each outcome is stored before the next action begins.

Each action is safe to repeat, so the job of a killed worker is simply taken again, see ``leases.py``. Its working files
are those of ``work_files.py``.
"""

import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from isthmus.cloud import logs, tracing
from isthmus.cloud.offers.offer import Offer
from isthmus.cloud.personalise import job_rows, service, students
from isthmus.cloud.personalise.job import (
    Discard,
    Distil,
    Distilled,
    EpochDone,
    Event,
    Export,
    Exported,
    Failed,
    HeadsTrained,
    Job,
    Select,
    Selected,
    Stalled,
    TrainHeads,
)
from isthmus.cloud.personalise.learning import INT8_FILES, Learning, RoundWork
from isthmus.cloud.personalise.leases import Held, kept
from isthmus.cloud.personalise.signing import Signer
from isthmus.cloud.personalise.work_files import WorkFiles
from isthmus.cloud.store import releases
from isthmus.cloud.store.database import disk_is_full
from isthmus.cloud.tracing import Traces
from isthmus.data.files import replaced
from isthmus.distill.selection import Selection
from isthmus.distill.student.settling import settled
from isthmus.proto.errors import Busy, IsthmusError, Locked, NotYours, StorageFull, Unavailable
from isthmus.proto.trace import TraceContext

log = logging.getLogger(__name__)

_CHECKPOINT = "checkpoint.safetensors"


@dataclass(frozen=True)
class Runner:
    """Runs jobs. ``now_s`` returns the wall clock in Unix seconds."""

    shelf: students.Shelf
    signer: Signer
    offer: Offer
    learning: Learning
    files: WorkFiles
    keep_students: int
    now_s: Callable[[], float]
    traces: Traces = tracing.OFF

    def run(self, held: Held) -> Job:
        """Work on a job that was taken, until it ends, waits for its device, or stalls. Returns its final state.

        If the work fails, the job fails and nothing is raised. Only errors of the database are raised, and LeaseLost if
        another worker has taken the job; the job is then unchanged.
        """
        try:
            with self._told_apart(held), kept(self.shelf.database, held.lease):
                return self._run(held)
        except NotYours:
            # The device was deleted meanwhile, and its job with it.
            log.info("job %s is gone; its files are removed", held.job.job_id)
            self.files.discard(held.job.job_id)
            raise

    @contextmanager
    def _told_apart(self, held: Held) -> Iterator[None]:
        """Let log lines and spans of the work on a job name its trace and its tenant."""
        logs.TENANT.set(held.tenant)
        try:
            with self.traces.span("personalise", TraceContext.read(held.trace), job=held.job.job_id):
                yield
        finally:
            logs.TENANT.set("")

    def _run(self, held: Held) -> Job:
        job, actions = held.job, held.actions
        while actions:
            (action,) = actions
            if isinstance(action, Discard):
                self.files.discard(job.job_id)
                break
            with self.traces.span(type(action).__name__.lower(), round=job.round):
                event = self._outcome(held, job, action)
            stored = self.files.keep(job.job_id, held.lease.fence, _lasting(event, job))
            job, actions = job_rows.apply(self.shelf.database, job.job_id, event, self.now_s(), work_files=stored)
            log.info("job %s is %s, round %d of %d", job.job_id, job.stage.value, job.round + 1, job.rounds)
        return job

    def _outcome(self, held: Held, job: Job, action: Select | Distil | TrainHeads | Export) -> Event:
        if job.release_hash != self.offer.release_hash:
            return Failed("the server has a new release; start again")
        if releases.is_withdrawn(self.shelf.database, job.release_hash):
            return Failed("the release of this personalisation was withdrawn; start again")
        try:
            return self._perform(held, job, action)
        except (Busy, Locked, NotYours, Unavailable):
            raise  # The database is in trouble, or the job is gone: it has not failed.
        except Exception as error:
            if _full(error):
                log.warning("job %s: the disk is full while %s", job.job_id, job.stage.value)
                return Stalled("the server's disk is full; the work so far is kept and continues when there is space")
            log.exception("job %s failed while %s", job.job_id, job.stage.value)
            return Failed(_short(error, job))

    def _perform(self, held: Held, job: Job, action: Select | Distil | TrainHeads | Export) -> Event:
        folder = self.files.open(job.job_id, held.lease.fence, held.work_files)
        checkpoint, heads = folder / _CHECKPOINT, folder / students.HEADS_FILE
        chosen = folder / f"selection-{action.round}.npz"

        def on_epoch(epoch: int, epochs: int) -> None:
            job_rows.apply(self.shelf.database, job.job_id, EpochDone(epoch, epochs), self.now_s())

        if isinstance(action, Select):
            prototypes = service.from_payload(job_rows.payload(self.shelf.database, job.job_id, action.round))
            selection = self.learning.select(prototypes, round=action.round, seed=job.seed)
            for note in selection.notes:
                log.info("job %s: %s", job.job_id, note)
            _keep(chosen, selection)
            return Selected(self.learning.per_class(selection), self._settled(folder, action.round, selection))
        # A settled round also trains the epochs of the rounds that were cut.
        through = job.rounds - 1 if job.settled else action.round
        work = RoundWork(_kept(chosen), through, job.rounds, job.seed, checkpoint)
        match action:
            case Distil():
                self.learning.distil(work, on_epoch)
                return Distilled()
            case TrainHeads():
                self.learning.train_heads(work, heads, on_epoch)
                return HeadsTrained()
            case Export():
                return self._export(job, work, heads if action.final else None)

    def _settled(self, folder: Path, round: int, selection: Selection) -> bool:
        before = folder / f"selection-{round - 1}.npz"
        if round == 0 or self.offer.settled_at is None or not before.is_file():
            return False
        return settled(_kept(before).indices_S, selection.indices_S, self.offer.settled_at)

    def _export(self, job: Job, work: RoundWork, heads: Path | None) -> Exported:
        student_id = job.job_id if heads is not None else f"{job.job_id}-r{work.round}"
        out_dir = work.checkpoint.with_name(f"export-{work.round}")
        files = self.learning.export(work, heads, out_dir)
        students.publish(
            self.shelf,
            self.signer,
            self.offer,
            student_id=student_id,
            device_id=job.device_id,
            kind="final" if heads is not None else "interim",
            files=files,
            heads=heads,
            now_s=self.now_s(),
        )
        shutil.rmtree(out_dir, ignore_errors=True)
        students.prune(self.shelf, job.device_id, keep=self.keep_students)
        return Exported(student_id)


def _lasting(event: Event, job: Job) -> tuple[str, ...]:
    """Return the names of the files that the event has finished, and that later stages of the job need."""
    match event:
        case Selected():
            return (f"selection-{job.round}.npz",)
        case Distilled():
            return (_CHECKPOINT,)
        case HeadsTrained():
            return (students.HEADS_FILE, students.MEASURED_FILE, students.PERSON_FILE, *INT8_FILES)
        case _:
            return ()


def _keep(path: Path, selection: Selection) -> None:
    with replaced(path) as part, part.open("wb") as file:
        np.savez(file, indices_S=selection.indices_S, weights_S=selection.weights_S)


def _kept(path: Path) -> Selection:
    with np.load(path, allow_pickle=False) as arrays:
        return Selection(arrays["indices_S"], arrays["weights_S"])


def _full(error: BaseException) -> bool:
    """Return whether an error, or one of its causes, means that the disk is full."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, StorageFull) or (isinstance(cause, OSError) and disk_is_full(cause)):
            return True
        if "(os error 28)" in str(cause):  # ENOSPC as safetensors' writer reports it, in an error type of its own
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def _short(error: Exception, job: Job) -> str:
    """Return the message for the device. Our own errors are written for it; for others it gets only the stage."""
    if isinstance(error, IsthmusError):
        return str(error)
    return f"the server failed while {job.stage.value}; its operator finds the reason in the log under job {job.job_id}"
