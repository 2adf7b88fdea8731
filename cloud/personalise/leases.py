"""Leases of jobs: which worker works on a job and until when, and the fence that refuses the writes of all others.

A worker takes a job for ``LEASE_S`` seconds and extends the lease while it works. If it dies, is paused or loses the
network, the lease ends and another worker takes the job. Each take raises the job's counter ``fence``. Every writing
transaction of a worker first checks, under a lock on the job's row, that the row still names this worker and this
count. So a worker that wakes up late can write nothing, however late it is and whatever its clock says.

On PostgreSQL all times of leases are the database's, so machines whose clocks differ agree on them.
"""

import logging
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import sqlalchemy as sa

from isthmus.cloud.personalise import job as machine
from isthmus.cloud.personalise.job import Action, Job, Taken
from isthmus.cloud.personalise.job_rows import COLUMNS, announce, job_of, row_of
from isthmus.cloud.store.database import OLD_WORKERS, OURS, Database
from isthmus.cloud.store.schema import devices, jobs
from isthmus.proto.errors import IsthmusError, Locked, NotYours
from isthmus.proto.messages import Stage

log = logging.getLogger(__name__)

LEASE_S: Final = 20.0
"""A dead worker's job is taken again after this time, and the time until the next worker looks."""
HEARTBEAT_S: Final = 5.0
OTHER_RELEASE_S: Final = 600.0
"""For so long a job of another release waits for a worker of its release, if several workers share the database."""


class LeaseLost(Locked):
    """Another worker has taken the job, or the lease was handed back."""


@dataclass(frozen=True)
class Lease:
    """The right of one worker to work on a job. As ``Database.guard`` it lets nothing be written without this right."""

    job_id: str
    worker: str
    fence: int

    def __call__(self, connection: sa.Connection) -> None:
        """Check the lease, and keep others from taking the job until the transaction ends.

        Raises LeaseLost, and NotYours if the job is gone.
        """
        query = sa.select(jobs.c.worker, jobs.c.fence).where(jobs.c.id == self.job_id).with_for_update()
        row = connection.execute(query).first()
        if row is None:
            raise NotYours("no such job")
        if (row.worker, row.fence) != (self.worker, self.fence):
            raise LeaseLost(f"this worker no longer holds job {self.job_id}")


@dataclass(frozen=True)
class Held:
    """A job that was taken: its state, what to do next, and the names and hashes of the working files that are kept.

    ``trace``: the trace context of the call that started it, see proto/trace.py; ``tenant``: whose device it is of.
    """

    lease: Lease
    job: Job
    actions: tuple[Action, ...]
    work_files: Mapping[str, str]
    trace: str = ""
    tenant: str = ""


def take(
    database: Database, worker: str, *, releases: Collection[str], now_s: float, lease_s: float = LEASE_S
) -> Held | None:
    """Take the job that is due: first a job already begun, else the oldest. Returns None if there is none.

    ``worker``: a UUID of this process. ``releases``: those that it has or can fetch. Jobs of others are left for
    ``OTHER_RELEASE_S`` to workers that have them. A job whose lease has ended without being handed back counts as one
    that killed its worker.
    """
    patience_s = OTHER_RELEASE_S if database.shared else 0.0
    with database.writing() as connection:
        if database.shared and not connection.scalar(
            sa.text("SELECT pg_try_advisory_xact_lock_shared(:ours, :old)"), {"ours": OURS, "old": OLD_WORKERS}
        ):
            return None  # A worker of version 0.1 is at work, which knows no leases.
        clock_s = database.clock_s(connection)
        free = sa.or_(jobs.c.worker.in_(("", worker)), jobs.c.lease_until_s <= clock_s)
        ours = sa.or_(jobs.c.release_hash.in_(list(releases)), jobs.c.updated_s <= now_s - patience_s)
        query = _due(now_s).where(free, ours).with_for_update(skip_locked=True)
        row = connection.execute(query).first()
        if row is None:
            return None
        crashed = row.worker not in ("", worker)
        job, actions = machine.step(job_of(row), Taken(crashed), now_s)
        tenant = connection.scalar(sa.select(devices.c.tenant).where(devices.c.id == job.device_id)) or ""
        lease = Lease(job.job_id, worker, row.fence + 1)
        held = Held(lease, job, actions, dict(row.work_files), row.trace, tenant)
        lasting = {"worker": worker, "lease_until_s": clock_s + lease_s} if job.stage in machine.RUNNABLE else FREE
        connection.execute(
            jobs.update()
            .where(jobs.c.id == job.job_id)
            .values({**row_of(job), **lasting} | {"fence": held.lease.fence})
        )
    return held


def is_due(database: Database, now_s: float) -> bool:
    """Return whether some job needs a worker, so that it is worth to load what learning needs."""
    with database.reading() as connection:
        free = sa.or_(jobs.c.worker == "", jobs.c.lease_until_s <= database.clock_s(connection))
        return connection.execute(_due(now_s).where(free)).first() is not None


def extend(database: Database, lease: Lease, *, lease_s: float = LEASE_S) -> None:
    """Extend a lease. Raises LeaseLost if another worker has the job, NotYours if it is gone."""
    with database.writing() as connection:
        lease(connection)
        until_s = database.clock_s(connection) + lease_s
        connection.execute(jobs.update().where(jobs.c.id == lease.job_id).values(lease_until_s=until_s))


def hand_back(database: Database, worker: str | None = None) -> None:
    """Free the jobs of a worker that has ended through no fault of theirs. None: of every worker but crashed ones."""
    mine = (jobs.c.worker != "") & (jobs.c.lease_until_s > 0) if worker is None else jobs.c.worker == worker
    with database.writing() as connection:
        if connection.execute(jobs.update().where(mine).values(FREE)).rowcount:
            announce(connection)


def died(database: Database, worker: str) -> None:
    """End the leases of a worker that has died by its own fault: the next one knows that the job killed it."""
    with database.writing() as connection:
        connection.execute(jobs.update().where(jobs.c.worker == worker).values(lease_until_s=0.0))
        announce(connection)


def step_died(database: Database, lease: Lease) -> None:
    """Give a job back whose step has killed the process that performed it elsewhere. It counts as a worker's death."""
    mine = (jobs.c.id == lease.job_id) & (jobs.c.worker == lease.worker) & (jobs.c.fence == lease.fence)
    with database.writing() as connection:
        connection.execute(jobs.update().where(mine).values(worker=STEP, lease_until_s=0.0))
        announce(connection)


@contextmanager
def kept(database: Database, lease: Lease, heartbeat_s: float = HEARTBEAT_S) -> Iterator[None]:
    """Extend the lease and let ``database`` write only under it, for the duration of the block."""
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(heartbeat_s):
            try:
                extend(database, lease)
            except (LeaseLost, NotYours):
                if not ended.is_set():
                    log.warning("job %s is no longer this worker's", lease.job_id)
                return
            except IsthmusError as error:
                log.warning("the lease of job %s is not extended: %s", lease.job_id, error)

    database.guard = lease
    heart = threading.Thread(target=beat, daemon=True, name="lease")
    heart.start()
    try:
        yield
    finally:
        ended.set()
        heart.join()
        database.guard = None


STEP: Final = "a step elsewhere"
"""In the place of a worker's UUID: a step of the job has died."""
FREE: Final[Mapping[str, object]] = {"worker": "", "lease_until_s": 0.0}


def _due(now_s: float) -> sa.Select[tuple[object, ...]]:
    runnable = jobs.c.stage.in_([stage.value for stage in machine.RUNNABLE])
    return (
        sa.select(*COLUMNS, jobs.c.worker, jobs.c.fence, jobs.c.work_files, jobs.c.trace)
        .where(runnable, jobs.c.not_before_s <= now_s)
        .order_by(jobs.c.stage == Stage.QUEUED.value, jobs.c.updated_s, jobs.c.id)
        .limit(1)
    )
