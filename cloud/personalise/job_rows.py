"""Rows of the tables ``jobs`` and ``uploads``. A job changes only through ``apply``, in one transaction.

A worker takes jobs through ``leases.py``.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, fields
from typing import Any, Final

import sqlalchemy as sa

from isthmus.cloud.personalise import job as machine
from isthmus.cloud.personalise.job import Event, Job, Stalled, Step
from isthmus.cloud.store.database import Database
from isthmus.cloud.store.schema import devices, jobs, uploads
from isthmus.proto.errors import Busy, NotYours, WrongState
from isthmus.proto.messages import Stage

CHANNEL: Final = "isthmus_jobs"
"""PostgreSQL's channel on which waiting workers hear of jobs that may be due."""

COLUMNS: Final = tuple(jobs.c["id" if field.name == "job_id" else field.name] for field in fields(Job))
"""The columns that hold a ``Job``. The others are of its lease."""

_ENDED = tuple(stage.value for stage in Stage if stage.ended)


def create(
    database: Database,
    job: Job,
    payload: bytes,
    *,
    at_most_waiting: int,
    admit: Callable[[sa.Connection], None] = lambda connection: None,
    trace: str = "",
) -> tuple[Job, bool]:
    """Add the job and its first upload. Returns the job and whether it is new.

    ``admit`` is called in the transaction, just before a new job is added; it raises if the job may not be. ``trace``
    is the trace context to which the work on the job belongs.

    If the device already has a job with this idempotency key, that job is returned. Raises WrongState if the device has
    another job that has not ended, and Busy if ``at_most_waiting`` jobs are waiting for a worker.
    """
    with database.writing() as connection:
        # Two calls of one device wait for each other here (on SQLite the whole transaction has this effect).
        connection.execute(sa.select(devices.c.id).where(devices.c.id == job.device_id).with_for_update())
        known, going = jobs.c.idempotency_key == job.idempotency_key, jobs.c.stage.not_in(_ENDED)
        mine = connection.execute(sa.select(*COLUMNS).where(jobs.c.device_id == job.device_id, known | going)).all()
        if same := next((row for row in mine if row.idempotency_key == job.idempotency_key), None):
            return job_of(same), False
        if mine:
            raise WrongState("this device has a personalisation under way; wait for it to end")
        queued = sa.select(jobs.c.id).where(jobs.c.stage == Stage.QUEUED.value).limit(at_most_waiting).subquery()
        if (connection.scalar(sa.select(sa.func.count()).select_from(queued)) or 0) >= at_most_waiting:
            raise Busy("too many personalisations are waiting; try again later", retry_after_s=60.0)
        admit(connection)
        connection.execute(jobs.insert().values(row_of(job) | {"trace": trace}))
        connection.execute(uploads.insert().values(job_id=job.job_id, round=0, payload=payload))
        announce(connection)
    return job, True


def apply(
    database: Database,
    job_id: str,
    event: Event,
    now_s: float,
    *,
    upload: bytes | None = None,
    work_files: Mapping[str, str] | None = None,
) -> Step:
    """Step the job in one transaction. A job that needs no worker any more, or stalls, is held by nobody from then on.

    ``upload`` is stored as the prototypes of the round in which the job then is. ``work_files``: names and hashes of
    working files that the job has from now on.

    Raises NotYours if there is no such job, and whatever ``job.step`` raises. The database is then unchanged.
    """
    with database.writing() as connection:
        query = sa.select(*COLUMNS, jobs.c.work_files).where(jobs.c.id == job_id).with_for_update()
        row: Any = connection.execute(query).first()
        if row is None:
            raise NotYours("no such job")
        job, actions = machine.step(job_of(row), event, now_s)
        values = row_of(job)
        if work_files:
            values["work_files"] = {**row.work_files, **work_files}
        if job.stage not in machine.RUNNABLE or isinstance(event, Stalled):
            values |= {"worker": "", "lease_until_s": 0.0}
        connection.execute(jobs.update().where(jobs.c.id == job_id).values(values))
        if upload is not None:
            connection.execute(uploads.insert().values(job_id=job_id, round=job.round, payload=upload))
            announce(connection)
    return job, actions


def announce(connection: sa.Connection) -> None:
    """Wake workers on other machines when this transaction is committed. SQLite has none."""
    if connection.dialect.name == "postgresql":
        connection.execute(sa.select(sa.func.pg_notify(CHANNEL, "")))


def get(database: Database, job_id: str) -> Job | None:
    """Return the job, or None if there is none of this id."""
    rows = database.read(sa.select(*COLUMNS).where(jobs.c.id == job_id))
    return job_of(rows[0]) if rows else None


def payload(database: Database, job_id: str, round: int) -> bytes:
    """Return the upload of a round. Raises NotYours if there is none."""
    rows = database.read(sa.select(uploads.c.payload).where(uploads.c.job_id == job_id, uploads.c.round == round))
    if not rows:
        raise NotYours("no such upload")
    return bytes(rows[0].payload)


def awaiting_since(database: Database, before_s: float) -> list[str]:
    """Return the ids of jobs that have waited for prototypes since before ``before_s``."""
    query = sa.select(jobs.c.id).where(jobs.c.stage == Stage.AWAITING_PROTOTYPES.value, jobs.c.updated_s < before_s)
    with database.reading() as connection:
        return list(connection.scalars(query))


def named(database: Database, job_ids: Iterable[str]) -> list[Job]:
    """Return the jobs of these ids that exist, in no order."""
    with database.reading() as connection:
        return [job_of(row) for row in connection.execute(sa.select(*COLUMNS).where(jobs.c.id.in_(list(job_ids))))]


def by_stage(database: Database) -> dict[str, tuple[int, float]]:
    """Return, per stage that has jobs, their number and the time of the last step of the one that waits longest."""
    query = sa.select(jobs.c.stage, sa.func.count(), sa.func.min(jobs.c.updated_s)).group_by(jobs.c.stage)
    with database.reading() as connection:
        return {stage: (count, oldest_s) for stage, count, oldest_s in connection.execute(query)}


def ended_since(database: Database, since_s: float) -> list[Job]:
    """Return the jobs that ended at ``since_s`` or later, in no order."""
    query = sa.select(*COLUMNS).where(jobs.c.stage.in_(_ENDED), jobs.c.updated_s >= since_s)
    with database.reading() as connection:
        return [job_of(row) for row in connection.execute(query)]


def listing(database: Database, device_ids: Iterable[str] | None = None) -> list[Job]:
    """Return the jobs of the given devices, or of all devices, oldest first."""
    query = sa.select(*COLUMNS).order_by(jobs.c.created_s, jobs.c.id)
    if device_ids is not None:
        query = query.where(jobs.c.device_id.in_(list(device_ids)))
    with database.reading() as connection:
        return [job_of(row) for row in connection.execute(query)]


def row_of(job: Job) -> dict[str, object]:
    """Return the values of ``COLUMNS`` for a job."""
    row = asdict(job)
    row["id"] = row.pop("job_id")
    row["stage"] = job.stage.value
    row["selected_per_class"] = list(job.selected_per_class)
    return row


def job_of(row: Any) -> Job:
    """Return the job of a row with ``COLUMNS``, and perhaps others."""
    values = {column.name: row._mapping[column.name] for column in COLUMNS}
    values["job_id"] = values.pop("id")
    values["stage"] = Stage(values["stage"])
    values["selected_per_class"] = tuple(values["selected_per_class"])
    return Job(**values)
