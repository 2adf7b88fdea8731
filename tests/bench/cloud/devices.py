"""Control calls of a large fleet while personalisations are queued: latency by call, errors, and the server's memory.

Every device is enrolled in a PostgreSQL database. As many as ``--connected`` have a connection of their own and ask at
random times (open loop): new personalisations at ``--jobs-per-s``, each by a device without one, and descriptions of
students at ``--asks-per-s`` by everybody. No worker runs, so the queue grows all the time. Latency counts from the time
at which a call was due.

Then ``--more-calls`` are made as fast as they are answered, both kinds in turn, and the server's memory is read after
each 20th of them. A tenth of the calls is left out of the slope: what is kept once is kept by then.

Client, server and database share the machine. The devices are calls without a device's own logic; ``tests/bench/edge``
measures that.
"""

import asyncio
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import grpc
import numpy as np
import psutil
import typer

from isthmus.cloud.load.arrivals import poisson
from isthmus.cloud.load.outcomes import GOOD, Sent, figures
from isthmus.demo.processes import Family
from isthmus.proto.convert import prototypes_to_pb
from isthmus.proto.messages import Prototypes, UploadMode
from isthmus.proto.v1 import isthmus_pb2 as pb
from isthmus.proto.v1 import isthmus_pb2_grpc as pb_grpc
from tests.bench.harness import Report
from tests.bench.untrained import CLASSES, served_release
from tests.rigs.cloud.postgres import running_cluster

START_TIMEOUT_S = 600.0
TIMEOUT_S = 20.0
ENROLLING = 16
"""Enrolments at a time."""
AT_ONCE = 24
"""Calls at a time of those that are made as fast as they are answered."""

Metadata = tuple[tuple[str, str], ...]
Call = Callable[[int], Any]


async def enrolled(channels: list[grpc.aio.Channel], devices: int) -> list[Metadata]:
    """Enrol so many devices, over the connections in turn; return what their calls send."""
    numbers = iter(range(devices))
    metadata: list[Metadata] = []

    async def lane() -> None:
        for number in numbers:
            stub: Any = pb_grpc.PersonalisationServiceStub(channels[number % len(channels)])
            token = (await stub.Enrol(pb.EnrolRequest(device_name=f"device {number}"), timeout=TIMEOUT_S)).token
            metadata.append((("authorization", f"Bearer {token}"),))

    await asyncio.gather(*(lane() for _ in range(ENROLLING)))
    return metadata


async def sent(call: Call, rate_per_s: float, duration_s: float, seed: int) -> list[Sent]:
    """Make calls at the times of a Poisson process; return how each ended. ``call`` gets the number of the call."""
    began_s = time.perf_counter()

    async def one(number: int, due_s: float) -> Sent:
        lag_s, outcome = time.perf_counter() - began_s - due_s, GOOD
        try:
            await call(number)
        except grpc.aio.AioRpcError as error:
            outcome = error.code().name
        return Sent(due_s, lag_s, time.perf_counter() - began_s - due_s, outcome)

    tasks = []
    for number, due_s in enumerate(map(float, poisson(rate_per_s, duration_s, seed))):
        await asyncio.sleep(max(0.0, began_s + due_s - time.perf_counter()))
        tasks.append(asyncio.create_task(one(number, due_s)))
    return list(await asyncio.gather(*tasks))


def own_bytes(server: psutil.Process) -> int:
    """Return the memory that only this process can have filled: anonymous pages, in memory or swapped out.

    Resident memory also falls when the system takes back pages of files, such as those of libraries.
    """
    lines = Path(f"/proc/{server.pid}/status").read_text().splitlines()
    kib = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines) if "kB" in rest}
    return 1024 * (kib["RssAnon"] + kib["VmSwap"])


async def memory_over(call: Call, calls: int, server: psutil.Process) -> dict[str, Any]:
    """Make so many calls as fast as they are answered; return the server's memory after each 20th, and its slope."""
    began_s = time.perf_counter()
    numbers, own, failed = iter(range(calls)), [own_bytes(server)], 0

    async def lane() -> None:
        nonlocal failed
        for number in numbers:
            try:
                await call(number)
            except grpc.aio.AioRpcError:
                failed += 1
            if (number + 1) % (calls // 20) == 0:
                own.append(own_bytes(server))

    await asyncio.gather(*(lane() for _ in range(AT_ONCE)))
    later = own[2:]
    slope = float(np.polyfit(np.arange(len(later)) * (calls // 20), later, 1)[0])
    return {
        "calls": calls,
        "failed": failed,
        "calls_per_s": round(calls / (time.perf_counter() - began_s), 1),
        "own_bytes": own,
        "bytes_per_call": round(slope, 2),
    }


async def measure(
    address: str,
    server: psutil.Process,
    devices: int,
    connected: int,
    jobs_per_s: float,
    asks_per_s: float,
    s: float,
    more_calls: int,
) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """Enrol, then ask for ``s`` seconds. Return a row per kind of call, and the memory over ``more_calls`` of them."""
    own = [("grpc.use_local_subchannel_pool", 1)]
    channels = [grpc.aio.insecure_channel(address, own) for _ in range(connected)]
    rng = np.random.default_rng(0)
    values_KC = rng.dirichlet(np.ones(len(CLASSES)), 10).astype(np.float32)
    prototypes = prototypes_to_pb(Prototypes(values_KC, np.full(10, 5, np.int32), UploadMode.PROTOTYPES, 5))
    try:
        began_s = time.perf_counter()
        metadata = await enrolled(channels, devices)
        enrolling_s = time.perf_counter() - began_s
        stubs: list[Any] = [pb_grpc.PersonalisationServiceStub(channel) for channel in channels]
        await asyncio.gather(*(channel.channel_ready() for channel in channels))

        def start(number: int) -> Any:
            request = pb.StartPersonalisationRequest(idempotency_key="once", prototypes=prototypes, rounds=1, seed=1)
            of = number % devices
            return stubs[of % connected].StartPersonalisation(request, metadata=metadata[of], timeout=TIMEOUT_S)

        def describe(number: int) -> Any:
            of = number % connected
            return stubs[of].DescribeStudent(pb.DescribeStudentRequest(), metadata=metadata[of], timeout=TIMEOUT_S)

        await sent(describe, asks_per_s, 2.0, 0)
        before = own_bytes(server)
        kinds = ("StartPersonalisation", start, jobs_per_s), ("DescribeStudent", describe, asks_per_s)
        found = await asyncio.gather(*(sent(call, rate, s, 1) for _, call, rate in kinds))
        grown = own_bytes(server) - before

        def either(number: int) -> Any:
            return start(number // 2) if number % 2 else describe(number // 2)

        memory = await memory_over(either, more_calls, server) if more_calls else None
    finally:
        await asyncio.gather(*(channel.close() for channel in channels))
    rows = [
        {
            "call": name,
            "rate_per_s": rate,
            **figures(outcomes, s, 0.25),
            "server_own_bytes": before,
            "server_grew_bytes": grown,
            "enrolments_per_s": round(devices / enrolling_s, 1),
        }
        for (name, _, rate), outcomes in zip(kinds, found, strict=True)
    ]
    return rows, memory


def main(
    devices: Annotated[int, typer.Option(help="Devices that are enrolled.")] = 10_000,
    connected: Annotated[int, typer.Option(help="Devices with a connection of their own, all at once.")] = 1_000,
    jobs_per_s: Annotated[float, typer.Option(help="New personalisations per second.")] = 50.0,
    asks_per_s: Annotated[float, typer.Option(help="Other control calls per second.")] = 50.0,
    duration_s: float = 60.0,
    more_calls: Annotated[
        int, typer.Option(help="Calls over which the server's memory is watched; 180,000 are an hour at 50 per second.")
    ] = 0,
    out: Annotated[Path | None, typer.Option(help="Write the results to this JSON file.")] = None,
) -> None:
    """Measure control calls of many devices while personalisations are queued."""
    config = {"devices": devices, "connected": connected, "jobs_per_s": jobs_per_s, "asks_per_s": asks_per_s}
    config |= {"duration_s": duration_s, "more_calls": more_calls}
    report = Report("devices", config, ("grpcio", "psycopg"))
    with (
        running_cluster() as cluster,
        cluster.database() as database,
        tempfile.TemporaryDirectory() as name,
        Family(Path(name)) as family,
    ):
        folder = Path(name)
        served_release(folder / "release", (1.0,))
        serve = [sys.executable, "-m", "isthmus.cli", "cloud", "serve", "--workers", "0", "--listen", "127.0.0.1:0"]
        serve += ["--release", str(folder / "release"), "--state", str(folder / "state")]
        serve += ["--database", database.url.render_as_string(hide_password=False)]
        most = str(10 * devices)
        serve += ["--max-devices", most, "--max-enrolments-per-hour", most, "--max-queued-jobs", most]
        child = family.start("cloud", [*serve, "--port-file", str(folder / "port")])
        address = family.wait_for_address(child, folder / "port", START_TIMEOUT_S)
        server = psutil.Process(child.process.pid)
        asked = (devices, connected, jobs_per_s, asks_per_s, duration_s, more_calls)
        report.rows, memory = asyncio.run(measure(address, server, *asked))
    if memory is not None:
        for row in report.rows:
            row["memory"] = memory
        mb = [each / 1e6 for each in memory["own_bytes"]]
        report.notes.append(
            f"Memory over {memory['calls']:,} more calls ({memory['calls_per_s']:g} per second, {memory['failed']} "
            f"failed): {mb[0]:.0f} MB before, {mb[2]:.0f} after a tenth, {mb[-1]:.0f} at the end; "
            f"{memory['bytes_per_call']:g} bytes per call."
        )
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "call": lambda row: str(row["call"]),
        "per s": lambda row: f"{row['sent_per_s']:.0f}",
        "p50 ms": lambda row: f"{row['latency_ms']['p50']:.1f}",
        "p99 ms": lambda row: f"{row['latency_ms']['p99']:.1f}",
        "lag p99 ms": lambda row: f"{row['generator_lag_ms']['p99']:.1f}",
        "errors": lambda row: str(row["errors"] or "-"),
        "server MB": lambda row: f"{row['server_own_bytes'] / 1e6:.0f}",
        "grew MB": lambda row: f"{row['server_grew_bytes'] / 1e6:.1f}",
    }
    report.finish(columns, out)


if __name__ == "__main__":
    typer.run(main)
