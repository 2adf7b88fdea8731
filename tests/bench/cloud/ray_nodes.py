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
import time
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from isthmus.cloud.personalise.elsewhere import on_ray
from isthmus.cloud.personalise.elsewhere.on_ray import RayLearning, StepActor
from tests.bench.cloud.job_workers import STEP_S, bench_on, done_once, left, with_jobs, work
from tests.bench.harness import Report
from tests.rigs.cloud.jobs import CountedLearning
from tests.rigs.cloud.postgres import running_cluster as running_postgres
from tests.rigs.cloud.ray_nodes import running_ray


class CountedActor(StepActor):
    """An actor whose learning takes no time, and needs no torch."""

    @staticmethod
    def _opened(release: str, release_hash: str, threads: int | None) -> CountedLearning:
        return CountedLearning(lambda step: time.sleep(STEP_S))


def work_on_ray(url: str, folder: Path, address: str) -> NoReturn:
    """Run as a worker whose steps run on the cluster, until killed."""
    on_ray.StepActor = CountedActor  # type: ignore[misc]
    on_ray.POLL_S = 0.05  # type: ignore[misc]
    work(url, folder, RayLearning(CountedLearning(), folder, "release", address=address, threads=1))


def measure(n_jobs: int, n_workers: int, n_nodes: int, kill_every_s: float, folder: Path) -> dict[str, object]:
    """Return the figures of one run. Raises AssertionError if a job was lost, failed or done twice."""
    with running_postgres() as postgres, postgres.database() as database, running_ray() as ray:
        url = database.url.render_as_string(hide_password=False)
        bench = bench_on(url, folder / "server", folder)
        with_jobs(bench, n_jobs)
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
        found = done_once(bench, n_jobs, logs)
    return {
        "jobs": n_jobs,
        "workers": n_workers,
        "nodes": n_nodes,
        "kill_every_s": kill_every_s,
        "killed": kills,
        "seconds": round(seconds, 1),
        **found,
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
        work_on_ray(worker, folder, address)
    config = {"jobs": jobs, "workers": workers, "nodes": nodes, "kill_every_s": kill_every_s}
    report = Report("ray nodes", config, ("ray", "sqlalchemy", "psycopg"))
    report.config["niceness"] = os.nice(0)
    with tempfile.TemporaryDirectory() as name:
        report.rows.append(measure(jobs, workers, nodes, kill_every_s, Path(name)))
    report.finish({key: lambda row, key=key: str(row[key]) for key in report.rows[0]}, out)  # type: ignore[misc]


if __name__ == "__main__":
    typer.run(main)
