"""Seconds from starting a server of image tasks to its first right answer: with a stored profile, and without one.

Each start is a process of its own, so the system's file cache is warm and nothing else is. Without a profile, the
server chooses a number type and measures the machine first. Imports are also timed alone. All kinds take turns.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Final

import numpy as np
import typer
from safetensors.numpy import load_file

from isthmus.cloud.elastic.tasks.task import TaskSpec, TaskWeights
from isthmus.cloud.rpc.elastic_client import ElasticClient
from isthmus.data.images import read_encoded
from isthmus.demo.processes import Family
from tests.bench.harness import Report, Spread, shown

TASK: Final = "task"
START_TIMEOUT_S: Final = 600.0
IMPORTS: Final = "import isthmus.cloud.commands.serving, isthmus.cloud.elastic.serve.host"


def started(model: Path, pictures: list[tuple[bytes, int]], state: Path, head: TaskWeights) -> dict[str, float]:
    """Start a server, ask until it answers, stop it. Return the seconds from the start to each step."""
    spec = TaskSpec(TASK, tuple(map(str, range(len(head.head_bias_C)))), accuracy={0: 0.7})
    with tempfile.TemporaryDirectory() as logs, Family(Path(logs)) as family:
        port = Path(logs) / "port"
        command = [sys.executable, "-m", "isthmus.cli", "cloud", "serve", "--listen", "127.0.0.1:0"]
        command += ["--state", str(state), "--port-file", str(port)]
        command += ["--elastic-model", str(model), "--elastic-pixels", "cifar10"]
        began_s = time.perf_counter()
        server = family.start("server", command)
        address = family.wait_for_address(server, port, START_TIMEOUT_S)
        took_s = {"listening": time.perf_counter() - began_s}
        with ElasticClient.connect(address) as client:
            if TASK not in {each.description.name for each in client.tasks()}:
                client.register(spec, head.to_bytes())
            encoded, _ = pictures[0]
            client.query(TASK, encoded, latency_s=60.0)
            took_s["first answer"] = time.perf_counter() - began_s
            right = [client.query(TASK, each, latency_s=60.0).class_index == label for each, label in pictures]
    if np.mean(right) < 0.4:
        raise RuntimeError(
            f"the server is right on {np.mean(right):.0%} of the pictures, so it does not serve the model"
        )
    return took_s


def imported() -> float:
    """Return the seconds of a process that only imports what the server does."""
    with tempfile.TemporaryDirectory() as logs, Family(Path(logs)) as family:
        began_s = time.perf_counter()
        family.start("imports", [sys.executable, "-c", IMPORTS]).process.wait()
        return time.perf_counter() - began_s


def main(
    model: Annotated[Path, typer.Option(help="The CIFAR-10 ViT, whose own head answers.")],
    data: Annotated[Path, typer.Option(help="Labelled pictures.")],
    repeats: int = 3,
    out: Annotated[Path | None, typer.Option(help="Write the results to this JSON file.")] = None,
) -> None:
    """Time starts with and without a stored profile, in turn."""
    report = Report("start", {"model": model.name, "repeats": repeats}, ("torch", "timm", "torchvision", "grpcio"))
    weights = load_file(model)
    head = TaskWeights(weights["head.weight"], weights["head.bias"], {})
    pictures = read_encoded(data, limit=50)
    took_s: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(repeats):
            state = Path(folder) / f"state-{repeat}"
            took_s.setdefault("imports alone", []).append(imported())
            for kind in ("without a profile", "with the profile of before"):
                for step, step_s in started(model, pictures, state, head).items():
                    took_s.setdefault(f"{kind}: {step}", []).append(step_s)
    report.rows = [{"step": name, "wall_s": Spread.of(each).to_json()} for name, each in took_s.items()]
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "step": lambda row: str(row["step"]),
        "seconds since the start, median (quartiles)": lambda row: shown(row["wall_s"]),
    }
    report.finish(columns, out)


if __name__ == "__main__":
    typer.run(main)
