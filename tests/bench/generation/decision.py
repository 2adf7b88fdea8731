"""How long one decision takes with 1,000 requests waiting and 64 running, by policy.

python -m tests.bench.generation.decision --out decision.json
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np

from isthmus.cloud.generation.policies.by_name import POLICIES, learning_lengths, make_policy
from isthmus.cloud.generation.scheduling.engine import Engine
from isthmus.cloud.generation.scheduling.policy import Life, Limits
from isthmus.cloud.generation.scheduling.profile import reference_profile
from isthmus.cloud.generation.scheduling.step import Drawn
from isthmus.cloud.generation.scheduling.workload import at_load, lmaas_sizes, poisson_gaps
from tests.bench.harness import Report, Spread, shown

RUNNING, WAITING = 64, 1_000


def decisions(policy: str, steps: int, running: int = RUNNING, waiting: int = WAITING) -> list[float]:
    """Returns the processor seconds of each of ``steps`` decisions, after the rows have filled up."""
    profile, count = reference_profile(), running + waiting + steps
    rng = np.random.default_rng(0)
    made = at_load(lmaas_sizes(rng, count), poisson_gaps(rng, count), 1.0, profile)
    lengths = learning_lengths(policy)
    for request, length in zip(made.requests[:200], made.lengths, strict=False):
        lengths.learn(Life(request, [0] * length, whole=True))
    limits = Limits(rows=running, blocks=64 * running)
    engine = Engine(profile, make_policy(policy, lengths), limits, max_requests=count, expires=False, adapts=False)
    now_s, coming, took_s = 0.0, 0, []
    while len(took_s) < steps:
        while engine.under_way < running + waiting and coming < count:
            engine.submit(made.requests[coming], now_s)
            coming += 1
        began_s = time.process_time()
        step = engine.next_step(now_s).step
        spent_s = time.process_time() - began_s
        assert step is not None, "with requests waiting there is something to run"
        if len(step.rows) >= min(running, 16) or engine.under_way < running:
            took_s.append(spent_s)
        now_s += step.predicted_s
        # Answers never end, so that as many run and wait at every decision.
        engine.finished(step, {row.id: Drawn(0) for row in step.rows if row.draws}, now_s)
    return took_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    report = Report("decisions", {"running": RUNNING, "waiting": WAITING, "steps": asked.steps})
    for policy in POLICIES:
        if policy not in ("static", "magnus"):
            report.rows.append({"policy": policy, "seconds": Spread.of(decisions(policy, asked.steps)).to_json()})
    columns: dict[str, Any] = {
        "policy": lambda row: row["policy"],
        "ms of processor time": lambda row: shown(row["seconds"], 1e3),
    }
    report.finish(columns, asked.out)


if __name__ == "__main__":
    main()
