"""The cost of a wrong profile, for plans that trust it, plans with a fixed margin, and plans that adapt to delays.

This is a simulation with the real policies; the worlds below set how long batches take. Utility is expected utility, as
a share of the same policy's with an exact profile. Late is the share of queries answered after their deadline.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Final

import numpy as np
import typer

from isthmus.cloud.elastic.policies.by_name import make_policy
from isthmus.cloud.elastic.scheduling.engine import Engine, Work
from isthmus.cloud.elastic.scheduling.profile import Profile, paper_profile
from isthmus.cloud.elastic.scheduling.query import Outcome
from isthmus.cloud.elastic.scheduling.simulate import ExecutorModel, Run, draws, simulate
from isthmus.cloud.elastic.scheduling.workload import queries_at_load, wandering_rates
from tests.bench.harness import Report

MARGIN: Final = 0.1
LOADING_S: Final = 0.05
TURN_S: Final = 5.0

Factor = Callable[[np.random.Generator, Work], float]
"""Factor on the profile's time of a batch; a share ``LOADING`` of all batches takes ``LOADING_S`` more."""

WORLDS: Final[dict[str, Factor]] = {
    "as profiled": lambda rng, work: 1.0,
    "varies by 5 %": lambda rng, work: float(np.exp(rng.normal(0, 0.05))),
    "a fifth slower": lambda rng, work: 1.2 * float(np.exp(rng.normal(0, 0.05))),
    "half as long again": lambda rng, work: 1.5 * float(np.exp(rng.normal(0, 0.1))),
    "that every other 5 s": lambda rng, work: (
        (1 + (work.started_s // TURN_S % 2) / 2) * float(np.exp(rng.normal(0, 0.05)))
    ),
    "models are loaded": lambda rng, work: float(np.exp(rng.normal(0, 0.05))),
}
LOADING: Final = {"models are loaded": 0.15}
"""Share of batches during which a model is loaded."""
PLANS: Final[dict[str, tuple[float, bool]]] = {
    "trusting": (0.0, False),
    f"margin of {MARGIN:.0%}": (MARGIN, False),
    "following": (0.0, True),
}


def executor(world: str, profile: Profile, seed: int) -> ExecutorModel:
    rng = np.random.default_rng([seed, 2])

    def takes_s(work: Work) -> float:
        loads_s = LOADING_S * (rng.random() < LOADING.get(world, 0.0))
        return WORLDS[world](rng, work) * profile.batch_time_s(work.gamma, len(work.batch)) + loads_s

    return takes_s


def served(profile: Profile, policy: str, plan: str, world: str, load: float, seed: int, duration_s: float) -> Run:
    rng = np.random.default_rng(seed)
    queries = queries_at_load(rng, wandering_rates(rng, duration_s), load, profile)
    margin, adapts = PLANS[plan]
    planned = profile.slowed(1 + margin)
    engine = Engine(planned, make_policy(policy, planned), adapts=adapts)
    return simulate(
        engine, queries, draws(np.random.default_rng([seed, 1]), len(queries)), executor(world, profile, seed)
    )


def main(
    profile: Annotated[Path | None, typer.Option(help="A measured profile; default: one like the paper's.")] = None,
    policies: Annotated[str, typer.Option(help="Separated by commas.")] = "priced,exact,fixed:0",
    loads: Annotated[str, typer.Option(help="Separated by commas.")] = "1,1.5",
    seeds: int = 3,
    duration_s: float = 20.0,
    out: Annotated[Path | None, typer.Option(help="Write the results to this JSON file.")] = None,
) -> None:
    """Compare trust, a fixed margin and adaptation in worlds that differ more and more from the profile."""
    measured = paper_profile() if profile is None else Profile.from_json(profile.read_text(encoding="utf-8"))
    report = Report("drift", {"seeds": seeds, "duration_s": duration_s, "profile": measured.key.model_hash})
    for policy in policies.split(","):
        for load in (float(value) for value in loads.split(",")):
            still = [
                served(measured, policy, "trusting", "as profiled", load, seed, duration_s) for seed in range(seeds)
            ]
            for world in WORLDS:
                row: dict[str, Any] = {"policy": policy, "load": load, "world": world}
                for plan in PLANS:
                    runs = [served(measured, policy, plan, world, load, seed, duration_s) for seed in range(seeds)]
                    row[plan] = {
                        "utility": float(
                            np.mean([a.expected_utility / b.expected_utility for a, b in zip(runs, still, strict=True)])
                        ),
                        "late": float(np.mean([run.share(Outcome.LATE) for run in runs])),
                    }
                report.rows.append(row)

    def shown(plan: str) -> Callable[[dict[str, Any]], str]:
        return lambda row: f"{row[plan]['utility']:.3f}, {100 * row[plan]['late']:.2f} %"

    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "policy": lambda row: str(row["policy"]),
        "load": lambda row: f"{row['load']:g}",
        "batches": lambda row: str(row["world"]),
        **{f"{plan}: utility, late": shown(plan) for plan in PLANS},
    }
    report.finish(columns, out)


if __name__ == "__main__":
    typer.run(main)
