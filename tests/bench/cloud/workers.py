"""Workers that are killed all the time: every job is done, and done once.

Starts a PostgreSQL cluster, several worker processes on it, and kills one of them (SIGKILL) at each interval; another
takes its place. A learning step takes milliseconds; state machine, leases, database and artefacts are the real ones.
At the end one worker is paused (SIGSTOP) in mid-job for longer than its lease, and its late writes must be refused.
Another is killed in mid-job while nobody else is there, and the time is taken until a new worker takes the job.
"""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated
from uuid import uuid4

import sqlalchemy as sa
import typer

from isthmus.cloud.personalise import job_rows
from isthmus.cloud.personalise.leases import LEASE_S
from isthmus.cloud.store.schema import jobs
from isthmus.proto.messages import Stage
from tests.bench.cloud.job_workers import STEP_S, bench_on, done_once, left, with_jobs, work
from tests.bench.harness import Report
from tests.rigs.cloud.jobs import Bench, CountedLearning
from tests.rigs.cloud.postgres import running_cluster


def measure(n_jobs: int, n_workers: int, kill_every_s: float, lease_s: float, folder: Path) -> dict[str, object]:
    """Return the figures of one run. Raises AssertionError if a job was lost, failed or done twice."""
    with running_cluster() as cluster, cluster.database() as database:
        url = database.url.render_as_string(hide_password=False)
        bench = bench_on(url, folder / "server", folder)
        with_jobs(bench, n_jobs)
        logs = folder / "logs"
        logs.mkdir()
        started: list[Path] = []

        def start() -> subprocess.Popen[bytes]:
            started.append(logs / f"{len(started)}")
            command = [sys.executable, "-m", "tests.bench.cloud.workers", "--worker", url, "--folder", str(folder)]
            command += ["--lease-s", str(lease_s)]
            with started[-1].open("wb") as log:
                return subprocess.Popen(command, stdout=log, stderr=log)

        rng, kills = random.Random(0), 0
        processes = [start() for _ in range(n_workers)]
        began_s = next_kill_s = time.monotonic()
        next_kill_s += kill_every_s
        try:
            while left(bench):
                time.sleep(0.1)
                if time.monotonic() >= next_kill_s:
                    victim = rng.randrange(n_workers)
                    processes[victim].kill()
                    processes[victim].wait()
                    processes[victim] = start()
                    kills += 1
                    next_kill_s += kill_every_s
            seconds = time.monotonic() - began_s
        finally:
            for process in processes:
                process.kill()
                process.wait()
        found = done_once(bench, n_jobs, started)
        late = _paused(bench, start)
        again_s = _taken_again(bench, start)
    return {
        "jobs": n_jobs,
        "workers": n_workers,
        "kill_every_s": kill_every_s,
        "killed": kills,
        "seconds": round(seconds, 1),
        **found,
        "paused_worker": late,
        "taken_again_after_s": again_s,
    }


def _paused(bench: Bench, start: Callable[[], subprocess.Popen[bytes]]) -> dict[str, object]:
    """Pause a worker in mid-job until another has finished the job; wake it and see what it says."""
    bench.enrol("paused")
    bench.start(device_id="paused", job_id="paused")
    process = start()
    while (held := job_rows.get(bench.database, "paused")) is None or held.stage is Stage.QUEUED:
        time.sleep(0.0005)
    os.kill(process.pid, signal.SIGSTOP)
    stopped = job_rows.get(bench.database, "paused")
    if stopped is None or stopped.stage.ended:
        process.kill()
        process.wait()
        return {"stopped_while": "ended"}
    with bench.database.writing() as connection:  # its lease ends now, and not in 20 s
        connection.execute(jobs.update().where(jobs.c.id == "paused").values(lease_until_s=1.0))
    held_again = bench.take(uuid4().hex)
    assert held_again is not None
    done = bench.runner(CountedLearning()).run(held_again)
    before = _row(bench)
    os.kill(process.pid, signal.SIGCONT)
    time.sleep(1.0)
    process.kill()
    process.wait()
    assert done.stage is Stage.READY and _row(bench) == before, "a late write changed the job"
    return {"stopped_while": stopped.stage.value, "row_unchanged": True}


def _taken_again(bench: Bench, start: Callable[[], subprocess.Popen[bytes]]) -> float:
    """Kill the only worker in mid-job and start another; return the seconds from the kill until it has the job."""
    while True:
        job_id = f"killed{uuid4().hex[:8]}"
        bench.enrol(job_id)
        bench.start(device_id=job_id, job_id=job_id)
        process = start()
        while (held := job_rows.get(bench.database, job_id)) is None or held.stage is Stage.QUEUED:
            time.sleep(0.0005)
        process.kill()
        killed_s = time.monotonic()
        process.wait()
        held = job_rows.get(bench.database, job_id)
        if held is not None and not held.stage.ended:
            break
    fence = _fence(bench, job_id)
    process = start()
    while _fence(bench, job_id) == fence:
        time.sleep(0.01)
    again_s = time.monotonic() - killed_s
    process.kill()
    process.wait()
    return round(again_s, 1)


def _fence(bench: Bench, job_id: str) -> int:
    with bench.database.reading() as connection:
        return int(connection.scalar(sa.select(jobs.c.fence).where(jobs.c.id == job_id)) or 0)


def _row(bench: Bench) -> tuple[object, ...]:
    with bench.database.reading() as connection:
        return tuple(connection.execute(sa.select(jobs).where(jobs.c.id == "paused")).one())


def main(
    jobs: Annotated[int, typer.Option(help="Number of jobs.")] = 1_000,
    workers: Annotated[int, typer.Option(help="Workers at any time.")] = 4,
    kill_every_s: Annotated[float, typer.Option(help="Seconds between two kills.")] = 5.0,
    lease_s: Annotated[float, typer.Option(help="Seconds of a lease.")] = LEASE_S,
    out: Annotated[Path | None, typer.Option(help="Write the results to this JSON file.")] = None,
    worker: Annotated[str, typer.Option(hidden=True)] = "",
    folder: Annotated[Path, typer.Option(hidden=True)] = Path(),
) -> None:
    """Kill workers while they work, and count what becomes of the jobs."""
    if worker:
        work(worker, folder, CountedLearning(lambda step: time.sleep(STEP_S)), lease_s)
    config = {"jobs": jobs, "workers": workers, "kill_every_s": kill_every_s, "lease_s": lease_s}
    report = Report("workers", config, ("sqlalchemy", "psycopg"))
    with tempfile.TemporaryDirectory() as name:
        report.rows.append(measure(jobs, workers, kill_every_s, lease_s, Path(name)))
    report.finish({key: lambda row, key=key: str(row[key]) for key in report.rows[0]}, out)  # type: ignore[misc]


if __name__ == "__main__":
    typer.run(main)
