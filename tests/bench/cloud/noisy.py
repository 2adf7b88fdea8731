"""A tenant that asks ten times its quota, and what the other tenants notice: their 99th percentile with it and without.

A server of its own serves both tenants. The quiet tenant's devices ask at a steady rate (open loop) all the time.
Four kinds of rounds take turns:

- the quiet tenant alone;
- beside it, a process sends ten times the quota to an echo server: what sending takes of this machine's cores;
- beside it, the noisy tenant asks as much as it may;
- beside it, the noisy tenant asks ten times as much.

The last one over the first is what the others notice; over the second, it is the server's part of that; over the third,
the part of the calls beyond the quota. Every process is started, and every device enrolled, before the first round.
"""

import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, Final

import numpy as np
import psutil
import typer

from isthmus.cloud.load.outcomes import GOOD, Sent, percentiles_ms
from isthmus.cloud.tenants.roster import READ_EVERY_S
from isthmus.demo.processes import Family
from tests.bench.cloud.sender import Load, Sender, sender_to
from tests.bench.harness import Report, Spread
from tests.bench.untrained import served_release

START_TIMEOUT_S: Final = 600.0
ECHO: Final = Path(__file__).parents[1] / "echo.py"
ALONE: Final = "nobody"
BESIDE_ECHO: Final = "the same load on an echo"
WITHIN: Final = "the tenant within its quota"
NOISY: Final = "the noisy tenant"
EITHER_SIDE_S: Final = 1.0
"""The load beside the quiet tenant begins and ends so much earlier and later than the calls that are counted."""


def round_of(
    quiet: Sender, other: Sender | None, beside_rate: float, server: psutil.Process, asked: dict[str, float], seed: int
) -> dict[str, Any]:
    """Return a round's figures. The quiet tenant's calls of the first and the last second are not counted."""
    seconds = asked["duration_s"] + 2 * EITHER_SIDE_S
    used_s = sum(server.cpu_times()[:2])
    if other is not None:
        other.begin(beside_rate, seconds, seed + 1)
    quiet.begin(asked["rate"], seconds, seed)
    found = quiet.found()
    beside = Load([], 0.0) if other is None else other.found()
    used_s = sum(server.cpu_times()[:2]) - used_s
    counted = [each for each in found.sent if EITHER_SIDE_S <= each.due_s < seconds - EITHER_SIDE_S]
    latencies_s = np.array([each.latency_s for each in counted if each.outcome == GOOD])
    return {
        "latency_ms": percentiles_ms(latencies_s),
        "lag_p99_ms": percentiles_ms(np.array([each.lag_s for each in counted]))["p99"],  # type: ignore[index]
        "errors": dict(Counter(each.outcome for each in counted if each.outcome != GOOD)),
        "worst_ms_by_s": worst_by_second(counted),
        "server_cpu_share": used_s / seconds,
        "sender_cpu_share": found.cpu_s / seconds,
        "beside_load": answered(beside, seconds),
        "latencies_s": latencies_s,
    }


def worst_by_second(sent: Sequence[Sent]) -> list[float]:
    """Return the longest latency of the calls due in each second, in milliseconds. It shows whether stalls are rare."""
    worst: dict[int, float] = {}
    for each in sent:
        worst[int(each.due_s)] = max(worst.get(int(each.due_s), 0.0), each.latency_s)
    return [round(1e3 * worst[second], 1) for second in sorted(worst)]


def answered(load: Load, seconds: float) -> dict[str, Any]:
    """Return how often each outcome came, and how long each took."""
    by_outcome: dict[str, list[float]] = {}
    for each in load.sent:
        by_outcome.setdefault(each.outcome, []).append(each.latency_s)
    return {
        "sent_per_s": round(len(load.sent) / seconds, 1),
        "outcomes": {
            name: {"calls": len(times_s), "latency_ms": percentiles_ms(np.array(times_s))}
            for name, times_s in sorted(by_outcome.items())
        },
        "cpu_share": load.cpu_s / seconds,
    }


def add_tenant(folder: Path, name: str, queries_per_s: float | None) -> Path:
    """Make a tenant and a key of it to enrol with; return the key's file."""
    tenants = [sys.executable, "-m", "isthmus.cli", "cloud", "tenants", "--state", str(folder / "state")]
    limit = [] if queries_per_s is None else ["--queries-per-s", f"{queries_per_s:g}"]
    subprocess.run([*tenants, "--add", name, *limit], check=True)
    subprocess.run([*tenants, "--new-key", name, "--key-file", str(folder / name)], check=True)
    return folder / name


def main(
    rate: Annotated[float, typer.Option(help="Calls per second of the quiet tenant.")] = 100.0,
    quota: Annotated[float, typer.Option(help="Queries per second that the noisy tenant may ask.")] = 20.0,
    times: Annotated[float, typer.Option(help="How many times its quota the noisy tenant asks.")] = 10.0,
    duration_s: Annotated[float, typer.Option(help="Seconds of a round whose calls are counted.")] = 15.0,
    rounds: Annotated[int, typer.Option(help="Rounds of each kind.")] = 5,
    out: Annotated[Path | None, typer.Option(help="Write the results to this JSON file.")] = None,
) -> None:
    """Measure how far a noisy tenant moves another tenant's 99th percentile."""
    asked = {"rate": rate, "quota": quota, "times": times, "duration_s": duration_s}
    report = Report("noisy", {**asked, "rounds": rounds}, ("grpcio",))
    pooled: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name, Family(Path(name)) as family, ExitStack() as stack:
        folder = Path(name)
        served_release(folder / "release", (1.0,))
        serve = [sys.executable, "-m", "isthmus.cli", "cloud", "serve", "--listen", "127.0.0.1:0", "--workers", "0"]
        serve += ["--state", str(folder / "state"), "--release", str(folder / "release"), "--log-level", "warning"]
        child = family.start("server", [*serve, "--port-file", str(folder / "port")])
        address = family.wait_for_address(child, folder / "port", START_TIMEOUT_S)
        keys = add_tenant(folder, "quiet", None), add_tenant(folder, "noisy", quota)
        time.sleep(2 * READ_EVERY_S)  # until the server knows the keys
        echo = family.start("echo", [sys.executable, ECHO, folder / "echo"])
        echo_address = family.wait_for_address(echo, folder / "echo", START_TIMEOUT_S)
        quiet = stack.enter_context(sender_to(address, 4, keys[0]))
        to_echo, noisy = (stack.enter_context(sender_to(*each)) for each in ((echo_address, 2), (address, 2, keys[1])))
        others: dict[str, tuple[Sender | None, float]] = {
            ALONE: (None, 0.0),
            BESIDE_ECHO: (to_echo, times * quota),
            WITHIN: (noisy, quota),
            NOISY: (noisy, times * quota),
        }
        server = psutil.Process(child.process.pid)
        round_of(quiet, *others[NOISY], server, {**asked, "duration_s": 3.0}, 0)  # warms up, and is not counted
        for number in range(rounds):
            for kind, other in others.items():
                found = round_of(quiet, *other, server, asked, 10 * number)
                pooled.setdefault(kind, []).extend(found.pop("latencies_s").tolist())
                report.rows.append({"beside": kind, **found})
        said = child.log_path.read_text().splitlines()[1:]
        report.notes += [f"{len(said)} lines of the server's log, such as: {said[-1]}"] if said else []
    p99_ms = {
        kind: Spread.of([row["latency_ms"]["p99"] for row in report.rows if row["beside"] == kind]) for kind in others
    }
    for kind, spread in p99_ms.items():
        over_all = float(np.percentile(pooled[kind], 99)) * 1e3
        report.notes.append(
            f"beside {kind}: p99 {spread.median:.1f} ms ({spread.low:.1f} to {spread.high:.1f} in {rounds} rounds), "
            f"{over_all:.1f} ms over all {len(pooled[kind])} calls"
        )
    for name, one, other in (
        ("99th percentile beside the noisy tenant, over alone (target 1.10)", NOISY, ALONE),
        ("the generator's part: beside the echo, over alone", BESIDE_ECHO, ALONE),
        ("the server's part: beside the noisy tenant, over beside the echo", NOISY, BESIDE_ECHO),
        ("the part beyond the quota: beside the noisy tenant, over beside it within its quota", NOISY, WITHIN),
    ):
        report.floors[name] = p99_ms[one].median / p99_ms[other].median
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "beside": lambda row: str(row["beside"]),
        "p50 ms": lambda row: f"{row['latency_ms']['p50']:.1f}",
        "p99 ms": lambda row: f"{row['latency_ms']['p99']:.1f}",
        "worst ms": lambda row: f"{max(row['worst_ms_by_s']):.0f}",
        "late p99 ms": lambda row: f"{row['lag_p99_ms']:.1f}",
        "errors": lambda row: str(row["errors"] or "-"),
        "server's cores": lambda row: f"{row['server_cpu_share']:.2f}",
        "senders' cores": lambda row: f"{row['sender_cpu_share'] + row['beside_load']['cpu_share']:.2f}",
        "the other was answered": lambda row: (
            ", ".join(f"{each['calls']} {name}" for name, each in row["beside_load"]["outcomes"].items()) or "-"
        ),
    }
    report.finish(columns, out)


if __name__ == "__main__":
    typer.run(main)
