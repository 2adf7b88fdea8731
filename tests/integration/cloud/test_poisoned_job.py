"""A job that really kills every process that takes it, a worker or one on Ray: it fails, and the next one is done."""

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

from isthmus.cloud.personalise import job_rows, supervisor
from isthmus.cloud.personalise.job import MAX_ATTEMPTS
from isthmus.cloud.store.database import Database
from isthmus.proto.messages import Stage
from tests.rigs.cloud.extension import install_extension

POISON_SEED = 666


@pytest.fixture
def deadly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a job of one seed end its process by SIGSEGV."""
    install_extension(
        tmp_path,
        f"""
        import os, signal
        from isthmus.cloud.personalise import distilling

        before = distilling.DistillLearning.select

        def select(self, prototypes, *, round, seed):
            if seed == {POISON_SEED}:
                os.kill(os.getpid(), signal.SIGSEGV)
            return before(self, prototypes, round=round, seed=seed)

        distilling.DistillLearning.select = select
        """,
        monkeypatch,
    )


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("executor", ["thread", "ray"])
@pytest.mark.usefixtures("deadly")
def test_a_job_that_kills_every_worker_ends_as_failed_with_what_happened(
    rig: Any, monkeypatch: pytest.MonkeyPatch, executor: str
) -> None:
    monkeypatch.setattr(supervisor, "_BACKOFF_FIRST_S", 0.01)
    monkeypatch.setattr(supervisor, "_BACKOFF_LONGEST_S", 0.01)
    database = Database(rig.settings().database_url)

    async def ended(job_id: str) -> Any:
        until_s = time.monotonic() + 900
        while time.monotonic() < until_s:
            job = await asyncio.to_thread(job_rows.get, database, job_id)
            if job is not None and job.stage.ended:
                return job
            await asyncio.sleep(0.2)
        pytest.fail("the job has not ended")

    async def scenario() -> tuple[Any, Any, float]:
        async with rig.running(workers=1, worker_threads=1, executor=executor) as (server, channel):
            poisoned, innocent = await rig.enrol(channel), await rig.enrol(channel)
            first = await rig.start(poisoned, seed=POISON_SEED)
            second = await rig.start(innocent, seed=1)
            failed, ready = await ended(first.job_id), await ended(second.job_id)
            return failed, ready, server._metrics.worker_restarts._value.get()

    failed, ready, restarts = asyncio.run(scenario())
    assert failed.stage is Stage.FAILED and f"crashed {MAX_ATTEMPTS} times while selecting" in failed.error
    assert ready.stage is Stage.READY, "it holds nobody up"
    assert restarts == (MAX_ATTEMPTS if executor == "thread" else 0), "on Ray it kills the step's process"
    database.close()
