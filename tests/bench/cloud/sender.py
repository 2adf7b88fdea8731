"""A process that sends control calls on command, and reports the outcome of each.

python -m tests.bench.cloud.sender ADDRESS CONNECTIONS [KEY_FILE]

With a key file it enrols a device per connection and asks for descriptions of its student; without one it asks the
load generator's echo server. It writes "ready". Each line of its input, "RATE SECONDS SEED", is a load (open loop); the
answer is a line of JSON with what became of each call and the processor seconds of this process. It ends with its
input.
"""

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Final

from isthmus.cloud.load import run
from isthmus.cloud.load.arrivals import poisson
from isthmus.cloud.load.callers import ECHO_UNARY, Caller, Device, Unary, channel_to
from isthmus.cloud.load.outcomes import Sent
from isthmus.demo.processes import ending_with_parent

_OPEN_S: Final = 60.0
_TIMEOUT_S: Final = 20.0


@dataclass(frozen=True)
class Load:
    """What became of the calls of one load, and the processor seconds of the process that sent them."""

    sent: list[Sent]
    cpu_s: float


@dataclass(frozen=True)
class Sender:
    """The process: ``begin`` a load, then wait for what it ``found``."""

    process: "subprocess.Popen[str]"

    def begin(self, rate: float, seconds: float, seed: int) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{rate} {seconds} {seed}\n")
        self.process.stdin.flush()

    def found(self) -> Load:
        answer = json.loads(self.line())
        return Load([Sent(*call) for call in answer["calls"]], answer["cpu_s"])

    def line(self) -> str:
        """Wait for a line. Raises RuntimeError if the process has ended."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("the process that sends calls has ended; its error is above")
        return line


@contextmanager
def sender_to(address: str, connections: int, key: Path | None = None) -> Iterator[Sender]:
    """Start the process, and end it afterwards. Its devices are enrolled once this returns."""
    command = [sys.executable, "-m", "tests.bench.cloud.sender", address, str(connections)]
    command = ending_with_parent([*command, *([] if key is None else [str(key)])])
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        sender = Sender(process)
        sender.line()
        try:
            yield sender
        finally:
            process.kill()


async def _send(callers: list[Caller]) -> None:
    await run.open_all(callers, _OPEN_S)
    print("ready", flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        rate, seconds, seed = line.split()
        used_s = time.process_time()
        sent = await run.open_loop(callers, poisson(float(rate), float(seconds), int(seed)), _TIMEOUT_S)
        used_s = time.process_time() - used_s
        print(json.dumps({"calls": [astuple(each) for each in sent], "cpu_s": used_s}), flush=True)


async def main(address: str, connections: str, key_file: str = "") -> None:
    """Make a connection per caller, and send as the input says."""
    key = Path(key_file).read_text().strip() if key_file else ""
    callers: list[Caller] = [
        Device(channel_to(address), enrolment_key=key) if key else Unary(channel_to(address), ECHO_UNARY, b"")
        for _ in range(int(connections))
    ]
    try:
        await _send(callers)
    finally:
        for caller in callers:
            await caller.close()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
