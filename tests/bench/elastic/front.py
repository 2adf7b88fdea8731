"""Overhead of elastic serving: wall time of a query beyond the model's own, with one query in flight.

The server runs on loopback in a process of its own, with a ViT of 2.7 M parameters for 32 x 32 images (random weights,
or the file that is given). There is one client. The reply reports how long the batch ran. The rest of the wall time is
overhead: gRPC, checks, decoding, queue, planning and the reply. An echo server that receives the same bytes measures
gRPC's part of it. HTTP is asked over one kept connection by the standard library's client, on a thread: as JSON, and
as binary data behind JSON. The server's processor time per query is counted too, the model's included, since it means
something on a busy machine as well.
"""

import asyncio
import http.client
import io
import json
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import grpc
import numpy as np
import psutil
import typer
from PIL import Image

from isthmus.cloud.elastic.tasks.task import TaskSpec
from isthmus.cloud.rpc.elastic_client import ElasticClient
from isthmus.demo.processes import Family
from isthmus.proto.open_inference import inference_pb2 as oip
from isthmus.proto.open_inference import inference_pb2_grpc as oip_grpc
from isthmus.proto.v1 import elastic_pb2 as pb
from isthmus.proto.v1 import elastic_pb2_grpc as pb_grpc
from tests.bench.cloud.stream import ECHO, START_TIMEOUT_S, percentiles
from tests.bench.harness import Report, Spread, shown
from tests.bench.vit32 import GAMMAS, SIDE, head_only, profile_of_nothing, save_vit
from tests.rigs.project.ports import free_port

TASK = "task"

Ask = Callable[[], Awaitable[float]]
"""Sends one query; returns the seconds that the model ran."""


@dataclass(frozen=True)
class Image32:
    """An image, as pixels and encoded."""

    pixels_HWC: Any
    jpeg: bytes

    @staticmethod
    def random() -> "Image32":
        pixels_HWC = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels_HWC).save(file, "JPEG")
        return Image32(pixels_HWC, file.getvalue())


def ways_in(to_server: grpc.aio.Channel, to_echo: grpc.aio.Channel, image: Image32) -> dict[str, Ask]:
    """Return every kind of query by name."""
    own, open_ = pb_grpc.ElasticServiceStub(to_server), oip_grpc.GRPCInferenceServiceStub(to_server)
    encoded = pb.MakeQueryRequest(task=TASK, encoded=image.jpeg, latency_s=10)
    bare = pb.Pixels(rgb=image.pixels_HWC.tobytes(), height=SIDE, width=SIDE)
    pixels = pb.MakeQueryRequest(task=TASK, pixels=bare, latency_s=10)
    infer = oip.ModelInferRequest(model_name=TASK, raw_input_contents=[image.pixels_HWC.tobytes()])
    infer.inputs.add(name="pixels", datatype="UINT8", shape=[1, SIDE, SIDE, 3])
    infer.parameters["latency_s"].double_param = 10
    echoed: Any = to_echo.stream_stream("/echo/Echo")
    sent = pixels.SerializeToString()

    async def echo() -> float:
        call = echoed(iter([sent]))
        async for _ in call:
            pass
        return 0.0

    async def make_query(request: pb.MakeQueryRequest) -> float:
        return float((await own.MakeQuery(request)).run_s)

    async def model_infer() -> float:
        return float((await open_.ModelInfer(infer)).parameters["run_s"].double_param)

    return {
        "echo, same bytes": echo,
        "MakeQuery, pixels": lambda: make_query(pixels),
        "MakeQuery, JPEG": lambda: make_query(encoded),
        "ModelInfer, pixels": model_infer,
    }


def ways_in_by_http(address: str, image: Image32) -> dict[str, Ask]:
    """Return the kinds of query over HTTP by name."""
    connection = http.client.HTTPConnection(address)
    path, terms = f"/v2/models/{TASK}/infer", {"latency_s": 10}
    given = {"name": "pixels", "datatype": "UINT8", "shape": [1, SIDE, SIDE, 3]}
    raw = image.pixels_HWC.tobytes()
    as_json = {"inputs": [{**given, "data": image.pixels_HWC.ravel().tolist()}], "parameters": terms}
    behind = {
        "inputs": [{**given, "parameters": {"binary_data_size": len(raw)}}],
        "parameters": {**terms, "binary_data_output": True},
    }
    header = json.dumps(behind).encode()
    lengths = {"Inference-Header-Content-Length": str(len(header))}

    def post(body: bytes, headers: dict[str, str]) -> float:
        connection.request("POST", path, body, headers)
        reply = connection.getresponse()
        answer = reply.read()
        length = reply.getheader("Inference-Header-Content-Length")
        found = json.loads(answer if length is None else answer[: int(length)])
        return float(found["parameters"]["run_s"])

    return {
        "HTTP, pixels as JSON": lambda: asyncio.to_thread(post, json.dumps(as_json).encode(), {}),
        "HTTP, pixels as binary data": lambda: asyncio.to_thread(post, header + raw, lengths),
    }


def server_cpu_s(pid: int) -> float:
    """Return the processor time of a process so far."""
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


async def measure(
    report: Report, server: str, echo: str, http: str, pids: tuple[int, int], queries: int, repeats: int
) -> None:
    """Time all kinds in turn, ``repeats`` times after one warm-up."""
    walls_s: dict[str, list[list[float]]] = {}
    added_s: dict[str, list[list[float]]] = {}
    cpu_s: dict[str, list[float]] = {}
    async with grpc.aio.insecure_channel(server) as to_server, grpc.aio.insecure_channel(echo) as to_echo:
        for repeat in range(repeats + 1):
            image = Image32.random()
            for name, ask in {**ways_in(to_server, to_echo, image), **ways_in_by_http(http, image)}.items():
                wall_s, beyond_s = [], []
                pid = pids[name.startswith("echo")]
                before_s = server_cpu_s(pid)
                for _ in range(queries):
                    began_s = time.perf_counter()
                    run_s = await ask()
                    wall_s.append(time.perf_counter() - began_s)
                    beyond_s.append(wall_s[-1] - run_s)
                if repeat:
                    cpu_s.setdefault(name, []).append((server_cpu_s(pid) - before_s) / queries)
                    walls_s.setdefault(name, []).append(wall_s)
                    added_s.setdefault(name, []).append(beyond_s)
    for name in walls_s:
        waits_s = [percentiles(tuple(each)) for each in added_s[name]]
        report.rows.append(
            {
                "way": name,
                "wall_p50_s": Spread.of([percentiles(tuple(each))[0] for each in walls_s[name]]).to_json(),
                "added_p50_s": Spread.of([p50_s for p50_s, _ in waits_s]).to_json(),
                "server_cpu_s": Spread.of(cpu_s[name]).to_json(),
                "added_p99_s": Spread.of([p99_s for _, p99_s in waits_s]).to_json(),
            }
        )


def main(
    queries: Annotated[int, typer.Option(help="Queries of each kind per repeat.")] = 300,
    repeats: int = 5,
    model: Annotated[Path | None, typer.Option(help="A ViT for 32 x 32 images; default: random weights.")] = None,
    policy: str = "priced",
    out: Annotated[Path | None, typer.Option(help="Write the results to this JSON file.")] = None,
) -> None:
    """Measure the milliseconds per query beyond the model's own time, with one in flight."""
    config = {"queries": queries, "repeats": repeats, "model": "random" if model is None else model.name}
    report = Report("elastic_front", {**config, "policy": policy, "gammas": GAMMAS}, ("grpcio", "protobuf", "torch"))
    with tempfile.TemporaryDirectory() as name, Family(Path(name)) as family:
        folder = Path(name)
        if model is None:
            model = folder / "vit.safetensors"
            save_vit(model)
        profile = folder / "profile.json"
        profile.write_text(profile_of_nothing().to_json(), encoding="utf-8")
        server_port, echo_port = folder / "server.port", folder / "echo.port"
        serve = [sys.executable, "-m", "isthmus.cli", "cloud", "serve", "--listen", "127.0.0.1:0"]
        serve += ["--state", str(folder / "state"), "--port-file", str(server_port), "--elastic-model", str(model)]
        serve += ["--elastic-pixels", "cifar10", "--elastic-profile", str(profile), "--elastic-policy", policy]
        serve += ["--elastic-number-type", "float32", "--http", (http := f"127.0.0.1:{free_port()}")]
        server = family.start("server", serve)
        echo = family.start("echo", [sys.executable, ECHO, echo_port])
        echo_address = family.wait_for_address(echo, echo_port, START_TIMEOUT_S)
        server_address = family.wait_for_address(server, server_port, START_TIMEOUT_S)
        with ElasticClient.connect(server_address) as client:
            client.register(TaskSpec(TASK, tuple(map(str, range(10))), accuracy={0: 0.7}), head_only().to_bytes())
        pids = (server.process.pid, echo.process.pid)
        asyncio.run(measure(report, server_address, echo_address, http, pids, queries, repeats))
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "way in": lambda row: str(row["way"]),
        "wall p50 ms": lambda row: shown(row["wall_p50_s"], 1e3),
        "beyond the model p50 ms": lambda row: shown(row["added_p50_s"], 1e3),
        "p99 ms": lambda row: shown(row["added_p99_s"], 1e3),
        "server CPU ms": lambda row: shown(row["server_cpu_s"], 1e3),
    }
    report.finish(columns, out)


if __name__ == "__main__":
    typer.run(main)
