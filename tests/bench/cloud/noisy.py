"""A tenant that asks ten times its quota, and what the other tenants notice: their 99th percentile with it and without.

A server of its own serves both tenants. The quiet tenant's devices ask at a steady rate (open loop); every other round
the noisy tenant asks ten times what it may, from a process of its own. Both kinds of rounds take turns.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from isthmus.demo.processes import Family
from tests.bench.harness import Report
from tests.bench.untrained import served_release

START_TIMEOUT_S = 600.0
BEFORE_S = 6.0
"""The noisy tenant asks for so long before the other's round: what its process takes to start is not measured."""


def main(
    rate: Annotated[float, typer.Option(help="Calls per second of the quiet tenant.")] = 40.0,
    quota: Annotated[float, typer.Option(help="Queries per second that the noisy tenant may ask.")] = 20.0,
    times: Annotated[float, typer.Option(help="How many times its quota the noisy tenant asks.")] = 10.0,
    duration_s: float = 20.0,
    rounds: int = 5,
    out: Annotated[Path | None, typer.Option(help="Write the results to this JSON file.")] = None,
) -> None:
    """Measure how far a noisy tenant moves another tenant's 99th percentile."""
    config = {"rate": rate, "quota": quota, "times": times, "duration_s": duration_s, "rounds": rounds}
    report = Report("noisy", config, ("grpcio",))
    isthmus = [sys.executable, "-m", "isthmus.cli", "cloud"]
    with tempfile.TemporaryDirectory() as name, Family(Path(name)) as family:
        folder = Path(name)
        served_release(folder / "release", (1.0,))
        state = ["--state", str(folder / "state")]
        serve = [*isthmus, "serve", *state, "--listen", "127.0.0.1:0", "--workers", "0", "--log-level", "warning"]
        serve += ["--release", str(folder / "release"), "--port-file", str(folder / "port")]
        address = family.wait_for_address(family.start("server", serve), folder / "port", START_TIMEOUT_S)
        for tenant, limit in (("quiet", "none"), ("noisy", str(quota))):
            add = ["tenants", *state, "--add", tenant]
            subprocess.run([*isthmus, *add, *(["--queries-per-s", limit] if limit != "none" else [])], check=True)
            key = ["--new-key", tenant, "--key-file", str(folder / tenant)]
            subprocess.run([*isthmus, "tenants", *state, *key], check=True)

        def load(tenant: str, rate: float, seconds: float, connections: int, found: Path) -> list[str]:
            command = [*isthmus, "load", "--server", address, "--what", "device", "--rate", f"{rate:g}"]
            command += ["--duration-s", f"{seconds:g}", "--connections", str(connections)]
            return [*command, "--key-file", str(folder / tenant), "--out", str(found)]

        for number in range(2 * rounds):
            noisy = number % 2 == 1
            other: subprocess.Popen[bytes] | None = None
            if noisy:
                seconds = BEFORE_S + 1.5 * duration_s + 5
                command = load("noisy", times * quota, seconds, 2, folder / "noisy.json")
                other = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                time.sleep(BEFORE_S)
            try:
                subprocess.run(load("quiet", rate, duration_s, 4, folder / "quiet.json"), check=True)
            finally:
                if other is not None:
                    other.kill()
                    other.wait()
            (row,) = json.loads((folder / "quiet.json").read_text())["rows"]
            report.rows.append(
                {
                    "noisy": noisy,
                    "p50_ms": row["latency_ms"]["p50"],
                    "p99_ms": row["latency_ms"]["p99"],
                    "lag_p99_ms": row["generator_lag_ms"]["p99"],
                    "errors": row["errors"],
                }
            )
    alone, beside = (
        statistics.median(row["p99_ms"] for row in report.rows if row["noisy"] is which) for which in (False, True)
    )
    report.floors["99th percentile beside the noisy tenant, over alone"] = beside / alone
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "noisy tenant": lambda row: "asks" if row["noisy"] else "-",
        "p50 ms": lambda row: f"{row['p50_ms']:.1f}",
        "p99 ms": lambda row: f"{row['p99_ms']:.1f}",
        "lag p99 ms": lambda row: f"{row['lag_p99_ms']:.1f}",
        "errors": lambda row: str(row["errors"] or "-"),
    }
    report.finish(columns, out)


if __name__ == "__main__":
    typer.run(main)
