"""Policies that plan with wrong beliefs, simulated: what they earn after 5 s, as a share of the clairvoyant bound.

The policy plans with one profile, and the world follows another. The bound knows the world's profile, and counts the
queries that arrive after the first 5 s. It does not know which of them will be slow where times are random, so it is
the bound of their mean times. ``exact`` checks the bound itself: small cases against the best of all schedules.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Final

import numpy as np
import typer

from isthmus.cloud.elastic.policies.by_name import make_policy
from isthmus.cloud.elastic.policies.infaas import memory_named, simulated, sizes_profile
from isthmus.cloud.elastic.scheduling.bound import clairvoyant_bound
from isthmus.cloud.elastic.scheduling.engine import Engine, Work
from isthmus.cloud.elastic.scheduling.policy import EPSILON
from isthmus.cloud.elastic.scheduling.profile import Profile, paper_profile
from isthmus.cloud.elastic.scheduling.query import Query
from isthmus.cloud.elastic.scheduling.simulate import VirtualWorld, serve
from isthmus.cloud.elastic.scheduling.workload import PAPER_KINDS, QueryKind, make_queries, poisson_arrivals
from tests.bench.harness import Report

SETTLED_S: Final = 5.0
LOAD: Final = 1.2
Noise = Callable[[np.random.Generator], float]


@dataclass(frozen=True)
class World:
    """How the truth differs from what the policy believes. ``slower``: batches take this multiple of the belief."""

    slower: float = 1.0
    accuracy: Callable[[np.random.Generator, Profile], Profile] | None = None
    noise: Noise | None = None
    rates: Callable[[int], np.ndarray] | None = None
    kinds_later: tuple[QueryKind, ...] | None = None


def _ten_points(rng: np.random.Generator, profile: Profile) -> Profile:
    """Move every accuracy by 10 points up or down, at random."""
    moved = {
        task: {gamma: float(np.clip(share + rng.choice((-0.1, 0.1)), 0, 1)) for gamma, share in of.items()}
        for task, of in profile.accuracy.items()
    }
    return replace(profile, accuracy=moved)


def _merging_flatters(rng: np.random.Generator, profile: Profile) -> Profile:
    """Take 10 points from every accuracy below gamma 0: the belief flatters merging."""
    moved = {
        task: {gamma: share - 0.1 * (gamma < 0) for gamma, share in of.items()} for task, of in profile.accuracy.items()
    }
    return replace(profile, accuracy=moved)


def _burst(seconds: int) -> np.ndarray:
    """Ten times the usual rate for two seconds, in the middle of what counts."""
    rates_T = np.full(seconds, 1.0)
    middle = (int(SETTLED_S) + seconds) // 2
    rates_T[middle : middle + 2] = 10.0
    return rates_T


DEAR: Final = (QueryKind("CIFAR100", 0.3, 1.0), QueryKind("CIFAR10", 0.3, 0.8), QueryKind("EuroSAT", 0.3, 0.6))
WORLDS: Final[dict[str, World]] = {
    "as believed": World(),
    "half the time": World(0.5),
    "0.75 of the time": World(0.75),
    "1.5 times the time": World(1.5),
    "twice the time": World(2.0),
    "accuracies 10 points off": World(accuracy=_ten_points),
    "merging 10 points worse": World(accuracy=_merging_flatters),
    "ten times the load for 2 s": World(rates=_burst),
    "heavy-tailed times": World(noise=lambda rng: float(min(20.0, 0.5 + 0.5 * 1.5 * rng.pareto(2.5)))),
    "other queries after half": World(kinds_later=DEAR),
}
"""The noise has mean 1: half of it is constant, and half is a Pareto variable of shape 2.5 (infinite third moment)."""


def queries_of(world: World, profile: Profile, seed: int, seconds: int) -> list[Query]:
    rng = np.random.default_rng(seed)
    shape_T = np.ones(seconds) if world.rates is None else world.rates(seconds)
    arrivals_N = poisson_arrivals(rng, shape_T * LOAD * profile.capacity_per_s(0))
    queries = make_queries(rng, arrivals_N, PAPER_KINDS)
    if world.kinds_later is None:
        return queries
    later = make_queries(rng, arrivals_N, world.kinds_later)
    half_s = (SETTLED_S + seconds) / 2
    return [first if first.arrival_s < half_s else second for first, second in zip(queries, later, strict=True)]


def earned(
    belief: Profile, truth: Profile, noise: Noise | None, policy: str, queries: Sequence[Query], seed: int
) -> float:
    """Return the expected utility, by the true accuracies, of the queries that arrive after ``SETTLED_S``.

    INFaaS chooses among models of three sizes, whose times and accuracies follow from those of gamma 0.
    """
    rng = np.random.default_rng([seed, 2])
    utility = 0.0
    memory_bytes = memory_named(policy)
    running: Callable[[Work], float] | None = None
    if memory_bytes is None:
        engine = Engine(belief, make_policy(policy, belief))
    else:
        sizes, infaas, running = simulated(belief, memory_bytes)
        truth = sizes_profile(truth)
        engine = Engine(sizes, infaas, adapts=False)

    def takes_s(work: Work) -> float:
        nonlocal utility
        took_s = truth.batch_time_s(work.gamma, len(work.batch)) * (1.0 if noise is None else noise(rng))
        if running is not None:  # what is left of it is the time of loading a model
            took_s += running(work) - work.predicted_s
        utility += sum(
            truth.accuracy_of(query.task, work.gamma) * query.utility
            for query in work.batch.queries
            if query.arrival_s >= SETTLED_S and work.started_s + took_s <= query.deadline_s
        )
        return took_s

    serve(engine, queries, VirtualWorld(truth, np.zeros(len(queries)), takes_s))
    return utility


def best_of_all(queries: Sequence[Query], profile: Profile) -> float:
    """Return the best utility of any schedule of batches, by trying all of them. Only for a handful of queries."""

    @cache
    def best(left: frozenset[int], clock_s: float) -> float:
        found = 0.0
        for count in range(1, len(left) + 1):
            for chosen in itertools.combinations(sorted(left), count):
                start_s = max(clock_s, *(queries[index].arrival_s for index in chosen))
                for gamma in profile.gammas:
                    end_s = start_s + profile.batch_time_s(gamma, count)
                    if all(end_s <= queries[index].deadline_s for index in chosen):
                        gain = sum(
                            profile.accuracy_of(queries[index].task, gamma) * queries[index].utility for index in chosen
                        )
                        found = max(found, gain + best(left - frozenset(chosen), round(end_s, 9)))
        return found

    return best(frozenset(range(len(queries))), 0.0)


def looseness(seed: int, count: int) -> float:
    """Return the bound over the best of all schedules, for ``count`` queries that cannot all be served."""
    profile = paper_profile()
    small = replace(
        profile,
        gammas=(-20, 0, 8),
        accuracy={task: {gamma: of[gamma] for gamma in (-20, 0, 8)} for task, of in profile.accuracy.items()},
        latency_s={gamma: profile.latency_s[gamma] for gamma in (-20, 0, 8)},
        memory={},
    )
    rng = np.random.default_rng(seed)
    queries = [
        Query(id, kind.task, arrival_s, arrival_s + float(rng.uniform(0.008, 0.03)), kind.utility)
        for id, (kind, arrival_s) in enumerate(
            zip(
                [PAPER_KINDS[index] for index in rng.integers(0, len(PAPER_KINDS), count)],
                np.sort(rng.uniform(0, 0.01 * count, count)).tolist(),
                strict=True,
            )
        )
    ]
    # Only batches of up to ``count`` can occur, and short slots suit short latencies.
    return clairvoyant_bound(queries, small, count, slot_s=0.001) / best_of_all(queries, small)


def main(
    policies: Annotated[str, typer.Option(help="Separated by commas. infaas:GB is INFaaS.")] = "priced,exact,otas",
    worlds: Annotated[str, typer.Option(help="Names of worlds, separated by commas. Default: all.")] = "",
    seeds: Annotated[int, typer.Option(help="Number of seeds.")] = 3,
    first_seed: Annotated[int, typer.Option(help="The policies were tuned on seeds below 100.")] = 100,
    seconds: Annotated[int, typer.Option(help="Seconds of arrivals; the first 5 do not count.")] = 15,
    small: Annotated[int, typer.Option(help="Number of small cases for the check of the bound; 0: none.")] = 40,
    out: Annotated[Path | None, typer.Option(help="Write the results to this JSON file.")] = None,
) -> None:
    """Simulate policies in worlds that differ from their beliefs, and check the bound on small cases."""
    belief = paper_profile()
    names = policies.split(",")
    chosen = range(first_seed, first_seed + seeds)
    config = {"seeds": list(chosen), "seconds": seconds, "load": LOAD, "profile": "paper-like", "small": small}
    report = Report("beliefs", config)
    for title in worlds.split(",") if worlds else WORLDS:
        world = WORLDS[title]
        shares: dict[str, list[float]] = {name: [] for name in names}
        for seed in chosen:
            truth = belief.slowed(world.slower)
            if world.accuracy is not None:
                truth = world.accuracy(np.random.default_rng([seed, 3]), truth)
            queries = queries_of(world, belief, seed, seconds)
            bound = clairvoyant_bound([each for each in queries if each.arrival_s >= SETTLED_S], truth, EPSILON)
            for name in names:
                shares[name].append(earned(belief, truth, world.noise, name, queries, seed) / bound)
        row: dict[str, Any] = {"world": title}
        for name, each in shares.items():
            row[name] = {"mean": round(float(np.mean(each)), 4), "least": round(min(each), 4)}
        report.rows.append(row)
    if small:
        ratios = [looseness(first_seed + case, 3 + case % 4) for case in range(small)]
        report.notes.append(
            f"bound over the best of all schedules, {small} cases of 3 to 6 queries: median {np.median(ratios):.3f}, "
            f"from {min(ratios):.3f} to {max(ratios):.3f}"
        )

    def shown(name: str) -> Callable[[dict[str, Any]], str]:
        return lambda row: f"{row[name]['mean']:.3f} ({row[name]['least']:.3f})"

    report.finish({"world": lambda row: str(row["world"]), **{name: shown(name) for name in names}}, out)


if __name__ == "__main__":
    typer.run(main)
