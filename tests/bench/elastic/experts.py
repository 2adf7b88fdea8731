"""Time of a model with experts by batch size, against a dense model of equal operations, and by order of computing.

"one task": random routers, which spread tokens over all experts. "one task, window": it uses 4 neighbouring experts
alone. "mixed": as many tasks as pictures share a batch, four at most. "token by token": each token with its experts
before the next one. Floor: the operations of all matrix products, divided by the measured rate of a square product.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from isthmus.cloud.elastic.model.runner import ElasticRunner
from isthmus.cloud.elastic.model.vit import ElasticViT
from isthmus.cloud.elastic.model.weights import load_vit
from isthmus.cloud.elastic.prepare.upcycling import with_experts
from isthmus.cloud.elastic.scheduling.levels import level_of
from isthmus.cloud.elastic.tasks.router import TaskRouter
from isthmus.cloud.elastic.tasks.task import TaskWeights
from isthmus.data.images import PixelSpec
from tests.bench import THREADS, machine
from tests.bench.harness import Report, interleaved, shown

DENSE = "dense"
TOKENS = "experts, token by token"
TASKS = 4


def main(
    model: Annotated[
        str, typer.Option(help="A timm name (random weights) or a safetensors file.")
    ] = "vit_tiny_patch16_224",
    batches: Annotated[str, typer.Option(help="Separated by commas.")] = "1,8,64",
    token_batches: Annotated[str, typer.Option(help="Those at which token by token is measured too.")] = "8,64",
    repeats: int = 7,
    out: Annotated[Path | None, typer.Option(help="Write the results to this JSON file.")] = None,
) -> None:
    """Time experts against a dense model of equal operations, in float32."""
    torch.set_num_threads(THREADS)
    rate = machine.product_rate(np.float32)
    sizes = [int(part) for part in batches.split(",")]
    config = {"model": Path(model).name, "batches": sizes, "repeats": repeats, "experts": 16, "used": 4}
    report = Report("elastic_experts", config, ("torch", "timm"))
    report.floors = {"float32 product, operations/s": rate}
    for batch in sizes:
        torch.manual_seed(0)
        dense = ElasticViT(load_vit(model, random=True))
        _measure(report, dense, batch, batch in [int(part) for part in token_batches.split(",")], repeats, rate)
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "batch": lambda row: str(row["batch"]),
        "on": lambda row: str(row["engine"]),
        "experts per token": lambda row: str(row["k"] or ""),
        "CPU ms, median (quartiles)": lambda row: shown(row["cpu_s"], 1e3),
        "Gop": lambda row: f"{row['operations'] / 1e9:.2f}",
        "times the floor": lambda row: f"{row['times_floor']:.2f}",
        "times the dense model": lambda row: f"{row['over_dense']:.2f}",
    }
    report.finish(columns, out)


def _measure(report: Report, dense: ElasticViT, batch: int, tokens: bool, repeats: int, rate: float) -> None:
    """One batch size."""
    side = dense.image_px
    pixels = PixelSpec(side, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    pictures = np.random.default_rng(0).integers(0, 256, (batch, side, side, 3), np.uint8)
    experts = with_experts(dense)
    shape = experts.experts
    head = np.zeros((10, dense.width), np.float32), np.zeros(10, np.float32), {}
    of_dense = ElasticRunner(dense, pixels, packed=True)
    dense_task = of_dense.prepare(TaskWeights(*head))
    runs: dict[str, Callable[[], object]] = {DENSE: lambda: of_dense.answer(pictures, 0, [dense_task] * batch)}
    used: dict[str, int] = {DENSE: 0}
    runner = ElasticRunner(experts, pixels, packed=True)
    routers = [TaskRouter.blank(shape, dense.width, seed) for seed in range(TASKS)]
    served = [runner.prepare(TaskWeights(*head, router)) for router in routers]
    narrow = runner.prepare(TaskWeights(*head, TaskRouter(routers[0].weight_MDE, routers[0].bias_ME, 0, shape.k)))
    for k in range(1, shape.k + 1):
        name = f"experts, one task, {k}"
        level = level_of(0, shape.k - k)
        runs[name] = lambda level=level: runner.answer(pictures, level, [served[0]] * batch)  # type: ignore[misc]
        used[name] = k
    runs["experts, one task, window"] = lambda: runner.answer(pictures, 0, [narrow] * batch)
    runs["experts, mixed"] = lambda: runner.answer(pictures, 0, [served[place % TASKS] for place in range(batch)])
    if tokens:
        slow = with_experts(dense)
        for mlp in slow.expert_layers:
            mlp.forward = mlp.token_by_token  # type: ignore[method-assign]
        by_token = ElasticRunner(slow, pixels, packed=True)
        task = by_token.prepare(TaskWeights(*head, routers[0]))
        runs[TOKENS] = lambda: by_token.answer(pictures, 0, [task] * batch)
    timings = interleaved(runs, repeats=repeats, warmups=2)
    for name, timing in timings.items():
        k = used.get(name, shape.k)
        operations = batch * (dense.operations(0) if name == DENSE else experts.operations(0, k=k))
        report.rows.append(
            {
                "batch": batch,
                "engine": name.rpartition(", ")[0] if name[-1].isdigit() else name,
                "k": k,
                **timing.to_json(),
                "operations": operations,
                "times_floor": timing.cpu_s.median / (operations / rate),
                "over_dense": timing.cpu_s.median / timings[DENSE].cpu_s.median,
            }
        )


if __name__ == "__main__":
    typer.run(main)
