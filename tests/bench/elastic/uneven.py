"""Executors of different speed, simulated: a pace per executor against one pace for all.

All but the last executor take the profile's times, the last one takes longer. With one pace for all, as the engine had
it before, plans use the same times for every executor. The share is expected utility over the bound for what all
executors can do together. No time is measured, so a busy machine changes nothing.
"""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from isthmus.cloud.elastic.policies.by_name import make_policy
from isthmus.cloud.elastic.scheduling.bound import clairvoyant_bound
from isthmus.cloud.elastic.scheduling.engine import Engine, Work
from isthmus.cloud.elastic.scheduling.pace import LEAST_SIZE, Pace, Paces
from isthmus.cloud.elastic.scheduling.policy import EPSILON
from isthmus.cloud.elastic.scheduling.profile import Profile, paper_profile
from isthmus.cloud.elastic.scheduling.query import Outcome, Query
from isthmus.cloud.elastic.scheduling.simulate import Run, draws, simulate
from isthmus.cloud.elastic.scheduling.workload import PAPER_KINDS, make_queries, poisson_arrivals
from tests.bench.harness import Report


class OnePace(Paces):
    """The batches of all executors set one pace, and only large ones do. Nothing is forgotten."""

    def of(self, executor: int) -> Pace:
        return super().of(self.able[0])

    def ran(self, executor: int, size: int, profiled_s: float, took_s: float, now_s: float) -> bool:
        return size >= LEAST_SIZE and super().ran(executor, size, profiled_s, took_s, now_s)

    def forget(self, now_s: float, busy: Collection[int]) -> bool:
        return False


def served(
    name: str,
    profile: Profile,
    queries: list[Query],
    seed: int,
    factors: list[float],
    paces: type[Paces] = Paces,
    noise: float = 0.0,
) -> Run:
    """Simulate one policy. On executor k a batch takes ``factors[k]`` times as long as the profile says, on average.

    ``noise``: standard deviation of the logarithm of a batch's time.
    """
    engine = Engine(profile, make_policy(name, profile), executors=len(factors), paces=paces)
    luck_N = draws(np.random.default_rng([seed, 1]), len(queries))

    varying = np.random.default_rng([seed, 2])

    def takes_s(work: Work) -> float:
        varies = float(varying.lognormal(-(noise**2) / 2, noise))
        return varies * factors[work.executor] * profile.batch_time_s(work.gamma, len(work.batch))

    return simulate(engine, queries, luck_N, takes_s)


def main(
    executors: Annotated[int, typer.Option(help="Number of executors.")] = 2,
    factors: Annotated[str, typer.Option(help="How much longer the last executor takes.")] = "1,1.5,3",
    loads: Annotated[str, typer.Option(help="Loads, as multiples of what all serve at gamma 0.")] = "0.5,1,1.5",
    duration_s: Annotated[float, typer.Option(help="Seconds of arrivals.")] = 20.0,
    policies: Annotated[str, typer.Option(help="Policies, separated by commas.")] = "priced,otas,throughput,clipper",
    noise: Annotated[float, typer.Option(help="Standard deviation of the logarithm of a batch's time.")] = 0.0,
    seeds: Annotated[int, typer.Option(help="Number of seeds.")] = 10,
    out: Annotated[Path | None, typer.Option(help="Write the results to this JSON file.")] = None,
) -> None:
    """Simulate policies on executors of which one is slower, with a pace for each and with one for all."""
    profile = paper_profile()
    config = {"executors": executors, "duration_s": duration_s, "seeds": seeds, "noise": noise, "profile": "paper-like"}
    report = Report("elastic_uneven", config)
    for factor in map(float, factors.split(",")):
        takes = [1.0] * (executors - 1) + [factor]
        together = sum(1 / each for each in takes)
        for load in map(float, loads.split(",")):
            made = []
            for seed in range(seeds):
                rng = np.random.default_rng(seed)
                rate_T = np.full(max(1, round(duration_s)), load * together * profile.capacity_per_s(0))
                queries = make_queries(rng, poisson_arrivals(rng, rate_T, 1.0), PAPER_KINDS)
                made.append((seed, queries, clairvoyant_bound(queries, profile, EPSILON, executors=together)))
            for name in policies.split(","):
                runs = {
                    kind: [
                        (served(name, profile, queries, seed, takes, kind, noise), bound)
                        for seed, queries, bound in made
                    ]
                    for kind in (Paces, OnePace)
                }
                own, one = ([run.expected_utility / bound for run, bound in runs[kind]] for kind in (Paces, OnePace))
                late = [float(np.mean([run.share(Outcome.LATE) for run, _ in each])) for each in runs.values()]
                more = np.array(own) / np.array(one) - 1
                report.rows.append(
                    {
                        "slower": factor,
                        "load": load,
                        "policy": name,
                        "own": own,
                        "one": one,
                        "late": {"own": late[0], "one": late[1]},
                        "more": float(more.mean()),
                        "more_se": float(more.std(ddof=1) / len(more) ** 0.5) if len(more) > 1 else 0.0,
                    }
                )
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "the last takes": lambda row: f"{row['slower']:g} times as long",
        "load": lambda row: f"{row['load']:g}",
        "policy": lambda row: row["policy"],
        "a pace each, of bound": lambda row: f"{np.mean(row['own']):.3f}",
        "one pace, of bound": lambda row: f"{np.mean(row['one']):.3f}",
        "more (standard error)": lambda row: f"{row['more']:+.1%} ({row['more_se']:.1%})",
        "late, a pace each": lambda row: f"{row['late']['own']:.1%}",
        "late, one pace": lambda row: f"{row['late']['one']:.1%}",
    }
    report.finish(columns, out)


if __name__ == "__main__":
    typer.run(main)
