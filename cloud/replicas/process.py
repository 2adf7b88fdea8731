"""A replica in a process of its own, which listens on loopback for whoever has its key.

The process is told what to open, and the key, through its input: nothing of it is on the command line or in a file. It
ends when its input ends, so it never outlives the server.
"""

import asyncio
import json
import logging
import sys
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

from isthmus.cloud.generation.serve.carrier import Carrier, HttpCarrier
from isthmus.cloud.replicas.hosted import Opening
from isthmus.proto.errors import InvalidInput

log = logging.getLogger(__name__)

END_S: Final = 5.0
MAX_LINE_BYTES: Final = 1 << 16
_CHILD: Final = "isthmus.cloud.replicas.child"


@dataclass(frozen=True)
class RunningProcess:
    """A replica's process, and the carrier to it."""

    process: asyncio.subprocess.Process
    carrier: Carrier

    @property
    def pid(self) -> int:
        return self.process.pid

    async def gone(self) -> str:
        code = await self.process.wait()
        return f"its process ended with {code}"

    async def end(self) -> None:
        try:
            await self.carrier.close()
        finally:
            await _end(self.process)


async def start(opening: Opening) -> RunningProcess:
    """Starts a process and waits until its model answers. Raises InvalidInput, with what it says, if it cannot."""
    try:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", _CHILD),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=MAX_LINE_BYTES,
        )
    except OSError as error:
        raise InvalidInput(f"a process for a replica cannot be started: {error.strerror}") from error
    try:
        assert process.stdin is not None and process.stdout is not None
        with suppress(OSError):
            process.stdin.write(opening.to_json().encode() + b"\n")
            await process.stdin.drain()
        said = _said(await process.stdout.readline())
        if "port" not in said:
            code = await process.wait()
            raise InvalidInput(str(said.get("failed") or f"the process of a replica ended with {code}"))
    except BaseException:
        await _end(process)
        raise
    log.info("a replica runs in process %d", process.pid)
    return RunningProcess(process, HttpCarrier(f"http://127.0.0.1:{said['port']}"))


def _said(line: bytes) -> dict[str, Any]:
    """Returns what a process says; nothing if it was killed in the middle of its line."""
    try:
        found = json.loads(line)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


async def _end(process: asyncio.subprocess.Process) -> None:
    """Lets a process end by the end of its input. Kills it after ``END_S``, or at once if the caller is cancelled."""
    if process.stdin is not None:
        process.stdin.close()
    try:
        async with asyncio.timeout(END_S):
            await process.wait()
    except BaseException as error:
        with suppress(ProcessLookupError):
            process.kill()
        if not isinstance(error, TimeoutError):
            raise
        await process.wait()
