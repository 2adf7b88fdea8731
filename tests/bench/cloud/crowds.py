"""Latency of a known device beside a crowd of unknown callers, and the outcome of many calls at once.

Crowds: the server runs in one process and the crowd in another. The crowd keeps a number of calls open, and reopens
those that the server ends. Blocks of calls without and with the crowd alternate, so that a slower machine slows both.
Overload: a number of calls at once on one connection. Each is answered in time, refused as busy, or neither.
"""

import multiprocessing
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import grpc
import numpy as np
import typer

from isthmus.demo.processes import Family
from isthmus.proto.v1 import isthmus_pb2 as pb
from isthmus.proto.v1 import isthmus_pb2_grpc as pb_grpc
from tests.bench.harness import Report
from tests.bench.untrained import served_release
from tests.rigs.cloud.raw_http2 import CROWDS, Crowd

START_TIMEOUT_S = 600.0
CALL_TIMEOUT_S = 20.0
"""Deadline of a device's call."""
BLOCK = 100
SETTLE_S = 0.5
GATHER_S = 120.0


def main(
    calls: Annotated[int, typer.Option(help="Calls of the known device per crowd, with and without it.")] = 1000,
    crowd: Annotated[int, typer.Option(help="Calls that a crowd keeps open.")] = 1000,
    kinds: Annotated[str, typer.Option(help="Kinds of crowds, separated by commas; empty: all.")] = "",
    at_once: Annotated[str, typer.Option(help="Numbers of simultaneous calls, separated by commas.")] = "400,1000",
    out: Annotated[Path | None, typer.Option(help="Write the results to this JSON file.")] = None,
) -> None:
    """Measure a known device's latency beside crowds, and the outcome of many calls at once."""
    names = [name for name in kinds.split(",") if name] or list(CROWDS)
    report = Report("crowds", {"calls": calls, "crowd": crowd, "kinds": names, "at_once": at_once}, ("grpcio",))
    with tempfile.TemporaryDirectory() as name, Family(Path(name)) as family:
        folder = Path(name)
        served_release(folder / "release", (1.0,))
        serve = [sys.executable, "-m", "isthmus.cli", "cloud", "serve", "--workers", "0", "--listen", "127.0.0.1:0"]
        serve += ["--release", str(folder / "release"), "--state", str(folder / "state")]
        cloud = family.start("cloud", [*serve, "--port-file", str(folder / "port")])
        address = family.wait_for_address(cloud, folder / "port", START_TIMEOUT_S)
        with grpc.insecure_channel(address) as channel:
            stub: Any = pb_grpc.PersonalisationServiceStub(channel)
            token = stub.Enrol(pb.EnrolRequest(device_name="bench")).token
            metadata = (("authorization", f"Bearer {token}"),)
            port = int(address.rpartition(":")[2])
            for kind in names:
                report.rows.append(beside_a_crowd(stub, metadata, port, kind, crowd, calls))
            for count in map(int, filter(None, at_once.split(","))):
                report.rows += [overload(stub, metadata, name, count) for name in ("DescribeStudent", "Enrol")]
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "what": lambda row: str(row["what"]),
        "calls": lambda row: str(row["calls"]),
        "quiet p50 / p99 ms": lambda row: _pair(row, "quiet"),
        "attacked p50 / p99 ms": lambda row: _pair(row, "attacked"),
        "p99 ratio": lambda row: f"{row['p99_ratio']:.2f}" if "p99_ratio" in row else "",
        "outcomes": lambda row: ", ".join(f"{count} {name}" for name, count in row["outcomes"].items()),
    }
    report.finish(columns, out)


def beside_a_crowd(stub: Any, metadata: Any, port: int, kind: str, crowd: int, calls: int) -> dict[str, Any]:
    """Time a device's calls, alternately without and with the crowd."""
    waits_s: dict[str, list[float]] = {"quiet": [], "attacked": []}
    outcomes: Counter[str] = Counter()
    with at_the_door(port, kind, crowd) as (gather, scatter):
        for _ in range(-(-calls // BLOCK)):
            for state, begin in (("quiet", scatter), ("attacked", gather)):
                begin()
                for _ in range(BLOCK):
                    began_s = time.perf_counter()
                    outcomes[outcome(stub.DescribeStudent, pb.DescribeStudentRequest(), metadata)] += 1
                    waits_s[state].append(time.perf_counter() - began_s)
    row: dict[str, Any] = {"what": f"{crowd} x {kind}", "calls": 2 * len(waits_s["quiet"]), "outcomes": dict(outcomes)}
    for state, each in waits_s.items():
        row[state] = {"p50_s": float(np.percentile(each, 50)), "p99_s": float(np.percentile(each, 99))}
    row["p99_ratio"] = row["attacked"]["p99_s"] / row["quiet"]["p99_s"]
    return row


def overload(stub: Any, metadata: Any, method: str, count: int) -> dict[str, Any]:
    """Send ``count`` calls at once and count their outcomes."""
    outcomes: Counter[str] = Counter()
    waits_s: list[float] = []
    start = threading.Barrier(count)

    def call() -> None:
        start.wait()
        began_s = time.perf_counter()
        if method == "Enrol":
            name = outcome(stub.Enrol, pb.EnrolRequest(device_name="bench"), None)
        else:
            name = outcome(stub.DescribeStudent, pb.DescribeStudentRequest(), metadata)
        outcomes[name] += 1
        waits_s.append(time.perf_counter() - began_s)

    threads = [threading.Thread(target=call) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    quiet = {"p50_s": float(np.percentile(waits_s, 50)), "p99_s": float(np.percentile(waits_s, 99))}
    return {"what": f"{method} at once", "calls": count, "quiet": quiet, "outcomes": dict(outcomes)}


def outcome(call: Any, request: Any, metadata: Any) -> str:
    """Return a call's status, or the name of its error if it was refused."""
    try:
        call(request, metadata=metadata, timeout=CALL_TIMEOUT_S)
    except grpc.RpcError as error:
        of_call: Any = error
        named = dict(of_call.trailing_metadata() or ()).get("isthmus-error")
        return str(named or of_call.code().name)
    return "OK"


@contextmanager
def at_the_door(port: int, kind: str, count: int) -> Iterator[tuple[Callable[[], None], Callable[[], None]]]:
    """A process with a crowd of ``count`` calls, and the functions that gather and scatter it."""
    context = multiprocessing.get_context("spawn")
    wanted, gathered, stop = context.Event(), context.Event(), context.Event()
    process = context.Process(target=press, args=(port, kind, count, wanted, gathered, stop))
    process.start()

    def gather() -> None:
        wanted.set()
        if not gathered.wait(GATHER_S):
            raise RuntimeError("the crowd did not gather")
        time.sleep(SETTLE_S)

    def scatter() -> None:
        wanted.clear()
        gathered.clear()
        time.sleep(SETTLE_S)

    try:
        yield gather, scatter
    finally:
        stop.set()
        process.join()


def press(port: int, kind: str, count: int, wanted: Any, gathered: Any, stop: Any) -> None:
    """Keep the crowd's calls open while it is wanted; else close its connections. Ends on the stop signal."""
    path, message, announce = CROWDS[kind]
    crowd: Crowd | None = None
    while not stop.is_set():
        if wanted.is_set():
            crowd = crowd or Crowd(port, path, count, message=message, announce=announce)
            crowd.press()
            if crowd.opened >= count:
                gathered.set()
        elif crowd is not None:
            crowd.close()
            crowd = None
        time.sleep(0.02)
    if crowd is not None:
        crowd.close()


def _pair(row: dict[str, Any], state: str) -> str:
    found = row.get(state)
    return "" if found is None else f"{1e3 * found['p50_s']:.1f} / {1e3 * found['p99_s']:.1f}"


if __name__ == "__main__":
    typer.run(main)
