"""Worker processes of the benches that kill: they take jobs until they are killed, and say what became of each.

State machine, leases, database and artefacts are the real ones. Each bench brings its own learning steps.
"""

import threading
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, NoReturn
from uuid import uuid4

import sqlalchemy as sa

from isthmus.cloud.personalise import job_rows, leases
from isthmus.cloud.personalise.learning import Learning
from isthmus.cloud.personalise.leases import LEASE_S, LeaseLost
from isthmus.cloud.store import news
from isthmus.cloud.store.schema import jobs, students
from isthmus.proto.errors import IsthmusError
from isthmus.proto.messages import Stage
from tests.rigs.cloud.jobs import Bench

STEP_S: Final = 0.002
"""How long a learning step takes."""
_POLL_S: Final = 0.5
_PAUSE_S: Final = 1.0
"""Pause of a worker that lost a step or the database. The real one pauses for 5 s."""


def bench_on(url: str, own: Path, shared: Path) -> Bench:
    """Return a bench on a database, with its own folder and artefacts that all of them share."""
    own.mkdir(parents=True)
    bench = Bench(own, url, str(shared / "artefacts"))
    bench.now_s = bench.database.now_s  # type: ignore[method-assign]
    return bench


def with_jobs(bench: Bench, count: int) -> None:
    """Enrol so many devices and start a job for each."""
    for number in range(count):
        bench.enrol(f"dev{number}")
        bench.start(device_id=f"dev{number}", job_id=f"job{number}")


def work(url: str, shared: Path, learning: Learning, lease_s: float = LEASE_S) -> NoReturn:
    """Take jobs until killed. Prints a line per job: its stage, "refused" or "pauses"."""
    bench = bench_on(url, shared / uuid4().hex, shared)
    woken = threading.Event()
    news.listen(bench.database, job_rows.CHANNEL, woken.set)
    runner = bench.runner(learning)
    worker = uuid4().hex
    while True:
        woken.clear()
        held = None
        try:
            held = bench.take(worker, lease_s=lease_s)
            if held is not None:
                done = runner.run(held)
                print(f"{done.stage.value} {done.job_id} {held.lease.fence}", flush=True)
        except LeaseLost:
            print(f"refused {held.job.job_id if held else ''}", flush=True)
        except IsthmusError as error:
            print(f"pauses {error}", flush=True)
            with suppress(IsthmusError):
                leases.hand_back(bench.database, worker)
            time.sleep(_PAUSE_S)
        if held is None:
            woken.wait(_POLL_S)


def left(bench: Bench) -> int:
    """Return how many jobs have not ended."""
    with bench.database.reading() as connection:
        ended = [stage.value for stage in Stage if stage.ended]
        return int(connection.scalar(sa.select(sa.func.count()).where(jobs.c.stage.not_in(ended))) or 0)


def done_once(bench: Bench, count: int, logs: Iterable[Path]) -> dict[str, Any]:
    """Check that each of ``count`` jobs is done, and done once; return what the workers said of them.

    Raises AssertionError if a job was lost, failed or done twice.
    """
    lines = [line.split() for path in logs for line in path.read_text(errors="replace").splitlines() if line.strip()]
    said = Counter(words[0] for words in lines)
    ready = Counter(words[1] for words in lines if words[0] == Stage.READY.value)
    with bench.database.reading() as connection:
        stages = Counter(connection.scalars(sa.select(jobs.c.stage)))
        fences = list(connection.scalars(sa.select(jobs.c.fence)))
        published = Counter(connection.scalars(sa.select(students.c.device_id)))
    assert stages == {Stage.READY.value: count}, stages
    assert len(published) == count and set(published.values()) == {1}, "one student per job"
    assert max(ready.values()) == 1, "no two workers finish one job"
    return {
        "done_once": count,
        "taken_again": sum(fence > 1 for fence in fences),
        "most_takes_of_one_job": max(fences),
        "refused_writes": said["refused"],
        "paused": said["pauses"],
    }
