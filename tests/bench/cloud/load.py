"""Concurrent throughput of elastic serving over gRPC, 1 to 512 queries in flight, beside dynamic batching and an echo.

All targets get the same queries (a JPEG each) in one run and take turns. The servers run a ViT of 2.7 M parameters for
32 x 32 images with random weights, on one executor and this machine's profile, and differ in their policy alone: ours,
ours without token adaptation, and Triton's rule for dynamic batching (preferred sizes, largest delay). Triton's
settings, and ours if there are several, are first tried in the same run: the one with the most answers serves. The echo
is gRPC without any work. Client and servers share the machine.
"""

import asyncio
import itertools
import math
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import grpc
import psutil
import typer

from isthmus.cloud.elastic.tasks.task import TaskSpec
from isthmus.cloud.load import callers, outcomes, run
from isthmus.cloud.load.callers import Caller
from isthmus.cloud.rpc.elastic_client import ElasticClient
from isthmus.demo.processes import Child, Family
from tests.bench.harness import Report, Spread, shown
from tests.bench.vit32 import CLASSES, head_only, picture, save_vit

START_TIMEOUT_S = 600.0
TASK = "task"
ECHO = "echo"
TIMEOUT_S = 20.0


@dataclass(frozen=True)
class Target:
    """A server under load: the policy it runs, or ``ECHO``."""

    policy: str
    address: str
    process: psutil.Process


@dataclass(frozen=True)
class Sending:
    """What is sent, over how many connections, and for how long at a time."""

    encoded: bytes
    deadline_s: float
    connections: int
    duration_s: float

    def caller(self, target: Target) -> Caller:
        channel = grpc.aio.insecure_channel(target.address, [("grpc.use_local_subchannel_pool", 1)])
        query = callers.query(channel, TASK, self.encoded, self.deadline_s, None)
        return callers.Unary(channel, callers.ECHO_UNARY, query.request) if target.policy == ECHO else query

    @asynccontextmanager
    async def to(self, targets: Sequence[Target]) -> AsyncIterator[dict[Target, list[Caller]]]:
        """Connect to all targets."""
        made = {target: [self.caller(target) for _ in range(self.connections)] for target in targets}
        try:
            for each in made.values():
                await run.open_all(each, TIMEOUT_S)
            yield made
        finally:
            for caller in itertools.chain(*made.values()):
                await caller.close()

    async def send(self, target: Target, connected: Sequence[Caller], in_flight: int) -> dict[str, Any]:
        """Keep so many queries in flight; return the figures, and the server's processor seconds per answer."""
        before, loop = target.process.cpu_times(), asyncio.get_running_loop()
        began_s = loop.time()
        sent = await run.closed_loop(connected, in_flight, self.duration_s, TIMEOUT_S)
        took_s, after = loop.time() - began_s, target.process.cpu_times()
        found = outcomes.figures(sent, took_s, self.deadline_s)
        answered = max(1.0, found["answered_per_s"] * took_s)
        found["server_cpu_s"] = (after.user + after.system - before.user - before.system) / answered
        return found


async def best(
    sending: Sending, targets: Sequence[Target], in_flights: Sequence[int]
) -> tuple[Target, dict[str, list[float]]]:
    """Return the target with the most good answers per second, as a geometric mean, and these rates by policy."""
    rates: dict[str, list[float]] = {}
    async with sending.to(targets) as connected:
        for in_flight in in_flights:
            for target in targets:
                await sending.send(target, connected[target], in_flight)
                found = await sending.send(target, connected[target], in_flight)
                rates.setdefault(target.policy, []).append(found["goodput_per_s"])
    return max(targets, key=lambda target: math.prod(rates[target.policy])), rates


async def measure(
    sending: Sending, targets: Mapping[str, Target], in_flights: Sequence[int], repeats: int, limit_s: float
) -> list[dict[str, Any]]:
    """Send every number in flight to all targets in turn, ``repeats`` times after a warm-up; return a row for each.

    A repeat that would end after ``limit_s`` is left out, but never the first one.
    """
    found: dict[tuple[int, str], list[dict[str, Any]]] = {}
    async with sending.to(list(targets.values())) as connected:
        for target in targets.values():
            await sending.send(target, connected[target], max(in_flights))
        began_s = time.monotonic()
        for repeat in range(repeats):
            passed_s = time.monotonic() - began_s
            if repeat and passed_s * (repeat + 1) / repeat > limit_s:
                break
            for in_flight, (name, target) in itertools.product(in_flights, targets.items()):
                found.setdefault((in_flight, name), []).append(await sending.send(target, connected[target], in_flight))
    return [
        {
            "target": name,
            "policy": targets[name].policy,
            "in_flight": in_flight,
            **{
                kind: Spread.of([one[kind] for one in runs]).to_json()
                for kind in ("answered_per_s", "goodput_per_s", "server_cpu_s")
            },
            **{
                f"{name}_ms": Spread.of([one["latency_ms"][name] for one in runs]).to_json()
                for name in ("p50", "p99")
                if all(one["latency_ms"] for one in runs)
            },
            "errors": dict(sum((Counter(one["errors"]) for one in runs), Counter())),
        }
        for (in_flight, name), runs in found.items()
    ]


def main(
    in_flight: Annotated[str, typer.Option(help="Numbers of queries in flight.")] = "1,2,4,8,16,32,64,128,256,512",
    duration_s: Annotated[float, typer.Option(help="Seconds per number and target.")] = 1.5,
    repeats: int = 3,
    connections: int = 16,
    deadline_s: Annotated[float, typer.Option(help="The latency that every query asks for.")] = 1.0,
    ours: Annotated[str, typer.Option(help="Policies tried for ours, with commas.")] = "priced",
    dynamic: Annotated[
        str, typer.Option(help="Settings tried for dynamic batching, with commas.")
    ] = "dynamic:,dynamic::5,dynamic:16+32+64:2,dynamic:64:10",
    others: Annotated[str, typer.Option(help="Policies that are measured besides, with commas.")] = "fixed:0",
    tune: Annotated[str, typer.Option(help="Numbers in flight at which settings are tried.")] = "4,32,256",
    limit_s: Annotated[float, typer.Option(help="Leave out repeats that would end after so many seconds.")] = 600.0,
    out: Annotated[Path | None, typer.Option(help="Write the results to this JSON file.")] = None,
) -> None:
    """Measure answers per second and latency by the number of queries in flight."""
    config: dict[str, Any] = {"in_flight": in_flight, "duration_s": duration_s, "repeats": repeats, "tune": tune}
    config |= {"connections": connections, "deadline_s": deadline_s, "ours": ours, "dynamic": dynamic}
    report = Report("load", config, ("grpcio", "torch"))
    with tempfile.TemporaryDirectory() as name, Family(Path(name)) as family:
        folder = Path(name)
        save_vit(folder / "vit.safetensors")
        profile = folder / "measured" / "elastic_profile.json"
        sending = Sending(picture(), deadline_s, connections, duration_s)

        def start(policy: str, number: int) -> tuple[Child, Path]:
            state, port = folder / ("measured" if not number else f"state{number}"), folder / f"port{number}"
            serve = [sys.executable, "-m", "isthmus.cli", "cloud", "serve", "--listen", "127.0.0.1:0"]
            serve += ["--state", str(state), "--port-file", str(port), "--elastic-policy", policy]
            serve += ["--elastic-model", str(folder / "vit.safetensors"), "--elastic-pixels", "cifar10"]
            serve += ["--elastic-profile", str(profile)] if number else ["--elastic-measure"]
            return family.start(f"server{number}", [*serve, "--elastic-number-type", "float32"]), port

        def ready(policy: str, child: Child, port: Path) -> Target:
            address = family.wait_for_address(child, port, START_TIMEOUT_S)
            if policy != ECHO:
                with ElasticClient.connect(address) as client:
                    spec = TaskSpec(TASK, tuple(map(str, range(CLASSES))), accuracy={0: 0.7})
                    client.register(spec, head_only().to_bytes())
            return Target(policy, address, psutil.Process(child.process.pid))

        tried = [*ours.split(","), *dynamic.split(","), *others.split(",")]
        first = ready(tried[0], *start(tried[0], 0))
        started = [(policy, *start(policy, number)) for number, policy in enumerate(tried[1:], 1)]
        echo = family.start(ECHO, [sys.executable, Path(__file__).parents[1] / "echo.py", folder / "echo"])
        servers = [first, *(ready(*each) for each in started)]
        targets, rates = {}, {}
        for kind, names in (("ours", ours.split(",")), ("dynamic batching", dynamic.split(","))):
            candidates = [server for server in servers if server.policy in names]
            targets[kind], rates[kind] = asyncio.run(best(sending, candidates, _numbers(tune)))
        targets |= {server.policy: server for server in servers if server.policy in others.split(",")}
        targets[ECHO] = ready(ECHO, echo, folder / "echo")
        report.config["tried"] = rates
        report.notes += [f"{kind}: {targets[kind].policy}, the best of {found}" for kind, found in rates.items()]
        report.rows += asyncio.run(measure(sending, targets, _numbers(in_flight), repeats, limit_s))
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "in flight": lambda row: str(row["in_flight"]),
        "target": lambda row: str(row["target"]),
        "answers per s": lambda row: shown(row["answered_per_s"]),
        "in time per s": lambda row: shown(row["goodput_per_s"]),
        "p50 ms": lambda row: shown(row["p50_ms"]) if "p50_ms" in row else "-",
        "p99 ms": lambda row: shown(row["p99_ms"]) if "p99_ms" in row else "-",
        "server's µs per answer": lambda row: f"{1e6 * row['server_cpu_s']['median']:.0f}",
        "errors": lambda row: " ".join(f"{name} {count}" for name, count in row["errors"].items()) or "-",
    }
    report.finish(columns, out)


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


if __name__ == "__main__":
    typer.run(main)
