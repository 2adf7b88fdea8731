"""Learning steps on a Ray cluster whose nodes are killed all the time: every job is done, and done once.

Starts a PostgreSQL cluster, a Ray cluster of several nodes on this machine, and worker processes. Each learning step of
a job is an actor on one of the nodes. At each interval one node is killed (SIGKILL, with every process on it), and
another takes its place. A step takes milliseconds; state machine, leases, database, artefacts, and the way of a step
to the cluster and back are the real ones.
"""

import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Annotated, NoReturn
from uuid import uuid4

import sqlalchemy as sa
import typer

from isthmus.cloud.personalise import job_rows, leases
from isthmus.cloud.personalise.elsewhere import on_ray
from isthmus.cloud.personalise.elsewhere.on_ray import RayLearning, StepActor
from isthmus.cloud.personalise.leases import LeaseLost
from isthmus.cloud.store import news
from isthmus.cloud.store.schema import jobs, students
from isthmus.proto.errors import IsthmusError
from isthmus.proto.messages import Stage
from tests.bench.cloud.workers import bench_on, left
from tests.bench.harness import Report
from tests.rigs.cloud.jobs import CountedLearning
from tests.rigs.cloud.postgres import running_cluster as running_postgres
from tests.rigs.cloud.ray_nodes import running_ray

_POLL_S = 0.5
_STEP_S = 0.002
_PAUSE_S = 1.0
"""Pause of a worker whose step was lost. The real one pauses for 5 s."""


class CountedActor(StepActor):
    """An actor whose learning takes no time, and needs no torch."""

    def __init__(self, release: str, release_hash: str, version: str, threads: int | None) -> None:
        self._learning = CountedLearning(lambda step: time.sleep(_STEP_S))
        self._changing = threading.Lock()
        self._epochs: list[tuple[int, int]] = []
        self._checkpoint: bytes | None = None


def work(url: str, folder: Path, address: str) -> NoReturn:
    """Run as a worker until killed. Prints a line per job: done, refused or pauses."""
    on_ray.StepActor = CountedActor  # type: ignore[misc]
    on_ray.POLL_S = 0.05  # type: ignore[misc]
    bench = bench_on(url, folder / uuid4().hex, folder)
    woken = threading.Event()
    news.listen(bench.database, job_rows.CHANNEL, woken.set)
    runner = bench.runner(RayLearning(CountedLearning(), folder, "release", address=address, threads=1))
    worker = uuid4().hex
    while True:
        woken.clear()
        held = None
        try:
            held = bench.take(worker)
            if held is not None:
                done = runner.run(held)
                print(f"{done.stage.value} {done.job_id} {held.lease.fence}", flush=True)
        except LeaseLost:
            print(f"refused {held.job.job_id if held else ''}", flush=True)
        except IsthmusError as error:
            print(f"pauses {error}", flush=True)
            leases.hand_back(bench.database, worker)
            time.sleep(_PAUSE_S)
        if held is None:
            woken.wait(_POLL_S)


def measure(n_jobs: int, n_workers: int, n_nodes: int, kill_every_s: float, folder: Path) -> dict[str, object]:
    """Return the figures of one run. Raises AssertionError if a job was lost, failed or done twice."""
    with running_postgres() as postgres, postgres.database() as database, running_ray() as ray:
        url = database.url.render_as_string(hide_password=False)
        bench = bench_on(url, folder / "server", folder)
        for number in range(n_jobs):
            bench.enrol(f"dev{number}")
            bench.start(device_id=f"dev{number}", job_id=f"job{number}")
        logs = [folder / f"worker{number}.log" for number in range(n_workers)]
        nodes = [ray.add(1) for _ in range(n_nodes)]
        workers = []
        for path in logs:
            command = [sys.executable, "-m", "tests.bench.cloud.ray_nodes", "--worker", url, "--folder", str(folder)]
            with path.open("wb") as log:
                command += ["--address", ray.address]
                workers.append(subprocess.Popen(command, stdout=log, stderr=log))
        rng, kills = random.Random(0), 0
        try:
            while left(bench) == n_jobs:  # the cluster and its nodes start
                time.sleep(0.5)
            began_s = time.monotonic()
            next_kill_s = began_s + kill_every_s
            while remaining := left(bench):
                time.sleep(0.5)
                if time.monotonic() >= next_kill_s:
                    victim = rng.randrange(n_nodes)
                    ray.kill(nodes[victim])
                    nodes[victim] = ray.add(1)
                    kills += 1
                    next_kill_s = time.monotonic() + kill_every_s
                    print(f"{time.monotonic() - began_s:.0f} s: {remaining} jobs left, {kills} killed", flush=True)
            seconds = time.monotonic() - began_s
        finally:
            for process in workers:
                process.kill()
                process.wait()
        said = [line.split(maxsplit=2) for path in logs for line in path.read_text(errors="replace").splitlines()]
        ready = Counter(words[1] for words in said if len(words) == 3 and words[0] == Stage.READY.value)
        lost = sum(words[0] == "pauses" for words in said if words)
        with bench.database.reading() as connection:
            stages = Counter(connection.scalars(sa.select(jobs.c.stage)))
            fences = list(connection.scalars(sa.select(jobs.c.fence)))
            published = Counter(connection.scalars(sa.select(students.c.device_id)))
    assert stages == {Stage.READY.value: n_jobs}, stages
    assert len(published) == n_jobs and set(published.values()) == {1}, "one student per job"
    assert max(ready.values()) == 1, "no two workers finish one job"
    return {
        "jobs": n_jobs,
        "workers": n_workers,
        "nodes": n_nodes,
        "kill_every_s": kill_every_s,
        "killed": kills,
        "seconds": round(seconds, 1),
        "done_once": n_jobs,
        "steps_lost": lost,
        "taken_again": sum(fence > 1 for fence in fences),
        "most_takes_of_one_job": max(fences),
    }


def main(
    jobs: Annotated[int, typer.Option(help="Number of jobs.")] = 1_000,
    workers: Annotated[int, typer.Option(help="Workers.")] = 2,
    nodes: Annotated[int, typer.Option(help="Nodes of one CPU at any time, beside the head.")] = 2,
    kill_every_s: Annotated[float, typer.Option(help="Seconds between two kills.")] = 30.0,
    out: Annotated[Path | None, typer.Option(help="Write the results to this JSON file.")] = None,
    worker: Annotated[str, typer.Option(hidden=True)] = "",
    address: Annotated[str, typer.Option(hidden=True)] = "",
    folder: Annotated[Path, typer.Option(hidden=True)] = Path(),
) -> None:
    """Kill nodes of a Ray cluster while jobs run on it, and count what becomes of the jobs."""
    if worker:
        work(worker, folder, address)
    config = {"jobs": jobs, "workers": workers, "nodes": nodes, "kill_every_s": kill_every_s}
    report = Report("ray nodes", config, ("ray", "sqlalchemy", "psycopg"))
    report.config["niceness"] = os.nice(0)
    with tempfile.TemporaryDirectory() as name:
        report.rows.append(measure(jobs, workers, nodes, kill_every_s, Path(name)))
    report.finish({key: lambda row, key=key: str(row[key]) for key in report.rows[0]}, out)  # type: ignore[misc]


if __name__ == "__main__":
    typer.run(main)
