"""Rows of the tables ``jobs`` and ``uploads``. A job changes only through ``apply``, in one transaction."""

from collections.abc import Iterable
from dataclasses import asdict

import sqlalchemy as sa

from isthmus.cloud.personalise import job as machine
from isthmus.cloud.personalise.job import Event, Job, Step
from isthmus.cloud.store.database import Database
from isthmus.cloud.store.schema import devices, jobs, uploads
from isthmus.proto.errors import Busy, NotYours, WrongState
from isthmus.proto.messages import Stage

_ENDED = tuple(stage.value for stage in Stage if stage.ended)


def create(database: Database, job: Job, payload: bytes, *, at_most_waiting: int) -> tuple[Job, bool]:
    """Add the job and its first upload. Returns the job and whether it is new.

    If the device already has a job with this idempotency key, that job is returned. Raises WrongState if the device has
    another job that has not ended, and Busy if ``at_most_waiting`` jobs are waiting for a worker.
    """
    with database.writing() as connection:
        # Two calls of one device wait for each other here (on SQLite the whole transaction has this effect).
        connection.execute(sa.select(devices.c.id).where(devices.c.id == job.device_id).with_for_update())
        mine = sa.select(jobs).where(jobs.c.device_id == job.device_id)
        known = connection.execute(mine.where(jobs.c.idempotency_key == job.idempotency_key)).first()
        if known is not None:
            return _job(known), False
        if connection.execute(mine.where(jobs.c.stage.not_in(_ENDED))).first() is not None:
            raise WrongState("this device has a personalisation under way; wait for it to end")
        waiting = connection.scalar(
            sa.select(sa.func.count()).select_from(jobs).where(jobs.c.stage == Stage.QUEUED.value)
        )
        if (waiting or 0) >= at_most_waiting:
            raise Busy("too many personalisations are waiting; try again later", retry_after_s=60.0)
        connection.execute(jobs.insert().values(_row(job)))
        connection.execute(uploads.insert().values(job_id=job.job_id, round=0, payload=payload))
    return job, True


def apply(database: Database, job_id: str, event: Event, now_s: float, *, upload: bytes | None = None) -> Step:
    """Step the job in one transaction. ``upload`` is stored as the prototypes of the round in which the job then is.

    Raises NotYours if there is no such job, and whatever ``job.step`` raises. The database is then unchanged.
    """
    with database.writing() as connection:
        row = connection.execute(sa.select(jobs).where(jobs.c.id == job_id).with_for_update()).first()
        if row is None:
            raise NotYours("no such job")
        job, actions = machine.step(_job(row), event, now_s)
        connection.execute(jobs.update().where(jobs.c.id == job_id).values(_row(job)))
        if upload is not None:
            connection.execute(uploads.insert().values(job_id=job_id, round=job.round, payload=upload))
    return job, actions


def get(database: Database, job_id: str) -> Job | None:
    """Return the job, or None if there is none of this id."""
    with database.reading() as connection:
        row = connection.execute(sa.select(jobs).where(jobs.c.id == job_id)).first()
    return None if row is None else _job(row)


def payload(database: Database, job_id: str, round: int) -> bytes:
    """Return the upload of a round. Raises NotYours if there is none."""
    with database.reading() as connection:
        found = connection.scalar(
            sa.select(uploads.c.payload).where(uploads.c.job_id == job_id, uploads.c.round == round)
        )
    if found is None:
        raise NotYours("no such upload")
    return bytes(found)


def next_runnable(database: Database, now_s: float) -> Job | None:
    """Return the job that a worker should take: first a job already begun, else the oldest. None if there is none."""
    query = (
        sa.select(jobs)
        .where(jobs.c.stage.in_([stage.value for stage in machine.RUNNABLE]), jobs.c.not_before_s <= now_s)
        .order_by(jobs.c.stage == Stage.QUEUED.value, jobs.c.updated_s, jobs.c.id)
        .limit(1)
    )
    with database.reading() as connection:
        row = connection.execute(query).first()
    return None if row is None else _job(row)


def awaiting_since(database: Database, before_s: float) -> list[str]:
    """Return the ids of jobs that have waited for prototypes since before ``before_s``."""
    query = sa.select(jobs.c.id).where(jobs.c.stage == Stage.AWAITING_PROTOTYPES.value, jobs.c.updated_s < before_s)
    with database.reading() as connection:
        return list(connection.scalars(query))


def named(database: Database, job_ids: Iterable[str]) -> list[Job]:
    """Return the jobs of these ids that exist, in no order."""
    with database.reading() as connection:
        return [_job(row) for row in connection.execute(sa.select(jobs).where(jobs.c.id.in_(list(job_ids))))]


def listing(database: Database, device_ids: Iterable[str] | None = None) -> list[Job]:
    """Return the jobs of the given devices, or of all devices, oldest first."""
    query = sa.select(jobs).order_by(jobs.c.created_s, jobs.c.id)
    if device_ids is not None:
        query = query.where(jobs.c.device_id.in_(list(device_ids)))
    with database.reading() as connection:
        return [_job(row) for row in connection.execute(query)]


def _row(job: Job) -> dict[str, object]:
    row = asdict(job)
    row["id"] = row.pop("job_id")
    row["stage"] = job.stage.value
    row["selected_per_class"] = list(job.selected_per_class)
    return row


def _job(row: sa.Row[tuple[object, ...]]) -> Job:
    values = dict(row._mapping)
    values["job_id"] = values.pop("id")
    values["stage"] = Stage(values["stage"])
    values["selected_per_class"] = tuple(values["selected_per_class"])
    return Job(**values)
