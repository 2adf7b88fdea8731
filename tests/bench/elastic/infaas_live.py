"""INFaaS in real time: models of three sizes per task are loaded and run, beside token adaptation.

All models have the CIFAR-10 ViT's form with other widths, and random weights, because no trained models of these sizes
exist for these tasks. Times are real, loading included. Correctness of an answer is drawn as in the simulator, with the
accuracies of ``--profile`` and, for the small and the large size, the simulator's assumption (policies/infaas.py).
Every size is timed first in the same run, so that simulated and live figures are of the same machine. With several
executors, each of INFaaS's has memory of its own, and a batch takes a free one that holds its model.
"""

import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Final

import numpy as np
import numpy.typing as npt
import torch
import typer

from isthmus.cloud.elastic.model.executor import Executor, Item
from isthmus.cloud.elastic.model.runner import ElasticRunner, ServedTask
from isthmus.cloud.elastic.model.timm_import import VisionTransformer
from isthmus.cloud.elastic.model.vit import ElasticViT
from isthmus.cloud.elastic.model.weights import load_vit
from isthmus.cloud.elastic.policies.by_name import make_policy
from isthmus.cloud.elastic.policies.infaas import SIZES, Infaas, ModelSize, loading_executor, sizes_profile
from isthmus.cloud.elastic.prepare.profiler import SIZES as BATCHES
from isthmus.cloud.elastic.prepare.profiler import blank_weights, machine_key, measure_latency
from isthmus.cloud.elastic.scheduling.engine import Engine, Work
from isthmus.cloud.elastic.scheduling.profile import Profile, paper_profile
from isthmus.cloud.elastic.scheduling.query import Outcome, Query
from isthmus.cloud.elastic.scheduling.simulate import TICK_S, Run, draws, serve, simulate
from isthmus.cloud.elastic.scheduling.workload import queries_at_load, wandering_rates
from isthmus.cloud.elastic.serve.traced import serve_at_once
from isthmus.cloud.elastic.tasks.task import Task, TaskSpec, TaskWeights
from isthmus.cloud.elastic.variants.opening import Ready, opened
from isthmus.cloud.elastic.variants.pool import Memory, Pool
from isthmus.data.images import PixelSpec
from tests.bench import THREADS
from tests.bench.harness import Report
from tests.rigs.elastic.vit import save_vit

SIDE_PX: Final = 32
WIDTHS: Final = (96, 192, 384)
"""Widths of the small, base and large model; the base is the CIFAR-10 ViT."""
NO_WEIGHTS: Final = TaskWeights(np.zeros((2, 1), np.float32), np.zeros(2, np.float32), {})
LOADS: Final = 5
"""Loads per timing."""
PIXELS: Final = PixelSpec(SIDE_PX, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


class TimedWorld:
    """A world with a real clock: ``run`` computes a batch. Correctness is drawn at random (see simulate.py)."""

    def __init__(self, profile: Profile, luck_N: npt.NDArray[np.float64], run: Callable[[Work], None]) -> None:
        self._accuracy, self._luck, self._run = profile.accuracy, luck_N.tolist(), run
        self._began_s = time.monotonic()

    def now_s(self) -> float:
        return time.monotonic() - self._began_s

    def wait(self, until_s: float) -> None:
        time.sleep(max(TICK_S, until_s - self.now_s()))

    def run(self, work: Work) -> list[bool | None]:
        self._run(work)
        return [self._luck[query.id] < self._accuracy[query.task][work.gamma] for query in work.batch.queries]


class Blank:
    """An executor of the elastic model, which answers with zeros: who is right is not asked with several executors."""

    def __init__(self, runner: ElasticRunner, task: ServedTask) -> None:
        self._runner, self._task = runner, task

    def run(self, items: Sequence[Item], gamma: int) -> list[npt.NDArray[np.float32]]:
        self._runner.answer(pictures(len(items)), gamma, [self._task] * len(items))
        return [np.zeros(1, np.float32)] * len(items)


def loaded(file: Path) -> Ready:
    return opened(file, pixels="half", device="cpu", number_type="float32")


def pictures(count: int) -> npt.NDArray[np.uint8]:
    return np.full((count, SIDE_PX, SIDE_PX, 3), 127, np.uint8)


def written(folder: Path, tasks: Sequence[str], depth: int) -> dict[tuple[str, int], Path]:
    """Write a file of random weights per task and size."""
    found = {}
    for task_number, task in enumerate(tasks):
        for size, width in zip(SIZES, WIDTHS, strict=True):
            vit = VisionTransformer(
                SIDE_PX, 4, num_classes=10, embed_dim=width, depth=depth, num_heads=max(1, width // 64)
            )
            found[task, size.level] = folder / f"{task_number}.{width}" / "model.safetensors"
            found[task, size.level].parent.mkdir()
            save_vit(vit, found[task, size.level])
    return found


def timed_sizes(files: dict[tuple[str, int], Path], base: Profile, repeats: int) -> tuple[list[ModelSize], Profile]:
    """Measure each size on this machine; return the costs and a profile."""
    task = next(iter(base.accuracy))
    sizes, latency_s = [], {}
    for size in SIZES:
        file, took_s = files[task, size.level], []
        for _ in range(LOADS):
            began_s = time.perf_counter()
            runner = loaded(file).runner
            took_s.append(time.perf_counter() - began_s)
        latency_s[size.level] = measure_latency(runner, [0], BATCHES, repeats=repeats)[0]
        sizes.append(replace(size, memory_bytes=loaded(file).bytes, load_s=statistics.median(took_s)))
    at_full_s = {level: row[-1] for level, row in latency_s.items()}
    sizes = [replace(size, cost=at_full_s[size.level] / at_full_s[0]) for size in sizes]
    return sizes, replace(sizes_profile(base, tuple(sizes)), sizes=BATCHES, latency_s=latency_s)


def both(
    engines: Callable[[], Engine],
    queries: Sequence[Query],
    seed: int,
    run: Callable[[Work], None],
    takes_s: Callable[[Work], float] | None,
    executors: Sequence[Executor],
) -> tuple[Run, Run]:
    """Run a policy simulated and live, with the same random draws."""
    luck_N = draws(np.random.default_rng([seed, 1]), len(queries))
    engine = engines()
    simulated = simulate(engine, queries, luck_N, takes_s)
    engine = engines()
    gc.collect()
    if len(executors) > 1:
        tasks = {name: Task(TaskSpec(name, ("no", "yes")), NO_WEIGHTS) for name in engine.profile.accuracy}

        def asked(query: Query) -> tuple[Item, int]:
            return Item(pictures(1)[0], tasks[query.task]), 0

        def threads() -> None:
            torch.set_num_threads(THREADS)

        return simulated, serve_at_once(engine, queries, executors, asked, on_start=threads)
    return simulated, serve(engine, queries, TimedWorld(engine.profile, luck_N, run))


def main(
    profile: Annotated[
        Path | None,
        typer.Option(help="A profile (JSON) for gammas and accuracies, not times. Default: one like the paper's."),
    ] = None,
    loads: Annotated[str, typer.Option(help="Separated by commas.")] = "1,1.5,2",
    policies: Annotated[str, typer.Option(help="Policies beside infaas, separated by commas.")] = "priced,fixed:0,pets",
    depth: Annotated[int, typer.Option(help="Layers of all models.")] = 6,
    duration_s: float = 30.0,
    executors: Annotated[int, typer.Option(help="Executors of every policy. The load grows with them.")] = 1,
    repeats: Annotated[int, typer.Option(help="Of each timing.")] = 7,
    seed: int = 0,
    out: Annotated[Path | None, typer.Option(help="Write the results to this JSON file.")] = None,
) -> None:
    """Run INFaaS and other policies on the same queries, simulated and live."""
    torch.set_num_threads(THREADS)
    given = paper_profile() if profile is None else Profile.from_json(profile.read_text(encoding="utf-8"))
    report = Report(
        "infaas_live",
        {"loads": loads, "depth": depth, "duration_s": duration_s, "executors": executors, "seed": seed},
        ("torch", "timm"),
    )
    with tempfile.TemporaryDirectory() as folder:
        files = written(Path(folder), tuple(given.accuracy), depth)
        model = ElasticViT(load_vit(files[next(iter(given.accuracy)), 0]))
        runner = ElasticRunner(model, PIXELS)
        task = runner.prepare(blank_weights(model, given.gammas))
        latency_s = measure_latency(runner, given.gammas, BATCHES, repeats=repeats)
        base = Profile(machine_key(runner), given.gammas, BATCHES, given.accuracy, latency_s)
        sizes, of_sizes = timed_sizes(files, base, repeats)
        memory_bytes = len(given.accuracy) * sizes[1].memory_bytes
        report.notes = [
            f"level {size.level}: {size.memory_bytes / 1e6:.1f} MB, loaded in {1e3 * size.load_s:.0f} ms, "
            f"{size.cost:.2f} times the base model's time"
            for size in sizes
        ]

        def answer(work: Work) -> None:
            runner.answer(pictures(len(work.batch)), work.gamma, [task] * len(work.batch))

        blanks = [Blank(runner, task)]
        for _ in range(executors - 1):
            copy = ElasticRunner(ElasticViT(load_vit(files[next(iter(given.accuracy)), 0])), PIXELS)
            blanks.append(Blank(copy, copy.prepare(blank_weights(copy.model, given.gammas))))
        for load in (float(value) for value in loads.split(",")):
            rng = np.random.default_rng(seed)
            queries = queries_at_load(rng, wandering_rates(rng, duration_s), load * executors, base)
            pool = Pool(
                [
                    Memory(sizes, (), memory_bytes, lambda task, level: loaded(files[task, level]))
                    for _ in range(executors)
                ]
            )

            def swap(work: Work, pool: Pool = pool) -> None:
                task = Task(TaskSpec(work.batch.queries[0].task, ("no", "yes")), NO_WEIGHTS)
                pool.run([Item(picture, task) for picture in pictures(len(work.batch))], work.gamma)

            runs = {
                "infaas": both(
                    lambda: Engine(of_sizes, Infaas(tuple(sizes)), adapts=False, executors=executors),
                    queries,
                    seed,
                    swap,
                    loading_executor(tuple(sizes), memory_bytes, executors=executors),
                    pool.executors,
                )
            }
            for name in policies.split(","):
                runs[name] = both(
                    lambda name=name: Engine(base, make_policy(name, base), executors=executors),  # type: ignore[misc]
                    queries,
                    seed,
                    answer,
                    None,
                    blanks,
                )
            rival = runs["infaas"]
            for name, (simulated, live) in runs.items():
                report.rows.append(
                    {
                        "load": load,
                        "policy": name,
                        "queries": len(queries),
                        "simulated": simulated.expected_utility,
                        "live": live.expected_utility,
                        "late": live.share(Outcome.LATE),
                        "loads": pool.loads if name == "infaas" else 0,
                        "over_infaas": [
                            mine.expected_utility / theirs.expected_utility if theirs.expected_utility else None
                            for mine, theirs in zip((simulated, live), rival, strict=True)
                        ],
                    }
                )

    def over(row: dict[str, Any]) -> str:
        return ", ".join("" if value is None else f"{value:.3f}" for value in row["over_infaas"])

    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "load": lambda row: f"{row['load']:g}",
        "policy": lambda row: str(row["policy"]),
        "utility, simulated": lambda row: f"{row['simulated']:.1f}",
        "live": lambda row: f"{row['live']:.1f}",
        "live over simulated": lambda row: f"{row['live'] / row['simulated']:.3f}" if row["simulated"] else "",
        "late": lambda row: f"{row['late']:.2%}",
        "models loaded": lambda row: str(row["loads"] or ""),
        "over infaas: simulated, live": over,
    }
    report.finish(columns, out)


if __name__ == "__main__":
    typer.run(main)
