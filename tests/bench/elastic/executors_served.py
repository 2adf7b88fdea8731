"""Executors in threads and in processes, in real time: images per second, and what the loss of one costs.

Each row serves images with so many executors, each on one compute thread, enough in flight that a full batch always
waits. With ``--kill-s`` a process of the last number of executors is killed after so many seconds. Then every query
must still end, and the row says when as many executors ran as before, and how many images per second were answered
before, meanwhile and afterwards. Every answer has the same utility, so these rates are utilities too.
"""

import asyncio
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from isthmus.cloud.elastic.executors.opening import Opening, opened
from isthmus.cloud.elastic.executors.process import ProcessExecutor
from isthmus.cloud.elastic.model.executor import Item, ModelExecutor
from isthmus.cloud.elastic.policies.by_name import Fifo
from isthmus.cloud.elastic.scheduling.engine import Engine
from isthmus.cloud.elastic.serve.live import LiveEngine
from isthmus.cloud.elastic.tasks.task import Task, TaskSpec
from isthmus.proto.errors import IsthmusError
from tests.bench import THREADS
from tests.bench.harness import Report
from tests.bench.vit32 import CLASSES, SIDE, head_only, profile_of_nothing, save_vit

IN_FLIGHT_BATCHES = 3
LATENCY_S = 600.0

Executors = list[ModelExecutor] | list[ProcessExecutor]


def made(kind: str, opening: Opening, count: int) -> Executors:
    """Start executors of a kind."""
    runner = opened(opening)
    if kind == "thread":
        return [ModelExecutor(opened(opening), runner.pixels) for _ in range(count)]
    processes = [ProcessExecutor(opening, runner.pixels) for _ in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.restore()
    return processes


async def served(executors: Executors, items: list[Item], batch: int, seconds: float, kill_s: float) -> dict[str, Any]:
    """Serve for some seconds; return counts, the rate, and how long a killed executor was away."""
    engine = Engine(profile_of_nothing(), Fifo(epsilon=batch), executors=len(executors), adapts=False)
    live = LiveEngine(engine, *executors, on_start=lambda: torch.set_num_threads(THREADS))
    live.plan_for(items[0].task)
    live.start()
    sent, refused = 0, 0
    answered_s: list[float] = []
    began_s = time.monotonic()

    async def caller(first: int) -> None:
        nonlocal sent, refused
        while time.monotonic() < began_s + seconds:
            item = items[(first + sent) % len(items)]
            sent += 1
            try:
                await live.ask(item.task, item.image, arrival_s=time.monotonic(), latency_s=LATENCY_S, utility=1)
            except IsthmusError:
                refused += 1
            else:
                answered_s.append(time.monotonic())

    killed_s = back_s = 0.0

    async def killer() -> None:
        nonlocal killed_s, back_s
        await asyncio.sleep(kill_s)
        pid = executors[0].pid if isinstance(executors[0], ProcessExecutor) else None
        assert pid is not None, "only processes are killed"
        os.kill(pid, signal.SIGKILL)
        killed_s = time.monotonic()
        while live.snapshot().restarts == 0:
            await asyncio.sleep(0.01)
        back_s = time.monotonic()

    callers = [caller(number) for number in range(IN_FLIGHT_BATCHES * batch * len(executors))]
    await asyncio.gather(*callers, *([killer()] if kill_s else []))
    ended_s = time.monotonic()
    await asyncio.to_thread(live.stop)

    def rate(from_s: float, to_s: float) -> float | None:
        return sum(from_s <= each < to_s for each in answered_s) / (to_s - from_s) if to_s > from_s else None

    row: dict[str, Any] = {
        "sent": sent,
        "answered": len(answered_s),
        "refused": refused,
        "unanswered": sent - len(answered_s) - refused,
        "images_per_s": rate(began_s, killed_s or ended_s),
    }
    if killed_s:
        row["back_after_s"] = back_s - killed_s
        row["images_per_s_meanwhile"] = rate(killed_s, back_s)
        # The last queries are answered by fewer than all executors, so the end of a run is left out.
        row["images_per_s_afterwards"] = rate(back_s, began_s + seconds)
    return row


def main(
    kinds: Annotated[str, typer.Option(help="Kinds of executors.")] = "thread,process",
    executors: Annotated[str, typer.Option(help="Numbers of executors.")] = "1,2",
    batch: Annotated[int, typer.Option(help="Images per batch.")] = 8,
    seconds: Annotated[float, typer.Option(help="Seconds of serving per row.")] = 20.0,
    kill_s: Annotated[float, typer.Option(help="Kill a process after so many seconds. 0: kill none.")] = 0.0,
    repeats: Annotated[int, typer.Option(help="Rows per kind and number, taking turns.")] = 3,
    out: Annotated[Path | None, typer.Option(help="Write the results to this JSON file.")] = None,
) -> None:
    """Serve images with executors in threads and in processes."""
    torch.set_num_threads(THREADS)
    counts = [int(count) for count in executors.split(",")]
    config = {"batch": batch, "seconds": seconds, "kill_s": kill_s, "repeats": repeats}
    report = Report("elastic_executors_served", config, ("torch", "timm"))
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vit.safetensors"
        save_vit(path)
        opening = Opening(str(path), pixels="cifar10", packed=True, threads=THREADS)
        names = tuple(f"class {number}" for number in range(CLASSES))
        task = Task(TaskSpec("images", names, accuracy={0: 0.9}), head_only())
        pictures = rng.integers(0, 256, (64, SIDE, SIDE, 3), np.uint8)
        items = [Item(picture, task) for picture in pictures]
        for repeat in range(repeats):
            for kind in kinds.split(","):
                for count in counts:
                    kills = kill_s if kind == "process" and count == counts[-1] else 0.0
                    each = made(kind, opening, count)
                    row = asyncio.run(served(each, items, batch, seconds, kills))
                    report.rows.append({"kind": kind, "executors": count, "repeat": repeat, **row})
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "kind": lambda row: str(row["kind"]),
        "executors": lambda row: str(row["executors"]),
        "images/s": lambda row: f"{row['images_per_s']:.0f}",
        "sent": lambda row: str(row["sent"]),
        "refused": lambda row: str(row["refused"]),
        "without an end": lambda row: str(row["unanswered"]),
        "back after s": lambda row: f"{row['back_after_s']:.1f}" if "back_after_s" in row else "",
        "meanwhile": lambda row: f"{row['images_per_s_meanwhile']:.0f}" if "back_after_s" in row else "",
        "afterwards": lambda row: f"{row.get('images_per_s_afterwards') or 0:.0f}" if "back_after_s" in row else "",
    }
    for kind in kinds.split(","):
        rates = {
            count: statistics.median(
                row["images_per_s"] for row in report.rows if (row["kind"], row["executors"]) == (kind, count)
            )
            for count in counts
        }
        for count in counts[1:]:
            share = rates[count] / rates[counts[0]] * counts[0] / count
            report.floors[f"{kind}: {count} executors over {count} times one, medians"] = share
    report.finish(columns, out)


if __name__ == "__main__":
    typer.run(main)
