"""Policies with 1, 2, 4 and 8 executors, simulated: expected utility as a share of the bound for as many executors.

The profile is the paper-like one, arrivals are Poisson, and the load grows with the executors: load 1 is what they
serve at gamma 0. No time is measured, so a busy machine changes nothing.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from isthmus.cloud.elastic.policies.by_name import make_policy
from isthmus.cloud.elastic.policies.infaas import memory_named, simulated
from isthmus.cloud.elastic.scheduling.bound import clairvoyant_bound
from isthmus.cloud.elastic.scheduling.engine import Engine
from isthmus.cloud.elastic.scheduling.policy import EPSILON
from isthmus.cloud.elastic.scheduling.profile import Profile, paper_profile
from isthmus.cloud.elastic.scheduling.query import Query
from isthmus.cloud.elastic.scheduling.simulate import Run, draws, simulate
from isthmus.cloud.elastic.scheduling.workload import PAPER_KINDS, make_queries, poisson_arrivals
from tests.bench.harness import Report


def served(name: str, profile: Profile, queries: list[Query], seed: int, executors: int) -> Run:
    """Simulate one policy. All get the same random draws."""
    luck_N = draws(np.random.default_rng([seed, 1]), len(queries))
    if (memory_bytes := memory_named(name)) is not None:
        sizes, policy, takes_s = simulated(profile, memory_bytes, executors)
        return simulate(Engine(sizes, policy, adapts=False, executors=executors), queries, luck_N, takes_s)
    return simulate(Engine(profile, make_policy(name, profile), executors=executors), queries, luck_N)


def main(
    executors: Annotated[str, typer.Option(help="Numbers of executors.")] = "1,2,4,8",
    loads: Annotated[str, typer.Option(help="Loads, as multiples of what the executors serve at gamma 0.")] = "1,1.5",
    duration_s: Annotated[float, typer.Option(help="Seconds of arrivals.")] = 20.0,
    policies: Annotated[
        str, typer.Option(help="Policies, separated by commas. 'exact' plans for minutes with 8 executors.")
    ] = "priced,infaas,infaas:1.04,throughput,otas,clipper,pets",
    seeds: Annotated[int, typer.Option(help="Number of seeds.")] = 3,
    out: Annotated[Path | None, typer.Option(help="Write the results to this JSON file.")] = None,
) -> None:
    """Simulate every policy with several executors, beside the bound."""
    profile = paper_profile()
    report = Report("elastic_executors", {"duration_s": duration_s, "seeds": seeds, "profile": "paper-like"})
    names = policies.split(",")
    for count in map(int, executors.split(",")):
        for load in map(float, loads.split(",")):
            shares: dict[str, list[float]] = {name: [] for name in names}
            for seed in range(seeds):
                rng = np.random.default_rng(seed)
                rate_T = np.full(max(1, round(duration_s)), load * count * profile.capacity_per_s(0))
                queries = make_queries(rng, poisson_arrivals(rng, rate_T, 1.0), PAPER_KINDS)
                bound = clairvoyant_bound(queries, profile, EPSILON, executors=count)
                for name in names:
                    shares[name].append(served(name, profile, queries, seed, count).expected_utility / bound)
            means = {name: round(float(np.mean(each)), 4) for name, each in shares.items()}
            report.rows.append({"executors": count, "load": load, "share_of_bound": means})
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "executors": lambda row: str(row["executors"]),
        "load": lambda row: f"{row['load']:g}",
    }
    for name in names:
        columns[name] = lambda row, name=name: f"{row['share_of_bound'][name]:.3f}"  # type: ignore[misc]
    report.finish(columns, out)


if __name__ == "__main__":
    typer.run(main)
