"""Chapter 4's own workload, simulated: five systems at 1 to 700 queries per second, and at 100 to 300 as recorded.

Rates are scaled by what the machine serves at gamma 0 (the paper's: 365 per second), and the latency limit of 0.1 s by
the inverse, so that a slower machine meets the same task. Every right answer in time counts alike.

Clipper runs all tokens. The others follow the chapter's rule (the smallest reduction number that serves the load) with
their own accuracies: vanilla weights (OTAS), the model tuned for the largest number (Maxprune), one model per number
(Exhaustive), and the planner's models with averages (Prodigy). ``priced`` is our policy on Prodigy's models.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Final

import numpy as np
import typer

from isthmus.cloud.elastic.policies.by_name import make_policy
from isthmus.cloud.elastic.scheduling.engine import Engine
from isthmus.cloud.elastic.scheduling.profile import Profile
from isthmus.cloud.elastic.scheduling.query import Outcome
from isthmus.cloud.elastic.scheduling.simulate import draws, simulate
from isthmus.cloud.elastic.scheduling.workload import QueryKind, make_queries, poisson_arrivals, rates_of_counts
from isthmus.data.traces import read_trace
from tests.bench.harness import Report

PAPER_PER_S: Final = 365.0
LIMIT_S: Final = 0.1
TASK: Final = "details"
SYSTEMS: Final[Mapping[str, tuple[str, str]]] = {
    "Clipper": ("clipper", "clipper"),
    "OTAS": ("otas", "throughput"),
    "Maxprune": ("maxprune", "throughput"),
    "Exhaustive": ("exhaustive", "throughput"),
    "Prodigy": ("prodigy+soups", "throughput"),
    "Prodigy, priced": ("prodigy+soups", "priced"),
}
"""System: the method whose accuracies it has (as 'isthmus elastic warmup evaluate' names them), and its policy."""


def walk(rng: np.random.Generator, low: float, high: float, seconds: int) -> np.ndarray:
    """Return a random walk of the rate, reflected at ``low`` and ``high``."""
    span = high - low
    steps_T = np.mod(rng.uniform(0, span) + np.cumsum(rng.normal(0, 0.08 * span, seconds)), 2 * span)
    return low + np.minimum(steps_T, 2 * span - steps_T)


def between(rates_T: np.ndarray, low: float, high: float) -> np.ndarray:
    """Return the rates moved and stretched to the range from ``low`` to ``high``."""
    return low + (high - low) * (rates_T - rates_T.min()) / np.ptp(rates_T)


def accuracies(result: Mapping[str, Any], method: str) -> dict[int, float]:
    """Return the mean accuracy over the seeds of tuning, by gamma."""
    found = [each["accuracy"][method] for each in result["seeds"]]
    return {-int(number): float(np.mean([of[number] for of in found])) for number in found[0]}


def main(
    profile: Annotated[Path, typer.Option(help="A profile measured at the numbers of the warmed models.")],
    warmed: Annotated[Path, typer.Option(help="result.json of 'isthmus elastic warmup evaluate'.")],
    trace: Annotated[Path, typer.Option(help="A recorded trace.")],
    seeds: Annotated[int, typer.Option(help="Number of seeds.")] = 3,
    first_seed: Annotated[int, typer.Option(help="The policies were tuned on seeds below 100.")] = 100,
    seconds: Annotated[int, typer.Option(help="Seconds of the synthetic trace, and at most of the recorded one.")] = 60,
    window_s: Annotated[float, typer.Option(help="Seconds of the recorded trace replayed per second.")] = 120.0,
    out: Annotated[Path | None, typer.Option(help="Write the results to this JSON file.")] = None,
) -> None:
    """Simulate the five systems of chapter 4 on its two workloads."""
    measured = Profile.from_json(profile.read_text(encoding="utf-8"))
    result = json.loads(warmed.read_text(encoding="utf-8"))
    scale = measured.capacity_per_s(0) / PAPER_PER_S
    kind = QueryKind(TASK, LIMIT_S / scale, 1.0)
    recorded_T = rates_of_counts(read_trace(trace), window_s)[:seconds]
    report = Report(
        "chapter4",
        {"seeds": list(range(first_seed, first_seed + seeds)), "seconds": seconds, "limit_s": kind.latency_s},
    )
    rates: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
        "1 to 700, Poisson": lambda rng: walk(rng, 1, 700, seconds),
        "100 to 300, recorded": lambda rng: between(recorded_T, 100, 300),
    }
    for title, rates_of in rates.items():
        runs: dict[str, list[Any]] = {name: [] for name in SYSTEMS}
        for seed in range(first_seed, first_seed + seeds):
            rng = np.random.default_rng(seed)
            queries = make_queries(rng, poisson_arrivals(rng, scale * rates_of(rng)), (kind,))
            luck_N = draws(np.random.default_rng([seed, 1]), len(queries))
            for name, (method, policy) in SYSTEMS.items():
                shares = accuracies(result, method)
                gammas = tuple(gamma for gamma in measured.gammas if gamma in shares)
                believed = replace(
                    measured,
                    gammas=gammas,
                    accuracy={TASK: {gamma: shares[gamma] for gamma in gammas}},
                    latency_s={gamma: measured.latency_s[gamma] for gamma in gammas},
                    memory={},
                    schedules={},
                    models={},
                )
                runs[name].append(simulate(Engine(believed, make_policy(policy, believed)), queries, luck_N))
        vanilla = _right(runs["OTAS"])
        for name, each in runs.items():
            latencies_s = np.concatenate([run.latencies_s for run in each])
            report.rows.append(
                {
                    "workload": title,
                    "system": name,
                    "right_per_s": float(np.mean([_right([run]) / run.end_s for run in each])),
                    "right": float(np.mean([run.share(Outcome.CORRECT_IN_TIME) for run in each])),
                    "late": float(np.mean([run.share(Outcome.LATE) for run in each])),
                    "over_otas": _right(each) / vanilla,
                    "latency_s": {
                        str(percent): float(np.percentile(latencies_s, percent))
                        for percent in (5, 10, 25, 50, 75, 90, 95, 99)
                    },
                }
            )
    report.finish(
        {
            "queries/s": lambda row: row["workload"],
            "system": lambda row: row["system"],
            "right in time/s": lambda row: f"{row['right_per_s']:.1f}",
            "right": lambda row: f"{row['right']:.1%}",
            "late": lambda row: f"{row['late']:.1%}",
            "over OTAS": lambda row: f"{row['over_otas']:.3f}",
            "latency 50 / 95 / 99 %, ms": lambda row: " / ".join(
                f"{1e3 * row['latency_s'][percent]:.0f}" for percent in ("50", "95", "99")
            ),
        },
        out,
    )


def _right(runs: list[Any]) -> int:
    return sum(run.outcomes.count(Outcome.CORRECT_IN_TIME) for run in runs)


if __name__ == "__main__":
    typer.run(main)
