"""Throughput of the engine (queue, plan, batch and answers) as a share of direct calls of the model.

Both run in one process with the same executor and batch size, in float32 on one compute thread. The engine has a thread
of its own and the callers have an event loop. Enough queries are in flight that a full batch is always queued.
"""

import asyncio
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from isthmus.cloud.elastic.model.executor import Item, ModelExecutor
from isthmus.cloud.elastic.model.runner import ElasticRunner
from isthmus.cloud.elastic.model.vit import ElasticViT
from isthmus.cloud.elastic.model.weights import load_vit
from isthmus.cloud.elastic.policies.by_name import Fifo
from isthmus.cloud.elastic.scheduling.engine import Engine
from isthmus.cloud.elastic.serve.live import LiveEngine
from isthmus.cloud.elastic.tasks.task import Task, TaskSpec
from isthmus.data.images import STATISTICS, PixelSpec
from tests.bench import THREADS
from tests.bench.harness import Report, Spread, shown
from tests.bench.vit32 import CLASSES, SIDE, head_only, profile_of_nothing, save_vit

IN_FLIGHT_BATCHES = 3


def bare(executor: ModelExecutor, items: list[Item], batch: int) -> float:
    """Return images per second of consecutive calls."""
    began_s = time.perf_counter()
    for start in range(0, len(items), batch):
        executor.run(items[start : start + batch], 0)
    return len(items) / (time.perf_counter() - began_s)


async def through_engine(executor: ModelExecutor, items: list[Item], batch: int) -> tuple[float, float]:
    """Return images per second through the engine, and its mean batch size."""
    live = LiveEngine(
        Engine(profile_of_nothing(), Fifo(epsilon=batch)), executor, on_start=lambda: torch.set_num_threads(THREADS)
    )
    live.plan_for(items[0].task)
    live.start()
    waiting = iter(items)

    async def caller() -> None:
        for item in waiting:
            await live.ask(item.task, item.image, arrival_s=time.monotonic(), latency_s=600, utility=1)

    began_s = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(IN_FLIGHT_BATCHES * batch)))
    took_s = time.perf_counter() - began_s
    batches = live.statistics(items[0].task.name).batches
    await asyncio.to_thread(live.stop)
    return len(items) / took_s, len(items) / batches


def main(
    images: Annotated[int, typer.Option(help="Of each run.")] = 512,
    repeats: int = 7,
    batches: Annotated[str, typer.Option(help="Separated by commas.")] = "1,8,32",
    model: Annotated[Path | None, typer.Option(help="A ViT for 32 x 32 images; default: random weights.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the results to this JSON file.")] = None,
) -> None:
    """Measure the engine's throughput as a share of the model's own."""
    sizes = [int(part) for part in batches.split(",")]
    config = {"images": images, "repeats": repeats, "batches": sizes, "in_flight_batches": IN_FLIGHT_BATCHES}
    report = Report("elastic_engine", config, ("torch", "timm"))
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory() as name:
        if model is None:
            model = Path(name) / "vit.safetensors"
            save_vit(model)
        pixels = PixelSpec(SIDE, *STATISTICS["cifar10"])
        executor = ModelExecutor(ElasticRunner(ElasticViT(load_vit(model)), pixels), pixels)
    task = Task(TaskSpec("task", tuple(map(str, range(CLASSES))), accuracy={0: 0.7}), head_only())
    pictures_NHWC = np.random.default_rng(0).integers(0, 256, (images, SIDE, SIDE, 3), np.uint8)
    items = [Item(picture_HWC, task) for picture_HWC in pictures_NHWC]
    rates: dict[tuple[int, str], list[float]] = {}
    made: dict[int, float] = {}
    for repeat in range(repeats + 1):
        for size in sizes:
            alone = bare(executor, items, size)
            served, made[size] = asyncio.run(through_engine(executor, items, size))
            if repeat:
                rates.setdefault((size, "bare"), []).append(alone)
                rates.setdefault((size, "engine"), []).append(served)
    for size in sizes:
        shares = [ours / alone for ours, alone in zip(rates[size, "engine"], rates[size, "bare"], strict=True)]
        report.rows.append(
            {
                "batch": size,
                "mean_batch_made": made[size],
                "bare_per_s": Spread.of(rates[size, "bare"]).to_json(),
                "engine_per_s": Spread.of(rates[size, "engine"]).to_json(),
                "share": Spread.of(shares).to_json(),
            }
        )
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "batch": lambda row: str(row["batch"]),
        "made": lambda row: f"{row['mean_batch_made']:.1f}",
        "bare images/s": lambda row: shown(row["bare_per_s"], digits=4),
        "engine images/s": lambda row: shown(row["engine_per_s"], digits=4),
        "share kept": lambda row: shown(row["share"]),
    }
    report.finish(columns, out)


if __name__ == "__main__":
    typer.run(main)
