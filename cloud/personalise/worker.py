"""The worker process: takes one job at a time, in a process of its own, so that learning never delays an answer.

The server starts it and writes to its standard input: first one line of JSON (``Hello``), then an empty line whenever
there may be new work. The worker ends when its input ends or the server dies. ``isthmus cloud worker`` runs the same
worker without a server. On PostgreSQL any number of workers share the jobs, see ``leases.py``.
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
from typing import Final
from uuid import uuid4

from isthmus.cloud import logs, tracing
from isthmus.cloud.cluster import connection as cluster
from isthmus.cloud.personalise import job_rows, leases, signing
from isthmus.cloud.personalise.job import Expired, Stalled
from isthmus.cloud.personalise.learning import Learning, StepDied
from isthmus.cloud.personalise.leases import LeaseLost
from isthmus.cloud.personalise.runner import Runner
from isthmus.cloud.personalise.runners import Opened, Runners
from isthmus.cloud.personalise.students import Shelf
from isthmus.cloud.personalise.work_files import WorkFiles
from isthmus.cloud.releases.copies import Copies
from isthmus.cloud.settings import CloudSettings
from isthmus.cloud.store import lock, news, releases
from isthmus.cloud.store.artefacts import Artefacts
from isthmus.cloud.store.database import Database
from isthmus.extensions import load_extensions
from isthmus.proto.errors import Corrupt, InvalidInput, IsthmusError, Locked, NotYours, StorageFull, WrongState

log = logging.getLogger(__name__)

_IDLE_S: Final = 5.0
"""How often to look for work without a signal: jobs that stalled, devices that never came back."""
_PREDECESSOR_S: Final = 10.0
_PR_SET_PDEATHSIG: Final = 1


class Worker:
    """Looks for work and runs it. ``settings`` are the server's. Its identity is a new UUID, never a host's name."""

    def __init__(self, settings: CloudSettings, worker: str | None = None) -> None:
        """``worker``: the UUID to use, in hexadecimal. Default: a new one."""
        self.worker = worker or uuid4().hex
        self._settings = settings
        self.database = Database(settings.database_url)
        self._artefacts = Artefacts(settings.artefacts_url)
        self.files = WorkFiles(settings.work_dir, self._artefacts if self.database.shared else None)
        self.traces = tracing.open_traces(settings.traces, settings.traces_share, "isthmus-worker")
        self._news = threading.Event()
        self._stopping = False

    def tell(self) -> None:
        """Signal that there may be new work."""
        self._news.set()

    def run_forever(self) -> None:
        """Work until ``stop``. Raises errors that are neither one job's fault nor temporary."""
        news.listen(self.database, job_rows.CHANNEL, self.tell)
        while not self._stopping:
            self._news.clear()
            try:
                busy = self.run_once()
            except LeaseLost as error:
                log.warning("%s: what it made of the job is dropped", error)
                busy = True
            except Locked:
                raise
            except IsthmusError as error:
                log.warning("the worker pauses: %s", error)
                self._hand_back()
                busy = False
            if not busy and not self._stopping:
                self._news.wait(_IDLE_S)

    def run_once(self) -> bool:
        """Work on the job that is due. Returns whether there was one."""
        self.sweep()
        now_s = self.database.now_s()
        for job_id in job_rows.awaiting_since(self.database, now_s - self._settings.awaiting_timeout_s):
            with suppress(WrongState, NotYours):  # another worker was faster
                job_rows.apply(self.database, job_id, Expired(), now_s)
                self.files.discard(job_id)
        if not leases.is_due(self.database, now_s):
            return False
        usable = {self.runners.own_id} | releases.stored_ids(self.database)
        held = leases.take(self.database, self.worker, releases=usable, now_s=now_s)
        if held is None:
            return False
        with leases.kept(self.database, held.lease):
            try:
                runner = self.runners.of(held.job.release_hash)
            except (Corrupt, StorageFull) as error:
                # The job waits, and others go first: an operator can mend this.
                job_rows.apply(self.database, held.job.job_id, Stalled(str(error)), self.database.now_s())
                log.warning("job %s waits: %s", held.job.job_id, error)
                return True
        try:
            runner.run(held)
        except StepDied as error:
            log.warning("job %s: %s", held.job.job_id, error)
            leases.step_died(self.database, held.lease)
        return True

    def stop(self) -> None:
        """Hand the job back that is under way, so that another worker takes it at once. Writes of this one end here."""
        self._stopping = True
        self._hand_back()
        self.tell()
        self.traces.close()

    def _hand_back(self) -> None:
        with suppress(IsthmusError):
            leases.hand_back(self.database, self.worker)

    @cached_property
    def runners(self) -> Runners:
        """What runs jobs, by release."""
        settings = self._settings
        if settings.release is None:
            raise InvalidInput("a worker needs a release")
        shelf, signer = Shelf(self.database, self._artefacts), signing.load(settings.signing_key_path)
        if settings.worker_threads is not None:
            # Imported at the first job, so that a worker without work stays small.
            import torch

            torch.set_num_threads(settings.worker_threads)

        def run_on(opened: Opened) -> Runner:
            return Runner(
                shelf=shelf,
                signer=signer,
                offer=opened.offer,
                learning=self._placed(opened),
                files=self.files,
                keep_students=settings.keep_students,
                now_s=self.database.now_s,
                traces=self.traces,
            )

        copies = Copies(settings.state / "releases", self._artefacts, settings.release_copies_bytes)
        return Runners(self.database, copies, settings.release, run_on)

    def _placed(self, opened: Opened) -> Learning:
        """Returns the learning on a release: here, or on the Ray cluster that the settings name.

        Machines of a cluster elsewhere have the worker's own release, and none that the worker has fetched.
        """
        if not cluster.is_ray(self._settings.executor):
            return opened.learning
        if self._settings.executor != cluster.LOCAL and opened.folder != self._settings.release:
            log.info("steps on release %s run here: the cluster has no copy of it", opened.offer.release_hash)
            return opened.learning
        from isthmus.cloud.personalise.elsewhere.on_ray import RayLearning

        return RayLearning(
            opened.learning,
            opened.folder,
            opened.offer.release_hash,
            address=self._settings.executor,
            threads=self._settings.worker_threads,
            shard_samples=self._settings.selection_shard_samples,
        )

    def sweep(self) -> None:
        """Remove working files of jobs that have ended, here or on another machine, or whose device was deleted."""
        there = self.files.job_ids()
        if there:
            for job_id in there - {job.job_id for job in job_rows.named(self.database, there) if not job.stage.ended}:
                self.files.discard(job_id)


@dataclass(frozen=True)
class Hello:
    """The first message from a server to its worker. It goes through a pipe: it may hold the database's password."""

    settings: str
    """``CloudSettings.to_json``."""
    parent_pid: int
    worker: str
    """UUID of this worker."""
    predecessor: str | None = None
    """UUID of the worker before, which has ended."""
    crashed: bool = False
    """Whether the worker before ended by its own fault, so by that of the job that it had taken."""


def die_with_parent(parent_pid: int) -> None:
    """Ask the kernel to kill this process when the server dies, even by ``kill -9`` (Linux; elsewhere input ends)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        sys.exit("the server that started this worker is gone")


def main() -> None:
    hello = Hello(**json.loads(sys.stdin.buffer.readline()))
    die_with_parent(hello.parent_pid)
    # Ctrl-C reaches all processes of the terminal; the server decides when the worker ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    settings = CloudSettings.from_json(hello.settings)
    logs.configure(settings.log_level, settings.log_format)
    load_extensions()
    worker = Worker(settings, hello.worker)

    def listen() -> None:
        for _ in sys.stdin.buffer:
            worker.tell()
        # Each step is stored before the next begins, so an exit in the middle loses nothing.
        worker.stop()
        os._exit(0)

    threading.Thread(target=listen, daemon=True, name="input").start()
    held = _alone(worker.database)
    _bury(worker.database, hello)
    try:
        worker.run_forever()
    finally:
        held.release()


def _alone(database: Database) -> lock.Lock:
    """Take the worker's lock, waiting for the worker of a killed server to end. Raises Locked if it does not."""
    until_s = time.monotonic() + _PREDECESSOR_S
    while True:
        try:
            return lock.acquire(database, "worker")
        except Locked:
            if time.monotonic() > until_s:
                raise
            time.sleep(0.1)


def _bury(database: Database, hello: Hello) -> None:
    """Free the jobs of workers that have certainly ended."""
    if hello.predecessor is not None and hello.crashed:
        leases.died(database, hello.predecessor)
    elif hello.predecessor is not None:
        leases.hand_back(database, hello.predecessor)
    if not database.shared:
        leases.hand_back(database)  # Under the lock of an SQLite database there is no other worker.


if __name__ == "__main__":
    main()
