"""Elastic serving with warmed models against the vanilla model: the same queries, policies and times, simulated.

Both sides use the same measured profile except for the accuracies: the vanilla model's on one side, the best warmed
model's at each gamma on the other. The difference is the value of warm-up in serving. The work is done by
``comparison.run``, so it is resumable.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from isthmus.cloud.elastic.scheduling.profile import Profile
from isthmus.cloud.elastic.warm.profiled import VANILLA, Profiled, warmed_profile
from isthmus.cloud.elastic.warm.store import WarmStore
from isthmus.data.files import write_atomically
from isthmus.distill.figures import png
from isthmus.experiments.elastic import comparison
from isthmus.experiments.elastic.comparison import Report, Workload

POLICIES: Final = ("priced", "exact", "otas", "throughput", "clipper")
LOADS: Final = (1.0, 1.5, 2.0)
SIDES: Final = ("vanilla", "warmed")


def both_profiles(profile: Profile, task: str, models: Profiled) -> dict[str, Profile]:
    """Return the machine's profile with only this task, once with the vanilla accuracies and once with the warmed ones.

    Raises ValueError if the store holds no vanilla model, or was not profiled at a gamma up to 0.
    """
    if VANILLA not in models.accuracy:
        raise ValueError("the store holds no vanilla model to compare with: 'isthmus elastic warmup run' keeps one")
    warmed = warmed_profile(replace(profile, accuracy={}, models={}), task, models)
    vanilla = {gamma: models.accuracy[VANILLA][-gamma] if gamma <= 0 else 0.0 for gamma in profile.gammas}
    return {"vanilla": replace(warmed, accuracy={task: vanilla}, models={}), "warmed": warmed}


def run(
    profile: Path,
    warm: Path,
    traces: Sequence[str],
    *,
    loads: Sequence[float] = LOADS,
    seeds: Sequence[int],
    out: Path,
    report: Report,
    duration_s: float = 60.0,
    window_s: float = 60.0,
    policies: Sequence[str] = POLICIES,
) -> dict[str, Any]:
    """Run the missing cells, write ``out/result.json``, ``.md`` and the pictures, and return the result."""
    store = WarmStore(warm)
    sides = both_profiles(comparison.load_profile(str(profile)), store.common().task, store.profiled())
    for side, of in sides.items():
        write_atomically(out / "profiles" / f"{side}.json", of.to_json())
    paths = [str(out / "profiles" / f"{side}.json") for side in SIDES]
    found = comparison.run(
        paths,
        traces,
        loads=loads,
        seeds=seeds,
        out=out / "simulated",
        report=report,
        duration_s=duration_s,
        window_s=window_s,
        policies=policies,
    )
    result = {
        "what": "served with warmed models against the vanilla one, simulated",
        "task": store.common().task,
        "reducer": store.common().reducer,
        "policies": list(policies),
        "accuracy": {side: of.accuracy[store.common().task] for side, of in sides.items()},
        "models": sides["warmed"].models[store.common().task],
        **{
            key: found[key]
            for key in ("code", "traces", "loads", "seeds", "duration_s", "window_s", "versions", "cells")
        },
    }
    plain: dict[str, Any] = json.loads(json.dumps(result))
    write_atomically(out / "result.json", json.dumps(plain))
    write_atomically(out / "result.md", markdown(plain))
    for trace in traces:
        workload = Workload(trace, loads[-1], seeds[0], duration_s, window_s)
        draw_latencies(sides, workload, policies, out / "pictures" / f"latency-{Path(trace).stem}.png")
    return plain


def markdown(result: Mapping[str, Any]) -> str:
    """Return tables of warmed over vanilla by trace, policy and load: mean and minimum over seeds."""
    lines: list[str] = []
    for trace in result["traces"]:
        for key, label in (("correct", "correct in time, share of all queries"), ("utility", "expected utility")):
            loads = [f"load {load:g}" for load in result["loads"]]
            lines += [f"### {result['task']}, {trace}: {label}; vanilla, warmed, warmed over vanilla (minimum)", ""]
            lines += [f"| policy | {' | '.join(loads)} |", f"| --- |{' --- |' * len(loads)}"]
            for policy in result["policies"]:
                cells = [_cell(result, trace, policy, load, key) for load in result["loads"]]
                lines.append(f"| {policy} | {' | '.join(cells)} |")
            lines.append("")
    return "\n".join(lines)


def _cell(result: Mapping[str, Any], trace: str, policy: str, load: float, key: str) -> str:
    values = {
        side: [
            row["shares"].get("correct_in_time", 0.0) if key == "correct" else row["expected_utility"]
            for cell in result["cells"]
            if (cell["profile"], cell["trace"], cell["load"]) == (side, trace, load)
            for row in cell["rows"]
            if row["policy"] == policy
        ]
        for side in SIDES
    }
    ratios = [warmed / vanilla for vanilla, warmed in zip(*values.values(), strict=True) if vanilla]
    means = [statistics.fmean(of) for of in values.values()]
    if not ratios:
        return " ".join(f"{mean:.3g}" for mean in means)
    return f"{means[0]:.4g}, {means[1]:.4g}, {statistics.fmean(ratios):.3f} ({min(ratios):.3f})"


def draw_latencies(sides: Mapping[str, Profile], workload: Workload, policies: Sequence[str], path: Path) -> None:
    """Draw the CDF of the latency of every query that ran, by side and policy (figure 4.10)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5))
    axis = figure.subplots()
    for side, profile in sides.items():
        queries = comparison.queries_of(workload, profile)
        for place, policy in enumerate(policies):
            latencies_s = sorted(comparison.serve(policy, profile, queries, workload.seed).latencies_s)
            shares = [(rank + 1) / len(queries) for rank in range(len(latencies_s))]
            axis.plot(
                [1e3 * value for value in latencies_s],
                shares,
                color=f"C{place}",
                linestyle="-" if side == "warmed" else ":",
                label=f"{policy}, {side}",
            )
    axis.set(xlabel="arrival to answer, ms", ylabel="share of all queries", title=f"load {workload.load:g}")
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    figure.tight_layout()
    write_atomically(path, png(figure))
