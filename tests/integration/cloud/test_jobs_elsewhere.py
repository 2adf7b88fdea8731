"""Personalisations of a real server and its worker: on Ray with a public set in shards; while the database restarts.

Both end with the student of an undisturbed job, byte for byte.
"""

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load

from isthmus.cloud.personalise import job_rows
from isthmus.cloud.personalise.job import Job
from isthmus.cloud.personalise.students import HEADS_FILE
from isthmus.cloud.store.database import Database
from isthmus.proto.messages import Stage
from tests.rigs.cloud.extension import install_extension
from tests.rigs.cloud.postgres import Cluster, running_cluster
from tests.rigs.project.patience import reached

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]  # a minute when idle: processes that import torch and Ray

WAIT_S = 1500.0
HELD = """
import time
from pathlib import Path

from isthmus.cloud.personalise import distilling

before = distilling.DistillLearning.distil

def distil(self, work, on_epoch):
    def held(epoch, epochs):
        on_epoch(epoch, epochs)
        while not Path({let_go!r}).exists():
            time.sleep(0.01)

    before(self, work, held)

distilling.DistillLearning.distil = distil
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with running_cluster() as running:
        yield running


def student(state: Path, job: Job) -> dict[str, bytes]:
    """Return the finished job's files, and each array of its heads, by name."""
    assert job.stage is Stage.READY, job.error
    files = {path.stem: path.read_bytes() for path in (state / "artefacts" / job.student_id).iterdir()}
    heads = load(files.pop(HEADS_FILE))  # their order in the file is not fixed
    return files | {name: array.tobytes() for name, array in heads.items()}


async def until(url: str, job_id: str, reached: Any) -> Job:
    """Wait for the job until ``reached`` is true for it, or it has ended."""
    database, until_s = Database(url), time.monotonic() + WAIT_S
    try:
        while True:
            job = await asyncio.to_thread(job_rows.get, database, job_id)
            assert job is not None and time.monotonic() < until_s
            if reached(job) or job.stage.ended:
                return job
            await asyncio.sleep(0.02)
    finally:
        database.close()


def personalised(rig: Any, **changes: object) -> dict[str, bytes]:
    """Run a personalisation on a server with these settings, and return its student."""

    async def scenario() -> Job:
        async with rig.running(workers=1, worker_threads=1, **changes) as (_, channel):
            started = await rig.start(await rig.enrol(channel))
            return await until(rig.settings(**changes).database_url, started.job_id, lambda job: False)

    return student(rig.state, asyncio.run(scenario()))


def test_a_service_on_ray_selects_in_shards_and_makes_the_same_student(
    rig: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = personalised(type(rig)(rig.release, rig.state.with_name("whole")))
    assert len(whole) > 4
    capfd.readouterr()
    found = personalised(rig, executor="ray", selection_shard_samples=5)
    assert "selected from 24 samples in 5 shards on Ray" in capfd.readouterr().err
    assert found == whole


def test_a_database_that_restarts_in_mid_job_loses_nothing(
    rig: Any, cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The job is held after its first epoch until the database has gone. It comes back once the worker has met that."""
    unharmed = personalised(type(rig)(rig.release, rig.state.with_name("unharmed")))
    let_go, said = tmp_path / "let go", ""
    install_extension(tmp_path, HELD.format(let_go=str(let_go)), monkeypatch)

    def paused() -> bool:
        nonlocal said
        said += capfd.readouterr().err
        return "the worker pauses" in said

    with cluster.database() as database:
        database.migrate()
        url = database.url.render_as_string(hide_password=False)

        async def scenario() -> tuple[Job, Job, float]:
            async with rig.running(workers=1, worker_threads=1, database=url) as (_, channel):
                started = await rig.start(await rig.enrol(channel))
                before = await until(url, started.job_id, lambda job: job.epoch == 1)
                await asyncio.to_thread(cluster.stop)
                stopped_s = time.time()
                let_go.touch()
                await reached(paused)
                await asyncio.to_thread(cluster.start)
                return before, await until(url, started.job_id, lambda job: False), stopped_s

        before, ended, stopped_s = asyncio.run(scenario())
    assert before.stage is Stage.DISTILLING and ended.updated_s > stopped_s, "it was in progress"
    assert student(rig.state, ended) == unharmed
