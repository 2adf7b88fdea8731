"""A workload served by the real model in real time, and by the simulator with this machine's profile.

    python -m tests.bench.generation.live --model smollm2 --requests 40 --load 0.9 --out live.json

The engine follows the pace that steps really take. The simulator then runs at the mean pace of the live run, so that a
machine that is busy with other work does not count as an error of the profile; both are reported.
"""

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from isthmus.cloud.generation.model.configuration import LlamaConfig
from isthmus.cloud.generation.model.executor import Executor, ModelExecutor, make_cache
from isthmus.cloud.generation.model.weights import load_llama
from isthmus.cloud.generation.policies.by_name import make_policy
from isthmus.cloud.generation.prepare.profiler import measure
from isthmus.cloud.generation.prepare.replaying import served
from isthmus.cloud.generation.scheduling.engine import Engine
from isthmus.cloud.generation.scheduling.policy import Limits
from isthmus.cloud.generation.scheduling.profile import GenerationProfile
from isthmus.cloud.generation.scheduling.report import report as figures
from isthmus.cloud.generation.scheduling.simulate import Run, serve
from isthmus.cloud.generation.scheduling.step import Drawn, Step
from isthmus.cloud.generation.scheduling.workload import Sizes, Workload, at_load, chat_sizes, poisson_gaps
from tests.bench.harness import Report

LIMITS = Limits(rows=16, blocks=512)
MOST_TOKENS = 96


class RealWorld:
    """The real clock, and the real model. An answer ends at its known length, whatever was drawn."""

    def __init__(self, executor: Executor, lengths: Sequence[int]) -> None:
        self._executor, self._lengths = executor, lengths
        self._began_s = time.perf_counter()
        self.paces: list[float] = []
        self.loads: list[tuple[float, float]] = []

    def now_s(self) -> float:
        return time.perf_counter() - self._began_s

    def wait(self, until_s: float) -> None:
        time.sleep(max(0.0, until_s - self.now_s()))

    def drop(self, ids: Sequence[int]) -> None:
        self._executor.drop(ids)

    def run(self, step: Step) -> Mapping[int, Drawn]:
        began_s = time.perf_counter()
        tokens = self._executor.run(step)
        self.loads.append((step.predicted_s, time.perf_counter() - began_s))
        ends = {row.id: row.first + len(row.tokens) - len(row.request.prompt) + 1 for row in step.rows}
        return {id: Drawn(token, last=ends[id] >= self._lengths[id]) for id, token in tokens.items()}


def workload(profile: GenerationProfile, requests: int, load: float, seed: int) -> Workload:
    rng = np.random.default_rng(seed)
    found = chat_sizes(rng, requests)
    shorter = Sizes(np.minimum(found.prompts_N, MOST_TOKENS), np.minimum(found.answers_N, MOST_TOKENS), found.kinds)
    return at_load(shorter, poisson_gaps(rng, requests), load, profile)


def simulated(profile: GenerationProfile, made: Workload) -> Run:
    return served(made, profile, "fused", None, LIMITS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--number-type", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--requests", type=int, default=40)
    parser.add_argument("--load", type=float, default=0.9)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    model = load_llama(asked.model, LlamaConfig.read(asked.model), number_type=asked.number_type)
    profile = measure(model, rows=(1, 4, 8, 16), contexts=(64,), chunks=(16, 64, 128), repeats=2)
    made = workload(profile, asked.requests, asked.load, asked.seed)
    report = Report("live against simulated", {**vars(asked), "model": asked.model.name, "out": None}, ("torch",))
    executor = ModelExecutor(model, make_cache("slots", model, LIMITS))
    engine = Engine(profile, make_policy("fused"), LIMITS, max_requests=asked.requests, expires=False, adapts=False)
    world = RealWorld(executor, made.lengths)
    runs = {"live": serve(engine, made.requests, world)}
    pace = sum(took for _, took in world.loads) / sum(predicted for predicted, _ in world.loads)
    runs["simulated"] = simulated(profile, made)
    runs["simulated at the live run's pace"] = simulated(profile.slowed(pace), made)
    for name, run in runs.items():
        report.rows.append({"what": name, **figures(run)})
    report.floors |= {"pace of the live run, as a multiple of the profile": pace, "error of the profile": profile.error}
    columns: dict[str, Any] = {
        "what": lambda row: row["what"],
        "tokens/s": lambda row: f"{row['tokens_per_s']:.2f}",
        "in time": lambda row: f"{row['goodput']:.3f}",
        "mean TTFT s": lambda row: f"{row['ttft_s']['mean']:.3f}",
        "mean s": lambda row: f"{row['latency_s']['mean']:.3f}",
    }
    report.finish(columns, asked.out)


if __name__ == "__main__":
    main()
