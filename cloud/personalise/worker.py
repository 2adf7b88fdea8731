"""The worker process: takes one job at a time, in a process of its own, so that learning never delays an answer.

The server starts it and writes to its standard input: first one line of JSON (settings and the server's process id),
then an empty line whenever there may be new work. The worker ends when its input ends or the server dies.
"""

import ctypes
import json
import logging
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

from isthmus.cloud import logs
from isthmus.cloud.offer import offer_of
from isthmus.cloud.personalise import job_rows, signing
from isthmus.cloud.personalise.job import Expired
from isthmus.cloud.personalise.runner import Runner, discard
from isthmus.cloud.personalise.students import Shelf
from isthmus.cloud.settings import CloudSettings
from isthmus.cloud.store import lock, release_files
from isthmus.cloud.store.artefacts import Artefacts
from isthmus.cloud.store.database import Database
from isthmus.extensions import load_extensions
from isthmus.proto.errors import InvalidInput, IsthmusError, Locked

log = logging.getLogger(__name__)

_IDLE_S: Final = 5.0
"""How often to look for work without a signal: jobs that stalled, devices that never came back."""
_PREDECESSOR_S: Final = 10.0
_PR_SET_PDEATHSIG: Final = 1


class Worker:
    """Looks for work and runs it. ``settings`` are the server's."""

    def __init__(self, settings: CloudSettings, *, crashed: bool = False) -> None:
        """``crashed``: the worker before ended by its own fault, so by that of the job it had taken."""
        self._settings = settings
        self._taken = TakenFile(settings.state / "worker.job")
        self._crashed_job = self._taken.read() if crashed else None
        self.database = Database(settings.database_url)
        self._news = threading.Event()

    def tell(self) -> None:
        """Signal that there may be new work."""
        self._news.set()

    def run_forever(self) -> None:
        """Work until the process ends. Raises errors that are neither one job's fault nor temporary."""
        self.sweep()
        while True:
            self._news.clear()
            try:
                busy = self.run_once()
            except Locked:
                raise  # Another server has taken over: this worker has no more business here.
            except IsthmusError as error:
                log.warning("the worker pauses: %s", error)
                busy = False
            if not busy:
                self._news.wait(_IDLE_S)

    def run_once(self) -> bool:
        """Work on the job that is due. Returns whether there was one."""
        now_s = time.time()
        for job_id in job_rows.awaiting_since(self.database, now_s - self._settings.awaiting_timeout_s):
            job_rows.apply(self.database, job_id, Expired(), now_s)
            discard(self._settings.work_dir, job_id)
        job_due = job_rows.next_runnable(self.database, now_s)
        if job_due is None:
            return False
        runner, job_id = self._runner, job_due.job_id
        crashed, self._crashed_job = job_id == self._crashed_job, None
        self._taken.write(job_id)
        runner.run(job_id, crashed=crashed)
        self._taken.clear()
        return True

    @cached_property
    def _runner(self) -> Runner:
        # Imported at the first job, so that a worker without work stays small.
        import torch

        from isthmus.cloud.personalise.distilling import DistillLearning
        from isthmus.distill.release import Release

        settings = self._settings
        if settings.worker_threads is not None:
            torch.set_num_threads(settings.worker_threads)
        if settings.release is None:
            raise InvalidInput("a worker needs a release")
        release_files.check(self.database, settings.release)
        release = Release.open(settings.release)
        return Runner(
            shelf=Shelf(self.database, Artefacts(settings.artefacts_url)),
            signer=signing.load(settings.signing_key_path),
            offer=offer_of(release),
            learning=DistillLearning(release),
            work_dir=settings.work_dir,
            keep_students=settings.keep_students,
            now_s=time.time,
        )

    def sweep(self) -> None:
        """Remove working files of jobs that ended just before a crash."""
        if not self._settings.work_dir.is_dir():
            return
        open_jobs = {job.job_id for job in job_rows.listing(self.database) if not job.stage.ended}
        for folder in self._settings.work_dir.iterdir():
            if folder.name not in open_jobs:
                discard(self._settings.work_dir, folder.name)


@dataclass(frozen=True)
class TakenFile:
    """A file with the id of the job that the worker has taken, so that a job which kills its worker is known."""

    path: Path

    def read(self) -> str | None:
        with suppress(OSError, UnicodeDecodeError):
            return self.path.read_text().strip() or None
        return None

    def write(self, job_id: str) -> None:
        # A full disk must not stop the worker here: the job then counts as taken by nobody.
        with suppress(OSError):
            self.path.write_text(job_id)

    def clear(self) -> None:
        with suppress(OSError):
            self.path.unlink()


def die_with_parent(parent_pid: int) -> None:
    """Ask the kernel to kill this process when the server dies, even by ``kill -9`` (Linux; elsewhere input ends)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        sys.exit("the server that started this worker is gone")


def main() -> None:
    hello = json.loads(sys.stdin.buffer.readline())
    die_with_parent(hello["parent_pid"])
    # Ctrl-C reaches all processes of the terminal; the server decides when the worker ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    settings = CloudSettings.from_json(hello["settings"])
    logs.configure(settings.log_level)
    load_extensions()
    worker = Worker(settings, crashed=hello["crashed"])

    def listen() -> None:
        for _ in sys.stdin.buffer:
            worker.tell()
        # Each step is stored before the next begins, so an exit in the middle loses nothing.
        os._exit(0)

    threading.Thread(target=listen, daemon=True, name="input").start()
    held = _after_predecessor(worker.database)
    if hello["epoch"] is not None:
        # The worker writes only as long as its own server is the one that holds the database.
        worker.database.guard = lock.Fence("server", hello["epoch"])
    try:
        worker.run_forever()
    finally:
        held.release()


def _after_predecessor(database: Database) -> lock.Lock:
    """Take the worker's lock, waiting for the worker of a killed server to end. Raises Locked if it does not."""
    until_s = time.monotonic() + _PREDECESSOR_S
    while True:
        try:
            return lock.acquire(database, "worker")
        except Locked:
            if time.monotonic() > until_s:
                raise
            time.sleep(0.1)


if __name__ == "__main__":
    main()
