"""A rolling update under load: two servers on one database are replaced in turn, and every failed call is counted.

A client-side balancer (gRPC's round robin over both addresses) sends control calls of enrolled devices all the time.
Each server in turn is told to stop (SIGTERM), ends, and a new process takes its port. A client of a stopped server
tries it again within 10 s, so the next server stops no sooner after the one before it is back.

A call fails if its caller gets an error. gRPC itself sends a call again that never reached the old server. One that
reached it, but was not begun at the moment at which it stopped, gRPC's server ends as CANCELLED. A device asks
again then, as after UNAVAILABLE, and so do the callers here. Such calls are counted as asked again.
"""

import asyncio
import json
import os
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import grpc
import typer

from isthmus.demo.processes import Child, Family
from isthmus.proto import keepalive
from isthmus.proto.v1 import isthmus_pb2 as pb
from isthmus.proto.v1 import isthmus_pb2_grpc as pb_grpc
from tests.bench.harness import Report
from tests.bench.untrained import served_release
from tests.rigs.cloud.postgres import running_cluster

START_TIMEOUT_S = 600.0
CALL_TIMEOUT_S = 20.0
NOT_BEGUN = "CANCELLED: CANCELLED"
"""How gRPC's server ends a call that it received and had not begun when it stopped."""
PAUSE_S = 0.02
"""Between a caller's answer and its next call."""
BALANCED = json.dumps({"loadBalancingConfig": [{"round_robin": {}}]})


class Fronts:
    """Two servers on one database, on ports that stay."""

    def __init__(self, family: Family, folder: Path, database: str) -> None:
        self._family, self._folder, self._database = family, folder, database
        with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as two:
            self.ports = [each.getsockname()[1] for each in (one, two)]
        self._children = [self._start(0), self._start(1)]

    def _start(self, number: int) -> Child:
        port_file = self._folder / f"port{number}"
        port_file.unlink(missing_ok=True)
        serve = [sys.executable, "-m", "isthmus.cli", "cloud", "serve", "--workers", "0"]
        serve += ["--listen", f"127.0.0.1:{self.ports[number]}", "--port-file", str(port_file)]
        serve += ["--release", str(self._folder / "release"), "--state", str(self._folder / f"state{number}")]
        serve += ["--database", self._database, "--artefacts", str(self._folder / "artefacts")]
        if number:
            serve += ["--signing-key-file", str(self._folder / "state0" / "signing_key")]
        child = self._family.start(f"front{number}", serve)
        self._family.wait_for_address(child, port_file, START_TIMEOUT_S)
        return child

    def replace(self, number: int) -> float:
        """Stop a server and start the next one on its port. Returns the seconds until the old one had ended."""
        began_s, process = time.monotonic(), self._children[number].process
        process.send_signal(signal.SIGTERM)
        process.wait(START_TIMEOUT_S)
        ended_s = time.monotonic() - began_s
        self._children[number] = self._start(number)
        return ended_s


async def describe(stub: Any, metadata: Any) -> str:
    """Make one call; return "answered" or the status and details of its error."""
    try:
        await stub.DescribeStudent(pb.DescribeStudentRequest(), metadata=metadata, timeout=CALL_TIMEOUT_S)
    except grpc.aio.AioRpcError as error:
        return f"{error.code().name}: {error.details()}"
    return "answered"


async def measure(fronts: Fronts, callers: int, rounds: int, between_s: float) -> dict[str, Any]:
    """Replace each server in turn while ``callers`` devices ask; return the outcomes of their calls."""
    addresses = ",".join(f"127.0.0.1:{port}" for port in fronts.ports)
    options = [*keepalive.device_options(), ("grpc.service_config", BALANCED)]
    outcomes: Counter[str] = Counter()
    longest_s, stop = 0.0, asyncio.Event()

    async def device(channel: grpc.aio.Channel, number: int) -> None:
        nonlocal longest_s
        stub: Any = pb_grpc.PersonalisationServiceStub(channel)
        token = (await stub.Enrol(pb.EnrolRequest(device_name=f"device {number}"), timeout=CALL_TIMEOUT_S)).token
        metadata = (("authorization", f"Bearer {token}"),)
        while not stop.is_set():
            began_s = time.monotonic()
            outcome = await describe(stub, metadata)
            if outcome == NOT_BEGUN:
                outcomes["asked again"] += 1
                outcome = await describe(stub, metadata)
            outcomes[outcome] += 1
            longest_s = max(longest_s, time.monotonic() - began_s)
            await asyncio.sleep(PAUSE_S)

    async with grpc.aio.insecure_channel(f"ipv4:{addresses}", options) as channel:
        calling = [asyncio.create_task(device(channel, number)) for number in range(callers)]
        ended_s = []
        for number in [0, 1] * rounds:
            await asyncio.sleep(between_s)
            ended_s.append(await asyncio.to_thread(fronts.replace, number))
        await asyncio.sleep(between_s)
        stop.set()
        await asyncio.gather(*calling)
    answered, asked_again = outcomes.pop("answered", 0), outcomes.pop("asked again", 0)
    return {
        "replaced": len(ended_s),
        "answered": answered,
        "asked_again": asked_again,
        "failed": sum(outcomes.values()),
        "errors": dict(outcomes),
        "longest_call_s": round(longest_s, 3),
        "longest_end_s": round(max(ended_s), 3),
    }


def main(
    callers: Annotated[int, typer.Option(help="Devices that ask, each one call at a time.")] = 8,
    rounds: Annotated[int, typer.Option(help="How often each of the two servers is replaced.")] = 2,
    between_s: Annotated[float, typer.Option(help="Seconds from a server's return until the next one stops.")] = 10.0,
    out: Annotated[Path | None, typer.Option(help="Write the results to this JSON file.")] = None,
) -> None:
    """Replace two servers in turn under load, and count the calls that fail."""
    report = Report("rolling", {"callers": callers, "rounds": rounds, "between_s": between_s}, ("grpcio", "psycopg"))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with (
        running_cluster() as cluster,
        cluster.database() as database,
        tempfile.TemporaryDirectory() as name,
        Family(Path(name)) as family,
    ):
        folder = Path(name)
        served_release(folder / "release", (1.0,))
        url = database.url.render_as_string(hide_password=False)
        report.rows.append(asyncio.run(measure(Fronts(family, folder, url), callers, rounds, between_s)))
    report.finish({key: lambda row, key=key: str(row[key]) for key in report.rows[0]}, out)  # type: ignore[misc]


if __name__ == "__main__":
    typer.run(main)
