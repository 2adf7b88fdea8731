"""Inference over the real stream, against an echo of the same bytes: frames per second, and latency per frame.

The cloud and the echo run in processes of their own on loopback. One client, with the same code for both, sends frames
that were packed beforehand and keeps a number of them in flight. The cloud's time beyond the echo's is the cost of an
answer: unpacking, the head, the reply. Client and server share the machine, so this does not measure a server's
capacity.
"""

import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import grpc
import numpy as np
import typer

from isthmus.demo.processes import Family
from isthmus.proto.codec import pack_frame
from isthmus.proto.messages import FeatureFrame, Features, NumberType, compressed_width
from isthmus.proto.v1 import isthmus_pb2 as pb
from isthmus.proto.v1 import isthmus_pb2_grpc as pb_grpc
from tests.bench.harness import Report, Spread, shown
from tests.bench.untrained import served_release

FEATURE_WIDTH = 512
INFER = "/isthmus.v1.InferenceService/Infer"
ECHO = Path(__file__).parents[1] / "echo.py"
START_TIMEOUT_S = 600.0
"""Importing torch takes minutes on a very busy machine."""

CALL_TIMEOUT_S = 300.0

Metadata = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Case:
    """A setting of the device, and its requests as bytes."""

    ratio: float
    number_type: NumberType
    requests: tuple[bytes, ...]

    @staticmethod
    def make(ratio: float, number_type: NumberType, frames: int) -> "Case":
        rng = np.random.default_rng(0)
        width = compressed_width(FEATURE_WIDTH, ratio)
        requests = []
        for sequence in range(frames):
            features = Features(rng.random(width, np.float32), rng.random(width, np.float32))
            frame = pack_frame(FeatureFrame(features, ratio, number_type))
            requests.append(pb.InferRequest(sequence=sequence, frame=frame).SerializeToString())
        return Case(ratio, number_type, tuple(requests))


@dataclass(frozen=True)
class Passage:
    """One run of a case: frames per second, each frame's time from sending to answer, and the answers."""

    rate: float
    latencies_s: tuple[float, ...]
    replies: tuple[bytes, ...]


async def pass_through(channel: grpc.aio.Channel, metadata: Metadata, case: Case, in_flight: int) -> Passage:
    """Send all requests of a case over one stream. Raises grpc.aio.AioRpcError if the stream breaks."""
    room = asyncio.Semaphore(in_flight)
    sent_s: list[float] = []
    latencies_s: list[float] = []
    replies: list[bytes] = []

    async def requests() -> AsyncIterator[bytes]:
        for request in case.requests:
            await room.acquire()
            sent_s.append(time.perf_counter())
            yield request

    began_s = time.perf_counter()
    infer: Any = channel.stream_stream(INFER)
    async for reply in infer(requests(), metadata=metadata, timeout=CALL_TIMEOUT_S):
        latencies_s.append(time.perf_counter() - sent_s[len(replies)])
        replies.append(reply)
        room.release()
    return Passage(len(replies) / (time.perf_counter() - began_s), tuple(latencies_s), tuple(replies))


async def enrolled(channel: grpc.aio.Channel) -> Metadata:
    """Return the metadata of a device's stream: its token, and the base student."""
    stub = pb_grpc.PersonalisationServiceStub(channel)
    token = (await stub.Enrol(pb.EnrolRequest(device_name="bench"))).token
    authorization = ("authorization", f"Bearer {token}")
    described = await stub.DescribeStudent(pb.DescribeStudentRequest(), metadata=(authorization,))
    return (authorization, ("isthmus-student", pb.StudentManifest.FromString(described.manifest).student_id))


async def measure(
    report: Report, cloud: str, echo: str, cases: list[Case], in_flights: list[int], repeats: int
) -> None:
    """Run every case and number in flight through both servers in turn, ``repeats`` times after one warm-up."""
    passages: dict[tuple[int, int, str], list[Passage]] = {}
    async with grpc.aio.insecure_channel(cloud) as to_cloud, grpc.aio.insecure_channel(echo) as to_echo:
        metadata = await enrolled(to_cloud)
        for repeat in range(repeats + 1):
            for number, case in enumerate(cases):
                for in_flight in in_flights:
                    for server, channel in (("echo", to_echo), ("cloud", to_cloud)):
                        passage = await pass_through(channel, metadata, case, in_flight)
                        _check(server, case, passage)
                        if repeat:
                            passages.setdefault((number, in_flight, server), []).append(passage)
    for (number, in_flight, server), runs in passages.items():
        case = cases[number]
        echo_rate = statistics.median(run.rate for run in passages[number, in_flight, "echo"])
        rate = Spread.of([run.rate for run in runs])
        waits_s = [percentiles(run.latencies_s) for run in runs]
        report.rows.append(
            {
                "server": server,
                "ratio": case.ratio,
                "number_type": case.number_type.value,
                "in_flight": in_flight,
                "request_bytes": len(case.requests[-1]),
                "reply_bytes": len(runs[-1].replies[-1]),
                "frames_per_s": rate.to_json(),
                "p50_s": Spread.of([p50_s for p50_s, _ in waits_s]).to_json(),
                "p99_s": Spread.of([p99_s for _, p99_s in waits_s]).to_json(),
                "share_of_echo": rate.median / echo_rate,
            }
        )


def percentiles(latencies_s: tuple[float, ...]) -> tuple[float, float]:
    """The 50th and the 99th."""
    p50_s, p99_s = np.percentile(latencies_s, [50, 99])
    return float(p50_s), float(p99_s)


def _check(server: str, case: Case, passage: Passage) -> None:
    """Check that every frame was answered, by the cloud with probabilities. Raises RuntimeError otherwise."""
    if len(passage.replies) != len(case.requests):
        raise RuntimeError(f"the {server} answered {len(passage.replies)} of {len(case.requests)} frames")
    if server == "cloud":
        refused = [reply for reply in map(pb.InferResponse.FromString, passage.replies) if reply.HasField("error")]
        if refused:
            raise RuntimeError(f"the cloud refused {len(refused)} frames: {refused[0].error.message}")


def main(
    frames: Annotated[int, typer.Option(help="Sent in each run.")] = 1000,
    repeats: int = 5,
    ratios: Annotated[str, typer.Option(help="Separated by commas.")] = "1,3",
    number_types: Annotated[str, typer.Option(help="Separated by commas.")] = "fp32,int8",
    in_flight: Annotated[str, typer.Option(help="Separated by commas.")] = "1,64",
    out: Annotated[Path | None, typer.Option(help="Write the results to this JSON file.")] = None,
) -> None:
    """Measure frames per second and latency through the cloud, against an echo of the same bytes."""
    wanted_ratios = [float(part) for part in ratios.split(",")]
    wanted_types = [NumberType(part) for part in number_types.split(",")]
    in_flights = [int(part) for part in in_flight.split(",")]
    config = {"frames": frames, "repeats": repeats, "ratios": wanted_ratios, "in_flight": in_flights}
    config |= {"number_types": [each.value for each in wanted_types], "feature_width": FEATURE_WIDTH}
    report = Report("stream", config, ("grpcio", "protobuf", "torch"))
    cases = [Case.make(ratio, each, frames) for ratio in wanted_ratios for each in wanted_types]
    with tempfile.TemporaryDirectory() as name, Family(Path(name)) as family:
        folder = Path(name)
        served_release(folder / "release", tuple(wanted_ratios))
        cloud_port, echo_port = folder / "cloud.port", folder / "echo.port"
        serve = [sys.executable, "-m", "isthmus.cli", "cloud", "serve", "--workers", "0", "--listen", "127.0.0.1:0"]
        serve += ["--release", str(folder / "release"), "--state", str(folder / "state")]
        cloud = family.start("cloud", [*serve, "--port-file", str(cloud_port)])
        echo = family.start("echo", [sys.executable, ECHO, echo_port])
        echo_address = family.wait_for_address(echo, echo_port, START_TIMEOUT_S)
        cloud_address = family.wait_for_address(cloud, cloud_port, START_TIMEOUT_S)
        asyncio.run(measure(report, cloud_address, echo_address, cases, in_flights, repeats))
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "server": lambda row: str(row["server"]),
        "ratio": lambda row: f"{row['ratio']:g}",
        "numbers": lambda row: str(row["number_type"]),
        "in flight": lambda row: str(row["in_flight"]),
        "bytes up": lambda row: str(row["request_bytes"]),
        "down": lambda row: str(row["reply_bytes"]),
        "frames/s, median (quartiles)": lambda row: shown(row["frames_per_s"], digits=4),
        "p50 ms": lambda row: shown(row["p50_s"], 1e3),
        "p99 ms": lambda row: shown(row["p99_s"], 1e3),
        "of echo": lambda row: f"{row['share_of_echo']:.2f}",
    }
    report.finish(columns, out)


if __name__ == "__main__":
    typer.run(main)
