"""What metrics cost: their processor time per call, frame and image, as a share of the server's own per call.

The server is a process of its own; ``isthmus cloud load`` keeps it busy, and its processor time per answer is read from
the system. What the metrics add to each answer is timed here, by itself: on a busy machine the difference of two runs
would be noise. A scrape is timed with the number of series that a server has, and counted once per 15 s.
"""

import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
from prometheus_client import generate_latest

from isthmus.cloud.commands.load.options import Load
from isthmus.cloud.commands.load.running import load
from isthmus.cloud.elastic.scheduling.query import Outcome
from isthmus.cloud.elastic.serve.statistics import TaskStatistics
from isthmus.cloud.histogram import Histogram
from isthmus.cloud.metrics.calls import Metrics
from isthmus.cloud.rpc.scopes import metrics_scope
from isthmus.demo.processes import Family
from tests.bench.harness import Report, Spread
from tests.bench.untrained import served_release

START_TIMEOUT_S = 600.0
SCRAPE_S = 15.0
METHODS = 24
"""Methods of all services together: each has its series."""


def per_call(count: int) -> float:
    """Return the seconds of processor time that the metrics of one call take."""
    metrics = Metrics()
    scope = metrics_scope(metrics)

    async def calls(entered: bool) -> float:
        began_s = time.process_time()
        for _ in range(count):
            if entered:
                async with scope("/isthmus.v1.PersonalisationService/DescribeStudent", None):
                    pass
        return time.process_time() - began_s

    return (asyncio.run(calls(True)) - asyncio.run(calls(False))) / count


def per_frame(count: int) -> float:
    """Return the seconds of processor time that the metrics of one feature frame take."""
    metrics = Metrics()
    began_s = time.process_time()
    for _ in range(count):
        metrics.frame_seconds.observe(1e-3)
        metrics.frames["answered"].inc()
    return (time.process_time() - began_s) / count


def per_image(count: int) -> float:
    """Return the seconds of processor time that the statistics of one image take, in a batch of its own."""
    statistics, images, seconds = TaskStatistics(), Histogram((1, 2, 4)), Histogram()
    began_s = time.process_time()
    for _ in range(count):
        statistics.note(Outcome.ANSWERED_IN_TIME, queue_s=1e-3, run_s=1e-3, unix_s=1.0)
        images.note(1)
        seconds.note(1e-3)
    return (time.process_time() - began_s) / count


def per_scrape(repeats: int) -> Spread:
    """Return the seconds of processor time of a scrape of a server whose every method was called."""
    metrics = Metrics()
    for number in range(METHODS):
        method = metrics.of(f"/isthmus.v1.Service/Method{number}")
        method.started.inc()
        method.seconds.observe(1e-3)
        for code in ("NOT_FOUND", "RESOURCE_EXHAUSTED"):
            method.handled(code).inc()
    taken = []
    for _ in range(repeats):
        began_s = time.process_time()
        generate_latest(metrics.registry)
        taken.append(time.process_time() - began_s)
    return Spread.of(taken)


def main(
    duration_s: Annotated[float, typer.Option(help="Seconds of load per kind of call.")] = 10.0,
    in_flight: int = 16,
    count: Annotated[int, typer.Option(help="Calls, frames and images for the metrics' own time.")] = 200_000,
    repeats: int = 5,
    out: Annotated[Path | None, typer.Option(help="Write the results to this JSON file.")] = None,
) -> None:
    """Measure the share of the server's processor time that metrics take."""
    config = {"duration_s": duration_s, "in_flight": in_flight, "count": count, "repeats": repeats}
    report = Report("metrics_cost", config, ("prometheus_client", "grpcio"))
    own = {
        "device": Spread.of([per_call(count // repeats) for _ in range(repeats)]),
        "frames": Spread.of([per_frame(count // repeats) for _ in range(repeats)]),
    }
    scrape = per_scrape(repeats)
    with tempfile.TemporaryDirectory() as name, Family(Path(name)) as family:
        folder = Path(name)
        served_release(folder / "release", (1.0,))
        serve = [sys.executable, "-m", "isthmus.cli", "cloud", "serve", "--listen", "127.0.0.1:0", "--workers", "0"]
        serve += ["--release", str(folder / "release"), "--state", str(folder / "state")]
        serve += ["--port-file", str(folder / "port"), "--metrics-port", "0"]
        process = family.start("server", serve)
        address = family.wait_for_address(process, folder / "port", START_TIMEOUT_S)
        server = psutil.Process(process.process.pid)
        for what in ("device", "frames"):
            before = server.cpu_times()
            given = Load(address, what=what, in_flight=str(in_flight), duration_s=duration_s, connections=in_flight)
            load(given, folder / "found.json")
            after = server.cpu_times()
            (row,) = json.loads((folder / "found.json").read_text())["rows"]
            answered = row["answered_per_s"] * duration_s
            cpu_s = (after.user + after.system - before.user - before.system) / answered
            scraped = scrape.median / SCRAPE_S / row["answered_per_s"]
            report.rows.append(
                {
                    "what": what,
                    "answered_per_s": row["answered_per_s"],
                    "server_cpu_s": cpu_s,
                    "metrics_cpu_s": own[what].to_json(),
                    "scrape_cpu_s": scrape.to_json(),
                    "share": (own[what].median + scraped) / cpu_s,
                }
            )
    report.rows.append({"what": "image", "metrics_cpu_s": {"median": per_image(count)}})
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "what": lambda row: str(row["what"]),
        "server's µs per answer": lambda row: f"{1e6 * row['server_cpu_s']:.0f}" if "server_cpu_s" in row else "-",
        "metrics' µs": lambda row: f"{1e6 * row['metrics_cpu_s']['median']:.2f}",
        "share": lambda row: f"{row['share']:.2%}" if "share" in row else "-",
    }
    report.finish(columns, out)


if __name__ == "__main__":
    typer.run(main)
