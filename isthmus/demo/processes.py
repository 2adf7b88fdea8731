"""Child processes that end with their parent and whose failure names their log."""

import contextlib
import errno
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Final

MODULE: Final = ("-P", "-m", "isthmus.cli")
"""Arguments of Python that run ``isthmus``. With -P a folder in the working folder cannot take the package's place."""
POLL_S: Final = 0.2
"""Interval at which a child is checked while waiting for it."""

_ADDRESS = re.compile(r"^\S+:\d+$")
_END_WITH_PARENT: Final = """
import ctypes, os, signal, sys
PR_SET_PDEATHSIG = 1
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
if os.getppid() != int(sys.argv[1]):
    sys.exit("the parent has ended")
os.execvp(sys.argv[2], sys.argv[2:])
"""


class ChildFailed(Exception):
    """A child failed, ended too early or did not end. The message names its log and shows the log's last line."""


def ending_with_parent(argv: Sequence[str | Path]) -> list[str]:
    """Return a command that runs ``argv``, to be started from the main thread of this process.

    On Linux the kernel sends SIGTERM to it when that thread ends, even if this process is killed. Raises
    FileNotFoundError if there is no such program.
    """
    if shutil.which(argv[0]) is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(argv[0]))
    words = [str(part) for part in argv]
    if sys.platform != "linux":
        return words
    return [sys.executable, "-S", "-E", "-c", _END_WITH_PARENT, str(os.getpid()), *words]


@dataclass(frozen=True)
class Child:
    name: str
    process: subprocess.Popen[bytes]
    log_path: Path

    def last_line(self) -> str:
        """Return the last non-empty line that the child wrote, or an empty string."""
        try:
            lines = self.log_path.read_text(errors="replace").splitlines()
        except FileNotFoundError:
            return ""
        return next((line.strip() for line in reversed(lines) if line.strip()), "")

    def last_words(self) -> str:
        """Return the last line for a person: the message, if the line is a log line in JSON."""
        line = self.last_line()
        try:
            parsed = json.loads(line)
        except ValueError:
            return line
        return str(parsed.get("message", line)) if isinstance(parsed, dict) else line

    def failure(self, what: str) -> ChildFailed:
        last = self.last_words()
        return ChildFailed(f"{self.name} {what}. Its log: {self.log_path}" + (f"\n  last line: {last}" if last else ""))


class Family:
    """The children of one run. Leaving the ``with`` block ends those that still run: SIGTERM, then SIGKILL.

    Each child has its own session. So Ctrl-C reaches only the parent, which ends the children in the right order. If
    the parent is killed, the kernel ends them.
    """

    def __init__(self, log_dir: Path, grace_s: float = 10.0):
        self._log_dir = log_dir
        self._grace_s = grace_s
        self._children: list[Child] = []
        log_dir.mkdir(parents=True, exist_ok=True)

    def start(
        self,
        name: str,
        argv: Sequence[str | Path],
        *,
        env: Mapping[str, str] | None = None,
        output: Path | None = None,
    ) -> Child:
        """Start ``argv`` with its outputs in ``<log_dir>/<name>.log``, or standard output in ``output`` if it is given.

        ``env`` adds to the environment. Raises ChildFailed if the process does not start.
        """
        log_path = self._log_dir / f"{name.replace(' ', '-')}.log"
        with contextlib.ExitStack() as files:
            log = files.enter_context(log_path.open("wb"))
            stdout = log if output is None else files.enter_context(output.open("wb"))
            try:
                process = subprocess.Popen(
                    ending_with_parent(argv),
                    stdin=subprocess.DEVNULL,
                    stdout=stdout,
                    stderr=log,
                    env={**os.environ, **(env or {})},
                    start_new_session=True,
                )
            except OSError as error:
                raise ChildFailed(f"{name} does not start: {error}") from error
        child = Child(name, process, log_path)
        self._children.append(child)
        return child

    def wait(self, *awaited: Child, timeout_s: float, on_tick: Callable[[], None] = lambda: None) -> None:
        """Wait until every awaited child has ended with code 0, calling ``on_tick`` from time to time.

        Raises ChildFailed as soon as one of them ends with another code, another child of the family ends at all
        (it was meant to keep serving), or ``timeout_s`` has passed.
        """
        deadline_s = time.monotonic() + timeout_s
        open_children = list(awaited)
        servants = [child for child in self._children if child not in awaited and child.process.returncode is None]
        while open_children:
            for child in servants:
                if child.process.poll() is not None:
                    raise child.failure(f"ended (code {child.process.returncode}) while it was needed")
            with contextlib.suppress(subprocess.TimeoutExpired):
                open_children[0].process.wait(POLL_S)
            on_tick()
            for child in list(open_children):
                code = child.process.poll()
                if code == 0:
                    open_children.remove(child)
                elif code is not None:
                    raise child.failure(f"failed (code {code})")
            if open_children and time.monotonic() > deadline_s:
                raise open_children[0].failure(f"was not done after {timeout_s:.0f} s")

    def wait_for_address(self, child: Child, port_file: Path, timeout_s: float) -> str:
        """Return HOST:PORT once the child has written it to ``port_file`` and answers there. Raises ChildFailed."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            with contextlib.suppress(FileNotFoundError):
                address = port_file.read_text().strip()
                if _ADDRESS.match(address) and _answers(address):
                    return address
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = child.process.wait(POLL_S)
                raise child.failure(f"ended (code {code}) before it listened")
            if time.monotonic() > deadline_s:
                raise child.failure(f"did not listen within {timeout_s:.0f} s")

    def __enter__(self) -> "Family":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        alive = [child for child in reversed(self._children) if child.process.poll() is None]
        for child in alive:
            child.process.terminate()
        deadline_s = time.monotonic() + self._grace_s
        for child in alive:
            try:
                child.process.wait(max(0.0, deadline_s - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.process.kill()
                child.process.wait()


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=1.0):
            return True
    except OSError:
        return False


@contextlib.contextmanager
def termination_unwinds() -> Iterator[None]:
    """Make SIGTERM unwind the ``with`` blocks as Ctrl-C does, so that no child outlives its parent."""

    def leave(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
