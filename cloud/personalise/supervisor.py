"""The server's side of the worker: starts it, signals new work, and restarts it when it dies."""

import asyncio
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Final
from uuid import uuid4

from isthmus.cloud.personalise.worker import Hello
from isthmus.cloud.settings import CloudSettings

log = logging.getLogger(__name__)

_BACKOFF_FIRST_S: Final = 0.5
_BACKOFF_LONGEST_S: Final = 30.0
_HEALTHY_AFTER_S: Final = 60.0
_STOP_S: Final = 5.0
_FROM_OUTSIDE: Final = frozenset({signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT})
_KILL_COUNTERS: Final = (Path("/sys/fs/cgroup/memory.events"), Path("/proc/vmstat"))


class Supervisor:
    """Keeps one worker process alive between ``start`` and ``stop``."""

    def __init__(self, settings: CloudSettings, on_restart: Callable[[], None]) -> None:
        self._settings = settings
        self._on_restart = on_restart
        self._worker: str | None = None
        self._crashed = False
        self._process: asyncio.subprocess.Process | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """Process id of the worker, while there is one."""
        return None if self._process is None else self._process.pid

    async def start(self) -> None:
        """Start the first worker; returns when it runs."""
        self._process = await self._spawn()
        self._task = asyncio.create_task(self._keep_alive(self._process), name="worker supervisor")

    def tell(self) -> None:
        """Signal that there may be new work. A worker that is being started looks by itself."""
        if self._process is not None and self._process.stdin is not None and not self._process.stdin.is_closing():
            self._process.stdin.write(b"\n")

    def replace(self) -> None:
        """End the worker, so that another one starts. Its job resumes; this counts as no failure of the job."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                self._process.terminate()

    async def stop(self) -> None:
        """End the worker. Its job resumes at the next start."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
        process, self._process = self._process, None
        if process is None or process.returncode is not None:
            return
        if process.stdin is not None:
            process.stdin.close()
        try:
            await asyncio.wait_for(process.wait(), _STOP_S)
        except TimeoutError:
            process.kill()
            await process.wait()

    async def _keep_alive(self, process: asyncio.subprocess.Process) -> None:
        backoff_s = _BACKOFF_FIRST_S
        while True:
            began_s, out_of_memory = time.monotonic(), out_of_memory_kills()
            code = await process.wait()
            self._process = None
            self._crashed = by_own_fault(code, out_of_memory_kills() - out_of_memory)
            if time.monotonic() - began_s > _HEALTHY_AFTER_S:
                backoff_s = _BACKOFF_FIRST_S
            log.error("the worker ended with %s; starting another in %.1f s", code, backoff_s)
            self._on_restart()
            await asyncio.sleep(backoff_s)
            backoff_s = min(_BACKOFF_LONGEST_S, 2 * backoff_s)
            self._process = process = await self._spawn()

    async def _spawn(self) -> asyncio.subprocess.Process:
        # Spawned from the event loop's own thread, because the kernel's parent-death signal is bound to the thread.
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",  # a folder named isthmus in the working folder must not take the package's place
            "-m",
            "isthmus.cloud.personalise.worker",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.DEVNULL,
        )
        assert process.stdin is not None
        hello = Hello(self._settings.to_json(), os.getpid(), uuid4().hex, self._worker, self._crashed)
        self._worker = hello.worker
        # Sent through the pipe, because a command line would show the database's password in the process list.
        process.stdin.write(json.dumps(asdict(hello)).encode() + b"\n")
        with suppress(ConnectionError):
            await process.stdin.drain()
        return process


def by_own_fault(code: int, out_of_memory_kills: int) -> bool:
    """Return whether a process that ended with ``code`` ended by its own fault: an error, a crash, too much memory.

    SIGKILL and the other signals with which one stops a process come from outside, unless the kernel has killed for
    want of memory meanwhile.
    """
    if code >= 0:
        return code != 0
    return -code not in _FROM_OUTSIDE or (-code == signal.SIGKILL and out_of_memory_kills > 0)


def out_of_memory_kills() -> int:
    """Return how many processes the kernel has killed for want of memory: in this container, else on this machine."""
    for path in _KILL_COUNTERS:
        with suppress(OSError, ValueError):
            for line in path.read_text().splitlines():
                name, _, value = line.partition(" ")
                if name == "oom_kill":
                    return int(value)
    return 0
