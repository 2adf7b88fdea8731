"""Rows of the tables ``jobs`` and ``uploads``. A job changes only through ``apply``: read, step, write, in one go."""

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
    """Adds the job and its first upload, and says whether it is new.

    The same device and idempotency key give the job that is already there. Raises WrongState if the device has
    another job that has not ended, Busy if ``at_most_waiting`` jobs are waiting for a worker already.
    """
    with database.writing() as connection:
        # Two calls of one device wait for each other here (on SQLite the whole transaction does that).
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
            raise Busy("too many personalisations are waiting; try again later")
        connection.execute(jobs.insert().values(_row(job)))
        connection.execute(uploads.insert().values(job_id=job.job_id, round=0, payload=payload))
    return job, True


def apply(database: Database, job_id: str, event: Event, now_s: float, *, upload: bytes | None = None) -> Step:
    """Steps the job in one transaction; ``upload`` keeps the prototypes of the round that the job then stands in.

    Raises NotYours if there is no such job, and what ``job.step`` raises; the database is then unchanged.
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
    with database.reading() as connection:
        row = connection.execute(sa.select(jobs).where(jobs.c.id == job_id)).first()
    return None if row is None else _job(row)


def payload(database: Database, job_id: str, round: int) -> bytes:
    """The upload of a round. Raises NotYours if there is none."""
    with database.reading() as connection:
        found = connection.scalar(
            sa.select(uploads.c.payload).where(uploads.c.job_id == job_id, uploads.c.round == round)
        )
    if found is None:
        raise NotYours("no such upload")
    return bytes(found)


def next_runnable(database: Database, now_s: float) -> Job | None:
    """The job that a worker should take: one already begun before a new one, else the oldest."""
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
    """Ids of jobs whose device has owed its prototypes since before ``before_s``."""
    query = sa.select(jobs.c.id).where(jobs.c.stage == Stage.AWAITING_PROTOTYPES.value, jobs.c.updated_s < before_s)
    with database.reading() as connection:
        return list(connection.scalars(query))


def listing(database: Database, device_ids: Iterable[str] | None = None) -> list[Job]:
    """Jobs, oldest first; of the given devices, or of all."""
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
