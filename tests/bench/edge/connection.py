"""The device's connection: silence, half-open links, and thousands of reconnects.

A server that echoes runs in a process of its own, with the settings of the cloud. The device's channel reaches it
through ``isthmus link``. Memory, descriptors and threads are those of the client's process; the link runs in it too,
except for calls to a dead server.
"""

import gc
import os
import queue
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import grpc
import psutil
import typer

from isthmus.edge.link.over_grpc import open_channel
from isthmus.proto.keepalive import NOTICED_S
from tests.bench.harness import Report
from tests.rigs.edge.faulty_link import LinkInThread, faulty_link

ECHO = Path(__file__).parents[1] / "echo.py"
INFER = "/isthmus.v1.InferenceService/Infer"
_ANSWER_S = 60.0


class Stream:
    """A stream of bytes in both directions. ``ended`` is set when it breaks."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._requests: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[bytes | grpc.RpcError] = queue.SimpleQueue()
        self.ended = threading.Event()
        self._call: Any = channel.stream_stream(INFER)(iter(self._requests.get, None))
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def exchange(self, message: bytes = b"x") -> None:
        """Send a message and wait for its echo. Raises grpc.RpcError if the stream breaks."""
        self._requests.put(message)
        answer = self._answers.get(timeout=_ANSWER_S)
        if isinstance(answer, grpc.RpcError):
            raise answer
        assert answer == message

    def close(self) -> None:
        self._requests.put(None)
        self._call.cancel()
        self._thread.join(_ANSWER_S)

    def _read(self) -> None:
        try:
            for answer in self._call:
                self._answers.put(answer)
        except grpc.RpcError as error:
            self._answers.put(error)
        self.ended.set()


@contextmanager
def echo_server() -> Iterator[int]:
    """Yield the port of an echo server in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        port_file = Path(folder) / "port"
        with subprocess.Popen([sys.executable, ECHO, port_file]) as process:
            try:
                while not port_file.exists():
                    time.sleep(0.05)
                yield int(port_file.read_text().strip().rpartition(":")[2])
            finally:
                process.terminate()


def quiet(port: int, seconds: float) -> dict[str, Any]:
    """Keep a stream open without data; return whether it is still the same connection afterwards."""
    with faulty_link(port) as faulty:
        channel = open_channel(faulty.address)
        stream = Stream(channel)
        stream.exchange()
        began_s = time.monotonic()
        broken = stream.ended.wait(seconds)
        lasted_s = time.monotonic() - began_s
        if not broken:
            stream.exchange()
        pings_bytes = faulty.link.counts.up_bytes
        stream.close()
        channel.close()
        return {
            "what": "quiet stream",
            "seconds": lasted_s,
            "broken": broken,
            "connections": faulty.link.counts.connections,
            "up_bytes": pings_bytes,
        }


def half_open(port: int, repeats: int) -> dict[str, Any]:
    """Return the seconds after which a stream ends whose connection swallows everything, after different silences."""

    def once(number: int) -> float:
        with faulty_link(port) as faulty:
            channel = open_channel(faulty.address)
            stream = Stream(channel)
            stream.exchange()
            time.sleep(12.0 * number / repeats)
            faulty.do(faulty.link.half_open)
            began_s = time.monotonic()
            assert stream.ended.wait(120), "it was never noticed"
            noticed_s = time.monotonic() - began_s
            channel.close()
            return noticed_s

    with ThreadPoolExecutor(repeats) as threads:
        found = list(threads.map(once, range(repeats)))
    return {
        "what": "half-open link",
        "repeats": repeats,
        "median_s": statistics.median(found),
        "most_s": max(found),
        "bound_s": NOTICED_S,
    }


def dead_server(count: int) -> dict[str, Any]:
    """Open streams to a port at which nobody listens, on one channel."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        channel = open_channel(f"127.0.0.1:{unused.getsockname()[1]}")

        def once() -> None:
            stream = Stream(channel)
            assert stream.ended.wait(_ANSWER_S)
            stream.close()

        found = grown("stream to a dead server", count, once)
        channel.close()
        return found


def new_channels(port: int, count: int) -> dict[str, Any]:
    """Open a channel, exchange a message, and close it."""

    def once() -> None:
        channel = open_channel(f"127.0.0.1:{port}")
        stream = Stream(channel)
        stream.exchange()
        stream.close()
        channel.close()

    return grown("channel replaced", count, once)


def cut_connections(port: int, count: int) -> dict[str, Any]:
    """Cut the connection under one channel; it reconnects."""
    with faulty_link(port) as faulty:
        channel = open_channel(faulty.address)
        found = grown("connection cut", count, lambda: _cut_once(channel, faulty))
        found["connections"] = faulty.link.counts.connections
        channel.close()
        return found


def _cut_once(channel: grpc.Channel, faulty: LinkInThread) -> None:
    stream = Stream(channel)
    try:
        stream.exchange()
    except grpc.RpcError:
        grpc.channel_ready_future(channel).result(_ANSWER_S)
    faulty.do(faulty.link.cut)
    assert stream.ended.wait(_ANSWER_S)
    stream.close()


def grown(what: str, count: int, once: Callable[[], None], warm: int = 500) -> dict[str, Any]:
    """Call ``once`` often; return the growth of memory, descriptors and threads after ``warm`` calls."""
    for _ in range(min(warm, count)):
        once()
    process = psutil.Process()
    gc.collect()
    before = process.memory_info().rss, len(os.listdir("/proc/self/fd")), process.num_threads()
    began_s = time.monotonic()
    for _ in range(count):
        once()
    gc.collect()
    after = process.memory_info().rss, len(os.listdir("/proc/self/fd")), process.num_threads()
    grown_by = [late - early for late, early in zip(after, before, strict=True)]
    return {
        "what": what,
        "count": count,
        "seconds": time.monotonic() - began_s,
        **dict(zip(("rss_bytes", "descriptors", "threads"), grown_by, strict=True)),
    }


def main(
    quiet_s: Annotated[float, typer.Option(min=0, help="Seconds of silence on an open stream; 0 leaves it out.")] = 60,
    repeats: Annotated[int, typer.Option(min=0, help="Half-open links; 0 leaves it out.")] = 8,
    reconnects: Annotated[int, typer.Option(min=0, help="Reconnects of each kind; 0 leaves it out.")] = 10_000,
    cuts: Annotated[int, typer.Option(min=0, help="Cut connections; gRPC pauses 0.2 s before each.")] = 500,
    out: Annotated[Path | None, typer.Option(help="JSON file to write the results to.")] = None,
) -> None:
    report = Report("connection", {"quiet_s": quiet_s, "repeats": repeats, "reconnects": reconnects, "cuts": cuts})
    with echo_server() as port:
        if repeats:
            report.rows.append(half_open(port, repeats))
        if reconnects:
            report.rows.append(dead_server(reconnects))
            report.rows.append(new_channels(port, reconnects))
        if cuts:
            report.rows.append(cut_connections(port, cuts))
        if quiet_s:
            report.rows.append(quiet(port, quiet_s))
    report.finish(
        {
            "what": lambda row: row["what"],
            "measured": lambda row: ", ".join(
                f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
                for name, value in row.items()
                if name != "what"
            ),
        },
        out,
    )


if __name__ == "__main__":
    typer.run(main)
