"""Concurrent throughput of elastic serving over gRPC, 1 to 512 queries in flight, beside a bare echo server.

``isthmus cloud load`` sends the same bytes to a real server (a ViT of 2.7 M parameters for 32 x 32 images, random
weights, this machine's measured profile) and to an echo server, in one run. Client and servers share the machine.
"""

import io
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from PIL import Image

from isthmus.cloud.commands.load.options import Load
from isthmus.cloud.commands.load.running import load
from isthmus.cloud.elastic.tasks.task import TaskSpec
from isthmus.cloud.rpc.elastic_client import ElasticClient
from isthmus.demo.processes import Family
from tests.bench.harness import Report
from tests.bench.vit32 import SIDE, head_only, save_vit

START_TIMEOUT_S = 600.0
TASK = "task"


def main(
    in_flight: Annotated[str, typer.Option(help="Numbers of queries in flight.")] = "1,2,4,8,16,32,64,128,256,512",
    duration_s: Annotated[float, typer.Option(help="Seconds per number.")] = 5.0,
    connections: int = 16,
    policy: str = "priced",
    out: Annotated[Path | None, typer.Option(help="Write the results to this JSON file.")] = None,
) -> None:
    """Measure answers per second and latency by the number of queries in flight."""
    config = {"in_flight": in_flight, "duration_s": duration_s, "connections": connections, "policy": policy}
    report = Report("load", config, ("grpcio", "torch"))
    with tempfile.TemporaryDirectory() as name, Family(Path(name)) as family:
        folder = Path(name)
        save_vit(folder / "vit.safetensors")
        pixels_HWC = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels_HWC).save(file, "JPEG")
        (folder / "image.jpg").write_bytes(file.getvalue())
        serve = [sys.executable, "-m", "isthmus.cli", "cloud", "serve", "--listen", "127.0.0.1:0"]
        serve += ["--state", str(folder / "state"), "--port-file", str(folder / "port")]
        serve += ["--elastic-model", str(folder / "vit.safetensors"), "--elastic-pixels", "cifar10"]
        serve += ["--elastic-measure", "--elastic-number-type", "float32", "--elastic-policy", policy]
        address = family.wait_for_address(family.start("server", serve), folder / "port", START_TIMEOUT_S)
        with ElasticClient.connect(address) as client:
            client.register(TaskSpec(TASK, tuple(map(str, range(10))), accuracy={0: 0.7}), head_only().to_bytes())
        given = Load(
            address,
            what="query",
            task=TASK,
            image=folder / "image.jpg",
            in_flight=in_flight,
            duration_s=duration_s,
            connections=connections,
            echo=True,
        )
        load(given, folder / "found.json")
        found = json.loads((folder / "found.json").read_text())
    report.config["niceness"] = found["niceness"]
    report.rows += found["rows"]
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "target": lambda row: str(row["target"]),
        "in flight": lambda row: str(row["in_flight"]),
        "answers per s": lambda row: f"{row['answered_per_s']:.0f}",
        "goodput per s": lambda row: f"{row['goodput_per_s']:.0f}",
    }
    report.finish(columns, out)


if __name__ == "__main__":
    typer.run(main)
