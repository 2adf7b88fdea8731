"""Executors that follow the load: when a new one is asked for, how often the number turns round, and what it earns.

Simulated, with the paper-like profile made slower, so that hours take seconds: no time is measured, and a busy machine
changes nothing. A turn is a change that goes the other way than the change before it.
"""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import typer

from isthmus.cloud.elastic.policies.by_name import make_policy
from isthmus.cloud.elastic.scheduling.engine import Engine
from isthmus.cloud.elastic.scheduling.profile import Profile, paper_profile
from isthmus.cloud.elastic.scheduling.query import IN_TIME
from isthmus.cloud.elastic.scheduling.scaling import Scaler, ScaleRule
from isthmus.cloud.elastic.scheduling.simulate import Growing, draws, simulate
from isthmus.cloud.elastic.scheduling.workload import PAPER_KINDS, make_queries, poisson_arrivals
from tests.bench.harness import Report

Loads = npt.NDArray[np.float64]
STEP_AT_S = 300
COUNTED_S = 600.0
"""Turns are counted in every span of so long."""


def step(seconds: int, rng: np.random.Generator) -> Loads:
    """0.6 of one executor for five minutes, then four times as much for half of the time, then 0.6 again."""
    loads_T = np.full(seconds, 0.6)
    loads_T[STEP_AT_S : STEP_AT_S + seconds // 2] = 2.4
    return loads_T


def swing(period_s: int) -> Callable[[int, np.random.Generator], Loads]:
    """Half of each period 0.5, half of it 3."""
    return lambda seconds, rng: np.where(np.arange(seconds) % period_s < period_s // 2, 0.5, 3.0)


def wander(seconds: int, rng: np.random.Generator) -> Loads:
    """A random walk between 0.2 and 4, as the paper's rate wanders."""
    walk_T = 2 + np.cumsum(rng.normal(0, 0.06, seconds))
    folded_T = np.mod(walk_T - 0.2, 7.6)
    return 0.2 + np.minimum(folded_T, 7.6 - folded_T)


def day(seconds: int, rng: np.random.Generator) -> Loads:
    """One slow wave from 0.3 to 4 and back, with bursts of 20 s to twice the load."""
    wave_T = 0.3 + 1.85 * (1 - np.cos(2 * np.pi * np.arange(seconds) / seconds))
    for start in rng.integers(0, seconds, max(1, seconds // 300)):
        wave_T[start : start + 20] *= 2
    return wave_T


SCENARIOS: dict[str, Callable[[int, np.random.Generator], Loads]] = {
    "step x 4": step,
    "swing of 1 min": swing(60),
    "swing of 5 min": swing(300),
    "swing of 25 min": swing(1_500),
    "swing of 50 min": swing(3_000),
    "wander": wander,
    "day": day,
}


def turns(changes: list[tuple[float, int]], first: int) -> list[float]:
    """Return the times of the changes that go the other way than the one before."""
    found, before, way = [], first, 0
    for at_s, number in changes:
        now = 1 if number > before else -1
        if way and now != way:
            found.append(at_s)
        before, way = number, now
    return found


def most_within(times_s: list[float], window_s: float) -> int:
    """Return the largest number of times in any window."""
    return max((sum(at_s <= other < at_s + window_s for other in times_s) for at_s in times_s), default=0)


def followed(profile: Profile, loads_T: Loads, seed: int, rule: ScaleRule) -> tuple[list[tuple[float, int]], float]:
    """Follow one load without serving it, as if nothing ever waited.

    Return how the number of executors changed, and its mean as a share of the most.
    """
    images_T = np.random.default_rng([seed, 1]).poisson(loads_T * profile.capacity_per_s(0)).cumsum()
    scaler = Scaler(rule, profile, 0.0)
    numbers_T = [rule.least, *(scaler.look(int(images), 0, float(at_s)) for at_s, images in enumerate(images_T, 1))]
    changes = [
        (float(at_s), after) for at_s, (before, after) in enumerate(itertools.pairwise(numbers_T), 1) if before != after
    ]
    return changes, float(np.mean(numbers_T)) / rule.most


def counted(profile: Profile, scenario: str, seeds: range, seconds: int, rule: ScaleRule) -> dict[str, Any]:
    """Count turns of one scenario over many seeds."""
    turned, shares = [], []
    for seed in seeds:
        loads_T = SCENARIOS[scenario](seconds, np.random.default_rng([seed, 0]))
        changes, share = followed(profile, loads_T, seed, rule)
        turned.append(turns(changes, rule.least))
        shares.append(share)
    return {
        "scenario": scenario,
        "runs": len(seeds),
        "runs_with_two_turns_in_10_min": sum(most_within(each, COUNTED_S) > 1 for each in turned),
        "turns": sum(map(len, turned)),
        "executor_seconds_of_most": float(np.mean(shares)),
    }


def served(profile: Profile, loads_T: Loads, seed: int, rule: ScaleRule, start_s: float) -> dict[str, Any]:
    """Serve one load. Return what was earned and how the number of executors changed."""
    rng = np.random.default_rng([seed, 1])
    queries = make_queries(rng, poisson_arrivals(rng, loads_T * profile.capacity_per_s(0)), PAPER_KINDS)
    engine = Engine(profile, make_policy("priced", profile), executors=rule.least)
    growing = Growing(Scaler(rule, profile, 0.0), start_s=start_s)
    run = simulate(engine, queries, draws(rng, len(queries)), growing=growing)
    numbers = [(0.0, rule.least), *growing.changes, (max(run.end_s, len(loads_T)), 0)]
    seconds = sum((after - at) * number for (at, number), (after, _) in itertools.pairwise(numbers))
    return {
        "utility": run.expected_utility,
        "in_time": sum(outcome in IN_TIME for outcome in run.outcomes) / max(1, len(run.outcomes)),
        "executor_s": seconds,
        "changes": growing.changes,
        "turns": turns(growing.changes, rule.least),
    }


def main(
    seconds: Annotated[int, typer.Option(help="Seconds of each scenario.")] = 7_200,
    slower: Annotated[float, typer.Option(help="How many times as slow as the paper's machine.")] = 16.0,
    most: Annotated[int, typer.Option(help="Largest number of executors.")] = 6,
    start_s: Annotated[float, typer.Option(help="Seconds until a new executor runs.")] = 20.0,
    seeds: Annotated[int, typer.Option(help="Number of seeds.")] = 3,
    first_seed: int = 0,
    window_s: Annotated[
        float, typer.Option(help="Seconds for which an executor is kept after it was needed.")
    ] = ScaleRule.window_s,
    scenarios: Annotated[str, typer.Option(help="Scenarios, separated by commas.")] = ",".join(SCENARIOS),
    count_alone: Annotated[bool, typer.Option("--count-alone", help="Count turns and serve nothing: quick.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the results to this JSON file.")] = None,
) -> None:
    """Compare a growing number of executors with the fewest and the most, on loads that change."""
    profile = paper_profile().slowed(slower)
    config = {"seconds": seconds, "most": most, "start_s": start_s, "seeds": seeds, "slower": slower}
    config |= {"first_seed": first_seed, "window_s": window_s}
    report = Report("elastic_scaling", {**config, "policy": "priced"})
    if count_alone:
        rule = ScaleRule(1, most, window_s=window_s)
        all_seeds = range(first_seed, first_seed + seeds)
        report.rows = [counted(profile, name, all_seeds, seconds, rule) for name in scenarios.split(",")]
        report.finish({key: lambda row, key=key: str(row[key]) for key in report.rows[0]}, out)  # type: ignore[misc]
        return
    for name in scenarios.split(","):
        for seed in range(first_seed, first_seed + seeds):
            loads_T = SCENARIOS[name](seconds, np.random.default_rng([seed, 0]))
            grown, few, many = (
                served(profile, loads_T, seed, ScaleRule(least, at_most, window_s=window_s), start_s)
                for least, at_most in ((1, most), (1, 1), (most, most))
            )
            asked = next((at_s - STEP_AT_S for at_s, _ in grown["changes"] if at_s > STEP_AT_S), None)
            report.rows.append(
                {
                    "scenario": name,
                    "seed": seed,
                    "asked_after_s": asked if name == "step x 4" else None,
                    "changes": grown["changes"],
                    "turns": grown["turns"],
                    "most_turns_in_10_min": most_within(grown["turns"], COUNTED_S),
                    "utility_of_most": grown["utility"] / many["utility"],
                    "utility_of_one": few["utility"] / many["utility"],
                    "in_time": grown["in_time"],
                    "executor_seconds_of_most": grown["executor_s"] / many["executor_s"],
                }
            )
    report.finish(
        {
            "scenario": lambda row: f"{row['scenario']}, seed {row['seed']}",
            "asked after": lambda row: "" if row["asked_after_s"] is None else f"{row['asked_after_s']:.1f} s",
            "changes": lambda row: str(len(row["changes"])),
            "turns": lambda row: str(len(row["turns"])),
            "most turns in 10 min": lambda row: str(row["most_turns_in_10_min"]),
            "utility": lambda row: f"{row['utility_of_most']:.3f}",
            "with one": lambda row: f"{row['utility_of_one']:.3f}",
            "executor seconds": lambda row: f"{row['executor_seconds_of_most']:.2f}",
        },
        out,
    )


if __name__ == "__main__":
    typer.run(main)
