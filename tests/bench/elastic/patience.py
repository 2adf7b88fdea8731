"""What callers who give a query more time cost the others, simulated with the real policies.

A share of the queries of the paper's kinds gets a longer latency; all else is the same. More time can only help, so
utility should be at least that of the same queries with nobody patient. Or patient queries come beside all others at
once, as a nightly job does; then utility is that of all over what all are worth at the best gamma.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from isthmus.cloud.elastic.policies.by_name import make_policy
from isthmus.cloud.elastic.scheduling.engine import Engine
from isthmus.cloud.elastic.scheduling.profile import Profile, paper_profile
from isthmus.cloud.elastic.scheduling.query import IN_TIME, Outcome, Query
from isthmus.cloud.elastic.scheduling.simulate import Run, draws, simulate
from isthmus.cloud.elastic.scheduling.workload import queries_at_load, wandering_rates
from tests.bench.harness import Report

BURST_UTILITY = 0.3
"""What a query of a burst is worth."""


def served(profile: Profile, policy: str, queries: list[Query], seed: int) -> Run:
    luck_N = draws(np.random.default_rng([seed, 1]), len(queries))
    return simulate(Engine(profile, make_policy(policy, profile)), queries, luck_N)


def beside_a_burst(
    profile: Profile, policy: str, asked: list[Query], seed: int, burst: Query, count: int
) -> list[float]:
    """Serve ``count`` queries like ``burst`` beside the others.

    Return the shares of all utility that is earned, of the burst that is in time, of the others evicted, and of late
    answers.
    """
    together = sorted([*asked, *[burst] * count], key=lambda query: query.arrival_s)
    numbered = [replace(query, id=id) for id, query in enumerate(together)]
    run = served(profile, policy, numbered, seed)
    of_burst = [query is burst for query in together]
    ends = list(zip(run.outcomes, of_burst, strict=True))
    worth = sum(query.utility * max(profile.accuracy[query.task].values()) for query in together)
    return [
        run.expected_utility / worth,
        sum(mine and outcome in IN_TIME for outcome, mine in ends) / count,
        sum(not mine and outcome is Outcome.EVICTED for outcome, mine in ends) / len(asked),
        run.share(Outcome.LATE),
    ]


def main(
    profile: Annotated[Path | None, typer.Option(help="A measured profile; default: one like the paper's.")] = None,
    policies: Annotated[str, typer.Option(help="Separated by commas.")] = "priced,otas",
    loads: Annotated[str, typer.Option(help="Separated by commas.")] = "1,1.5",
    shares: Annotated[str, typer.Option(help="Shares of patient queries, separated by commas.")] = "0.1,0.5",
    latencies_s: Annotated[str, typer.Option(help="Their latencies, separated by commas.")] = "10,60",
    bursts: Annotated[str, typer.Option(help="Patient queries that come at once, in place of shares.")] = "",
    seeds: Annotated[str, typer.Option(help="Separated by commas.")] = "300,301,302",
    duration_s: float = 25.0,
    out: Annotated[Path | None, typer.Option(help="Write the results to this JSON file.")] = None,
) -> None:
    """Compare the same queries with and without patient callers among them."""
    measured = paper_profile() if profile is None else Profile.from_json(profile.read_text(encoding="utf-8"))
    report = Report("patience", {"seeds": seeds, "duration_s": duration_s, "profile": measured.key.model_hash})
    for policy in policies.split(","):
        for load in (float(value) for value in loads.split(",")):
            alone: dict[int, tuple[list[Query], Run]] = {}
            row: dict[str, Any]
            for seed in (int(value) for value in seeds.split(",")):
                rng = np.random.default_rng(seed)
                asked = queries_at_load(rng, wandering_rates(rng, duration_s), load, measured)
                alone[seed] = asked, served(measured, policy, asked, seed)
            for count in map(int, bursts.split(",") if bursts else ()):
                for latency_s in map(float, latencies_s.split(",")):
                    burst = Query(0, next(iter(measured.accuracy)), 1.0, 1.0 + latency_s, BURST_UTILITY)
                    columns_of = zip(
                        *(
                            beside_a_burst(measured, policy, asked, seed, burst, count)
                            for seed, (asked, _) in alone.items()
                        ),
                        strict=True,
                    )
                    row = {"policy": policy, "load": load, "burst": count, "latency_s": latency_s}
                    row |= dict(
                        zip(("utility", "in_time", "others_evicted", "late"), map(list, columns_of), strict=True)
                    )
                    row["others_evicted_alone"] = [usual.share(Outcome.EVICTED) for _, usual in alone.values()]
                    report.rows.append(row)
            for share in () if bursts else (float(value) for value in shares.split(",")):
                for latency_s in (float(value) for value in latencies_s.split(",")):
                    utility, evicted, late = [], [], []
                    for seed, (asked, usual) in alone.items():
                        drawn_N = np.random.default_rng([seed, 2]).random(len(asked)) < share
                        mixed = [
                            replace(query, deadline_s=query.arrival_s + latency_s) if drawn else query
                            for query, drawn in zip(asked, drawn_N.tolist(), strict=True)
                        ]
                        run = served(measured, policy, mixed, seed)
                        hasty = [outcome for outcome, drawn in zip(run.outcomes, drawn_N, strict=True) if not drawn]
                        utility.append(run.expected_utility / usual.expected_utility)
                        evicted.append(hasty.count(Outcome.EVICTED) / len(hasty))
                        late.append(run.share(Outcome.LATE))
                    row = {"policy": policy, "load": load, "patient": share, "latency_s": latency_s}
                    row |= {"utility": utility, "others_evicted": evicted, "late": late}
                    row["others_evicted_alone"] = [usual.share(Outcome.EVICTED) for _, usual in alone.values()]
                    report.rows.append(row)

    def listed(key: str, scale: float, digits: int) -> Callable[[dict[str, Any]], str]:
        return lambda row: " / ".join(f"{scale * value:.{digits}f}" for value in row[key])

    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "policy": lambda row: str(row["policy"]),
        "load": lambda row: f"{row['load']:g}",
        "patient": lambda row: (
            (f"{row['burst']} at once" if bursts else f"{row['patient']:.0%}") + f" of {row['latency_s']:g} s"
        ),
        "utility, of all" if bursts else "utility over that with nobody patient": listed("utility", 1, 3),
        **({"of those at once in time, %": listed("in_time", 100, 1)} if bursts else {}),
        "others evicted, %": listed("others_evicted", 100, 1),
        "with nobody patient, %": listed("others_evicted_alone", 100, 1),
        "late, %": listed("late", 100, 2),
    }
    report.finish(columns, out)


if __name__ == "__main__":
    typer.run(main)
