"""The work of ``isthmus cloud load``: connect, send, and write the figures."""

import asyncio
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc

from isthmus.cloud.load import arrivals, callers, outcomes, run
from isthmus.cloud.load.callers import Caller
from isthmus.command_line import key_in, print_table, whole_numbers
from isthmus.data.files import write_atomically
from isthmus.data.traces import read_trace
from isthmus.proto.errors import InvalidInput, from_status

if TYPE_CHECKING:
    from isthmus.cloud.commands.load.options import Load

_OPEN_S = 60.0


def load(options: "Load", out: Path | None) -> None:
    """Run the load and print its figures. Raises InvalidInput, IsthmusError, OSError."""
    found = asyncio.run(_measure(options))
    if out is not None:
        write_atomically(out, json.dumps(found, indent=2) + "\n")
    _print(found["rows"])


async def _measure(options: "Load") -> dict[str, Any]:
    rows = []
    labelled = (_labelled(options), itertools.count())
    try:
        rows += await _against(options, "server", lambda: _caller(options, labelled))
        if options.echo:
            frame = await _like_the_servers(options, labelled)
            with _echo_server() as address:
                rows += await _against(options, "echo", lambda: _echo_caller(options, address, frame))
    except grpc.aio.AioRpcError as error:
        raise from_status(error.code().value[0], error.details() or "") from error
    return {
        "what": options.what,
        "server": options.server,
        "connections": options.connections,
        "duration_s": options.duration_s,
        "deadline_ms": options.deadline_ms,
        "cores": os.cpu_count(),
        "niceness": os.nice(0),
        "load_average": [round(each, 2) for each in os.getloadavg()],
        "date_utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "rows": rows,
    }


async def _against(options: "Load", target: str, make: Callable[[], Caller]) -> list[dict[str, Any]]:
    rows = []
    timeout_s = options.timeout_s
    made: Sequence[Caller] = [make() for _ in range(options.connections)]
    try:
        await run.open_all(made, _OPEN_S)
        for in_flight in whole_numbers(options.in_flight, "--in-flight") if options.in_flight else ():
            began_s = time.perf_counter()
            sent = await run.closed_loop(made, in_flight, options.duration_s, timeout_s)
            spent_s = time.perf_counter() - began_s
            rows.append({"target": target, "in_flight": in_flight} | _figures(options, sent, spent_s))
        for rate in map(float, options.rate.split(",") if options.rate else ()):
            sent = await run.open_loop(made, _times(options, rate), timeout_s)
            rows.append({"target": target, "rate_per_s": rate} | _figures(options, sent, options.duration_s))
    finally:
        for caller in made:
            await caller.close()
    return rows


def _figures(options: "Load", sent: list[outcomes.Sent], duration_s: float) -> dict[str, Any]:
    return outcomes.figures(sent, duration_s, options.deadline_ms / 1e3)


def _times(options: "Load", rate: float) -> arrivals.Float64s:
    if options.trace is not None:
        return arrivals.replayed(read_trace(options.trace), rate, options.duration_s)
    return arrivals.poisson(rate, options.duration_s, options.seed)


_Labelled = tuple[list[tuple[bytes, int]], Iterator[int]]


def _labelled(options: "Load") -> list[tuple[bytes, int]]:
    """Read the pictures of --data with their classes. Raises ImageError, ValueError if the recipe does not fit."""
    if options.data is None:
        return []
    from isthmus.cloud.elastic.tasks.recipes import LEFT_OUT, read_recipe
    from isthmus.data.images import read_encoded

    found = read_encoded(options.data, limit=options.pictures)
    if options.recipe is None:
        return found
    classes = read_recipe(options.recipe).class_of_label
    if max(label for _, label in found) >= len(classes):
        raise ValueError(f"--recipe {options.recipe} lists {len(classes)} labels; {options.data.name} has higher ones")
    kept = [(encoded, classes[label]) for encoded, label in found if classes[label] != LEFT_OUT]
    if not kept:
        raise ValueError(f"--recipe {options.recipe} leaves out all pictures of {options.data.name}")
    return kept


def _caller(options: "Load", labelled: _Labelled) -> Caller:
    channel = callers.channel_to(options.server, _certificate(options))
    match options.what:
        case "query":
            if options.task is None or (options.image is None) == (options.data is None):
                raise InvalidInput("--what query needs --task, and either --image or --data")
            latency_s = options.deadline_ms / 1e3
            if options.image is None:
                pictures, turn = labelled
                key = key_in(options.key_file)
                return callers.labelled_queries(channel, options.task, pictures, latency_s, key, turn)
            encoded = options.image.read_bytes()
            return callers.query(channel, options.task, encoded, latency_s, key_in(options.key_file))
        case "device":
            return callers.Device(channel, enrolment_key=key_in(options.key_file) or "")
        case _:
            return callers.device_stream(channel, key_in(options.key_file) or "")


async def _like_the_servers(options: "Load", labelled: _Labelled) -> bytes:
    """Return the bytes that the echo gets: those that the server got."""
    if options.what == "query":
        caller = _caller(options, labelled)
        assert isinstance(caller, callers.Unary)
        await caller.close()
        return caller.request
    channel = callers.channel_to(options.server, _certificate(options))
    try:
        _, manifest = await callers.enrolled(channel, key_in(options.key_file) or "")
    finally:
        await channel.close()
    return callers.random_frame(manifest.feature_width, manifest.ratios[0]) if options.what == "frames" else b""


def _echo_caller(options: "Load", address: str, sent: bytes) -> Caller:
    channel = callers.channel_to(address)
    if options.what == "frames":
        return callers.echo_stream(channel, sent)
    return callers.Unary(channel, callers.ECHO_UNARY, sent)


def _certificate(options: "Load") -> bytes | None:
    return None if options.tls_cert is None else options.tls_cert.read_bytes()


@contextmanager
def _echo_server() -> "Iterator[str]":
    with tempfile.TemporaryDirectory() as folder:
        port = Path(folder) / "port"
        command = [sys.executable, "-P", "-m", "isthmus.cloud.load.echo", str(port)]
        with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
            until_s = time.monotonic() + _OPEN_S
            while not port.exists():
                if process.poll() is not None or time.monotonic() > until_s:
                    process.kill()
                    raise InvalidInput("the echo server did not start; leave out --echo")
                time.sleep(0.05)
            yield port.read_text().strip()
            assert process.stdin is not None
            process.stdin.close()


def _print(rows: list[dict[str, Any]]) -> None:
    def ms(row: dict[str, Any], name: str, of: str = "latency_ms") -> str:
        return "-" if row[of] is None else f"{row[of][name]:.1f}"

    known = any("right_share" in row for row in rows)
    print_table(
        (
            *("target", "load", "answered/s", "goodput/s", "p50 ms", "p99 ms", "p99.9 ms", "lag p99 ms", "errors"),
            *(("right", "right in time") if known else ()),
        ),
        [
            (
                row["target"],
                f"{row['in_flight']} in flight" if "in_flight" in row else f"{row['rate_per_s']:g}/s",
                f"{row['answered_per_s']:.1f}",
                f"{row['goodput_per_s']:.1f}",
                ms(row, "p50"),
                ms(row, "p99"),
                ms(row, "p99.9"),
                ms(row, "p99", "generator_lag_ms"),
                " ".join(f"{name} {count}" for name, count in row["errors"].items()) or "-",
                *(
                    f"{row[share]:.1%}" if share in row else "-"
                    for share in (("right_share", "right_in_time_share") if known else ())
                ),
            )
            for row in rows
        ],
        tabs_in_pipes=True,
    )
