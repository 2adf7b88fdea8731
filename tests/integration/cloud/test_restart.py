"""A cloud killed in the middle of a job and started again finishes the job with the same result.

The tests use a separate server process with its worker, and real learning on the tiny release.
"""

import asyncio
import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from safetensors.numpy import load

from isthmus.cloud.personalise import job_rows
from isthmus.cloud.personalise.job import Job
from isthmus.cloud.personalise.students import HEADS_FILE
from isthmus.cloud.personalise.worker import Worker
from isthmus.cloud.server import Server
from isthmus.cloud.store import devices
from isthmus.cloud.store.database import Database
from isthmus.cloud.store.devices import Device
from isthmus.demo.processes import ending_with_parent
from isthmus.distill.recipes import Recipe
from isthmus.proto.errors import Locked
from isthmus.proto.messages import Stage as Stages
from isthmus.proto.v1 import isthmus_pb2 as pb
from tests.rigs.cloud.service import Rig, make_tiny_release
from tests.rigs.distill.release import tiny_recipe

pytestmark = pytest.mark.e2e

Stage = pb.JobStatus.Stage


@contextmanager
def server_process(release: Path, state: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run a server in a process of its own; yields the process and the address."""
    options = ["--release", str(release), "--state", str(state), "--worker-threads", "1", "--log-level", "warning"]
    command = ending_with_parent([sys.executable, "-m", "isthmus.cli", "cloud", "serve", *options])
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("listening on "), line
        yield process, line.split()[-1]
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.wait(timeout=600)


async def watch_until(device: Any, job_id: str, *, epoch: int | None = None) -> pb.JobStatus:
    """Return the job's status when it has ended, or when it distils and ``epoch`` epochs are done."""
    request = pb.WatchJobRequest(job_id=job_id)
    async for reply in device.personalisation.WatchJob(request, metadata=device.metadata):
        job = reply.job
        if epoch is not None and job.stage == Stage.STAGE_DISTILLING and job.epoch >= epoch:
            return job
    assert epoch is None, f"the job ended too early: {job}"
    return job


def many_epochs() -> Recipe:
    """Return the tiny recipe with 60 epochs of distillation, which take seconds: nobody misses that a job is there."""
    recipe = tiny_recipe()
    train = dataclasses.replace(recipe.personalise.train, epochs=60)
    return dataclasses.replace(recipe, personalise=dataclasses.replace(recipe.personalise, train=train))


@pytest.mark.timeout(1800)  # a minute when idle: four processes that import torch, two exports to ONNX
def test_a_job_survives_kill_9_and_ends_with_the_same_student(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "release", tmp_path / "state", many_epochs())
    make_tiny_release(rig.release, rig.recipe)

    def artefacts(student_id: str) -> dict[str, bytes]:
        folder = rig.state / "artefacts" / student_id
        return {path.stem: path.read_bytes() for path in sorted(folder.iterdir())}

    async def before(address: str) -> tuple[Any, str, str]:
        with pytest.raises(Locked):
            await Server(rig.settings()).start()
        async with grpc.aio.insecure_channel(address) as channel:
            unharmed, device = await rig.enrol(channel), await rig.enrol(channel)
            first, second = await rig.start(unharmed), await rig.start(device)
            ended = await watch_until(unharmed, first.job_id)
            assert ended.stage == Stage.STAGE_READY, ended.error
            assert ended.epochs > 0
            assert set(ended.stage_seconds) >= {"selecting", "distilling", "compressing", "exporting"}
            await watch_until(device, second.job_id, epoch=1)
            return device, ended.student_id, second.job_id

    async def after(address: str, device: Any, job_id: str) -> tuple[pb.JobStatus, pb.StudentManifest]:
        async with grpc.aio.insecure_channel(address) as channel:
            again = type(device)(device.device_id, channel, device.metadata)
            ended = await watch_until(again, job_id)
            return ended, await again.describe()

    with server_process(rig.release, rig.state) as (process, address):
        device, unharmed_student, job_id = asyncio.run(before(address))
        (worker,) = psutil.Process(process.pid).children()
        process.send_signal(signal.SIGKILL)
        process.wait()
        worker.wait(timeout=600)  # the kernel ends it with its server
    with server_process(rig.release, rig.state) as (_, address):
        ended, manifest = asyncio.run(after(address, device, job_id))
    assert ended.stage == Stage.STAGE_READY, ended.error
    assert (manifest.student_id, manifest.kind) == (ended.student_id, "final")
    resumed, unharmed = artefacts(ended.student_id), artefacts(unharmed_student)
    assert resumed.keys() == unharmed.keys() >= {"audio_encoder.onnx", "visual_encoder.onnx", HEADS_FILE}
    heads, unharmed_heads = load(resumed.pop(HEADS_FILE)), load(unharmed.pop(HEADS_FILE))
    assert {name: (heads[name] == unharmed_heads[name]).all() for name in heads} == dict.fromkeys(unharmed_heads, True)
    assert [name for name in resumed if resumed[name] != unharmed[name]] == [], "every ONNX file, byte for byte"


def test_a_job_whose_device_never_comes_back_is_given_up(rig: Any) -> None:
    settings = rig.settings(awaiting_timeout_s=60)
    rig.state.mkdir()
    database = Database(settings.database_url)
    database.migrate()
    devices.add(database, Device("dev", "", bytes(32), 1.0), at_most=1)
    long_ago_s = time.time() - 61
    job = Job("job", "dev", "k", "release", 0, 2, long_ago_s, long_ago_s, stage=Stages.AWAITING_PROTOTYPES, round=1)
    job_rows.create(database, job, b"", at_most_waiting=1)
    files = settings.work_dir / "job"
    files.mkdir(parents=True)
    assert not Worker(settings).run_once(), "there is nothing to work on"
    ended = job_rows.get(database, "job")
    assert ended is not None
    assert (ended.stage, "never arrived" in ended.error) == (Stages.FAILED, True)
    assert not files.exists()
    files.mkdir()  # as a kill between the job's end and the removal leaves it
    Worker(settings).run_once()
    assert not files.exists()


def test_a_worker_that_dies_is_started_again_and_kill_9_is_no_failed_attempt_of_its_job(
    rig: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real worker processes are ended as soon as they have taken the job: from outside, then by a crash."""
    monkeypatch.setattr("isthmus.cloud.personalise.supervisor._BACKOFF_FIRST_S", 0.01)

    async def scenario() -> list[int]:
        async with rig.running(workers=1, worker_threads=1) as (server, channel):
            job_id = (await rig.start(await rig.enrol(channel))).job_id
            database = Database(rig.settings().database_url)

            def job() -> Job:
                found = job_rows.get(database, job_id)
                assert found is not None
                return found

            attempts, left_s = [], job().updated_s
            for number in (signal.SIGKILL, signal.SIGSEGV, None):
                while (taken := job()).updated_s == left_s:
                    await asyncio.sleep(0.003)
                attempts.append(taken.attempts)
                worker = server.worker_pid
                assert worker is not None
                if number is not None:
                    os.kill(worker, number)
                    while server.worker_pid == worker:
                        await asyncio.sleep(0.003)
                    left_s = job().updated_s
            database.close()
            assert (await rig.enrol(channel)).device_id, "devices are answered all along"
        assert not psutil.pid_exists(worker), "a stopped server leaves no worker"
        return attempts

    assert asyncio.run(scenario()) == [0, 0, 1]
