"""Time of one planning step over a long queue, by policy and for the planners alone. The goal is 2 ms."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from isthmus.cloud.elastic.policies.batching import BatchingRule
from isthmus.cloud.elastic.policies.otas import HORIZON, LABELS, Otas, Planner
from isthmus.cloud.elastic.policies.planning import Candidate, alg2, alg3, exact
from isthmus.cloud.elastic.policies.priced import Priced
from isthmus.cloud.elastic.scheduling.policy import Policy
from isthmus.cloud.elastic.scheduling.profile import Profile, paper_profile
from isthmus.cloud.elastic.scheduling.query import Query
from isthmus.cloud.elastic.scheduling.workload import PAPER_KINDS
from tests.bench.harness import Report, interleaved, shown

GOAL_S = 2e-3
NOW_S = 0.1


def waiting(rng: np.random.Generator, batches: int, size: int) -> list[Query]:
    """Return queries that Alg. 1 with ``epsilon`` = ``size`` puts into ``batches`` batches, due in the next seconds."""
    queries = []
    for id in range(batches * size):
        kind = PAPER_KINDS[int(rng.integers(0, len(PAPER_KINDS)))]
        latency_s = kind.latency_s + 2.0 * id / (batches * size)
        queries.append(Query(id, kind.task, 0.0, latency_s, kind.utility))
    return queries


def candidates(rng: np.random.Generator, profile: Profile, queries: list[Query], size: int) -> list[Candidate]:
    """Return the same queries as a planner's input: ``size`` per batch, in the order of their deadlines."""
    times_G = np.array([profile.batch_time_s(gamma, size) for gamma in profile.gammas])
    made = []
    ordered = sorted(queries, key=lambda query: query.deadline_s)
    for start in range(0, len(ordered), size):
        batch = ordered[start : start + size]
        gains_NG = np.array(
            [[profile.accuracy_of(query.task, gamma) * query.utility for gamma in profile.gammas] for query in batch]
        )
        utility = float(np.mean([query.utility for query in batch]))
        made.append(Candidate.of(np.array([query.deadline_s for query in batch]), gains_NG, times_G, utility))
    return made


def main(
    batches: int = 200,
    size: int = 8,
    repeats: int = 30,
    out: Annotated[Path | None, typer.Option(help="Write the results to this JSON file.")] = None,
) -> None:
    """Time one planning step for ``batches`` queued batches of ``size`` queries and 8 gammas."""
    profile = paper_profile()
    rng = np.random.default_rng(0)
    queries = waiting(rng, batches, size)
    queue = candidates(rng, profile, queries, size)

    def deciding(policy: Policy) -> Callable[[], object]:
        policy.use(profile)
        for query in queries:
            policy.arrived(query)
        return lambda: policy.choose(NOW_S)

    # Alg. 1 must make exactly this many batches: only their size separates them.
    rule = BatchingRule(epsilon=size, eta_s=10.0, mu=10.0)
    found = {
        "priced: the whole decision": deciding(Priced(size)),
        "exact: the whole decision": deciding(Otas(Planner.EXACT, rule)),
        "otas: the whole decision": deciding(Otas(Planner.PAPER, rule)),
        f"exact planner, first {HORIZON} batches": lambda: exact(queue[:HORIZON], NOW_S, most_labels=LABELS),
        "exact planner, all batches": lambda: exact(queue, NOW_S),
        "Alg. 2, all batches": lambda: alg2(queue, NOW_S),
        "Alg. 3, all batches": lambda: alg3(queue, NOW_S, 4),
    }
    report = Report(
        "planning", {"batches": batches, "size": size, "gammas": len(profile.gammas), "repeats": repeats, "seed": 0}
    )
    report.floors = {"goal, s": GOAL_S}
    for what, timing in interleaved(found, repeats=repeats).items():
        report.rows.append({"what": what, **timing.to_json(), "of_goal": timing.cpu_s.median / GOAL_S})
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "what": lambda row: str(row["what"]),
        "CPU ms, median (quartiles)": lambda row: shown(row["cpu_s"], 1e3),
        "wall ms": lambda row: shown(row["wall_s"], 1e3),
        "of the goal": lambda row: f"{row['of_goal']:.2f}",
    }
    report.finish(columns, out)


if __name__ == "__main__":
    typer.run(main)
