"""Looks at the jobs that devices watch: one query for all of them, however many devices watch."""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import suppress

from isthmus.cloud.personalise import job_rows
from isthmus.cloud.personalise.job import Job
from isthmus.cloud.store.database import Database
from isthmus.proto.errors import IsthmusError, NotYours

log = logging.getLogger(__name__)


class JobWatch:
    """Another process changes jobs, so the database is polled, but only while somebody watches. For one event loop."""

    def __init__(self, database: Database, interval_s: float) -> None:
        self._database = database
        self._interval_s = interval_s
        self._watched: Counter[str] = Counter()
        self._jobs: dict[str, Job] = {}
        self._looked = asyncio.Condition()
        self._poll: asyncio.Task[None] | None = None

    async def changes(self, job: Job) -> AsyncGenerator[Job, None]:
        """Yield ``job`` and then each change of it, until it has ended. Raises NotYours if it is deleted."""
        yield job
        self._watched[job.job_id] += 1
        self._jobs[job.job_id] = job
        if self._poll is None or self._poll.done():
            self._poll = asyncio.create_task(self._look_again(), name="job watch")
        try:
            sent = job
            while not sent.stage.ended:
                async with self._looked:
                    await self._looked.wait()
                now = self._jobs.get(job.job_id)
                if now is None:
                    raise NotYours("no such job")
                if now != sent:
                    yield now
                    sent = now
        finally:
            self._watched[job.job_id] -= 1
            if not self._watched[job.job_id]:
                del self._watched[job.job_id]
                self._jobs.pop(job.job_id, None)

    async def _look_again(self) -> None:
        """Look at the watched jobs until nobody watches any more."""
        while self._watched:
            await asyncio.sleep(self._interval_s)
            asked = tuple(self._watched)
            try:
                found = {job.job_id: job for job in await asyncio.to_thread(job_rows.named, self._database, asked)}
            except IsthmusError as error:
                log.warning("watched jobs are not known at the moment: %s", error)
                continue
            for job_id in asked:
                if job_id in self._watched:
                    if job_id in found:
                        self._jobs[job_id] = found[job_id]
                    else:
                        self._jobs.pop(job_id, None)
            async with self._looked:
                self._looked.notify_all()

    async def stop(self) -> None:
        """End the looking. Watches that are open get no more changes."""
        if self._poll is not None:
            self._poll.cancel()
            with suppress(asyncio.CancelledError):
                await self._poll
