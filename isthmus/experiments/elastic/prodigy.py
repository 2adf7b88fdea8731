"""The five systems of Prodigy's chapter on its own loads, simulated (figures 4.9 and 4.10).

The loads are 1 to 700 queries per second (Poisson, the rate walks at random) and a recorded trace moved and stretched
to 100 to 300. Rates are scaled by what the machine serves at gamma 0 (the paper's: 365 per second), and the latency
limit of 0.1 s by the inverse, so that a slower machine meets the same task. Every right answer in time counts alike.

Clipper runs all tokens. The others follow the chapter's rule (the smallest reduction number that serves the load) with
their own accuracies: vanilla weights (OTAS), the model tuned for the largest number (Maxprune), one model per number
(Exhaustive), and the planner's models with averages (Prodigy). "Prodigy, priced" is our policy on Prodigy's models.
"""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from isthmus.cloud.elastic.policies.by_name import make_policy
from isthmus.cloud.elastic.scheduling.engine import Engine
from isthmus.cloud.elastic.scheduling.profile import Profile
from isthmus.cloud.elastic.scheduling.query import Outcome, Query
from isthmus.cloud.elastic.scheduling.simulate import Run, draws, simulate
from isthmus.cloud.elastic.scheduling.workload import QueryKind, make_queries, poisson_arrivals, rates_of_counts
from isthmus.data.files import read_text, write_atomically
from isthmus.data.traces import read_trace
from isthmus.distill.figures import png

Floats = npt.NDArray[np.float64]
Report = Callable[[str], None]

PAPER_PER_S: Final = 365.0
LIMIT_S: Final = 0.1
POISSON: Final = "1 to 700, Poisson"
RECORDED: Final = "100 to 300, recorded"
SYSTEMS: Final[Mapping[str, tuple[str, str]]] = {
    "Clipper": ("clipper", "clipper"),
    "OTAS": ("otas", "throughput"),
    "Maxprune": ("maxprune", "throughput"),
    "Exhaustive": ("exhaustive", "throughput"),
    "Prodigy": ("prodigy+soups", "throughput"),
    "Prodigy, priced": ("prodigy+soups", "priced"),
}
"""System: the method whose accuracies it has (as 'isthmus elastic warmup evaluate' names them), and its policy."""
PERCENTS: Final = (1, *range(5, 100, 5), 99)


@dataclass(frozen=True)
class Setup:
    """``warmed`` is the result.json of 'isthmus elastic warmup evaluate', ``profile`` measured at its numbers."""

    profile: Path
    warmed: Path
    trace: Path
    seconds: int = 600
    window_s: float = 120.0


def walk(rng: np.random.Generator, low: float, high: float, seconds: int) -> Floats:
    """Returns a random walk of the rate, reflected at ``low`` and ``high``."""
    span = high - low
    steps_T: Floats = np.mod(rng.uniform(0, span) + np.cumsum(rng.normal(0, 0.08 * span, seconds)), 2 * span)
    return low + np.minimum(steps_T, 2 * span - steps_T)


def between(rates_T: Floats, low: float, high: float) -> Floats:
    """Returns the rates moved and stretched to the range from ``low`` to ``high``. Raises ValueError if all are equal.

    >>> between(np.array([2.0, 4.0, 3.0]), 100, 300).tolist()
    [100.0, 300.0, 200.0]
    """
    if not np.ptp(rates_T) > 0:
        raise ValueError(
            "the recorded trace has the same rate in every second: name a longer one, or another --window-s"
        )
    stretched_T: Floats = low + (high - low) * (rates_T - rates_T.min()) / np.ptp(rates_T)
    return stretched_T


def accuracies(warmed: Mapping[str, Any], method: str) -> dict[int, float]:
    """Returns the mean accuracy over the seeds of tuning, by gamma."""
    found = [each["accuracy"][method] for each in warmed["seeds"]]
    return {-int(number): float(np.mean([of[number] for of in found])) for number in found[0]}


def believed(profile: Profile, task: str, shares: Mapping[int, float]) -> Profile:
    """Returns the measured times with the accuracies of one method. Raises ValueError without a common gamma 0."""
    gammas = tuple(gamma for gamma in profile.gammas if gamma in shares)
    if 0 not in gammas:
        raise ValueError("the profile and the warmed models have no gamma 0 in common: measure it at their numbers")
    return replace(
        profile,
        gammas=gammas,
        accuracy={task: {gamma: shares[gamma] for gamma in gammas}},
        latency_s={gamma: profile.latency_s[gamma] for gamma in gammas},
        memory={},
        schedules={},
        models={},
    )


def run(setup: Setup, *, seeds: Sequence[int], out: Path, report: Report) -> dict[str, Any]:
    """Serves both loads with every system, writes ``out/result.json``, ``.md`` and pictures, and returns the result.

    Raises ValueError for a profile and warmed models that do not belong together, BadProfile, TraceError and OSError.
    """
    measured = Profile.from_json(read_text(setup.profile))
    warmed = json.loads(read_text(setup.warmed))
    task = str(warmed["task"])
    scale = measured.capacity_per_s(0) / PAPER_PER_S
    kind = QueryKind(task, LIMIT_S / scale, 1.0)
    recorded_T = rates_of_counts(read_trace(setup.trace), setup.window_s)[: setup.seconds]
    loads: dict[str, Callable[[np.random.Generator], Floats]] = {
        POISSON: lambda rng: walk(rng, 1, 700, setup.seconds),
        RECORDED: lambda rng: between(recorded_T, 100, 300),
    }
    profiles = {name: believed(measured, task, accuracies(warmed, of)) for name, (of, _) in SYSTEMS.items()}
    rows: list[dict[str, Any]] = []
    for load, rates_of in loads.items():
        for seed in seeds:
            rng = np.random.default_rng(seed)
            queries = make_queries(rng, poisson_arrivals(rng, scale * rates_of(rng)), (kind,))
            luck_N = draws(np.random.default_rng([seed, 1]), len(queries))
            for name, (_, policy) in SYSTEMS.items():
                profile = profiles[name]
                served = simulate(Engine(profile, make_policy(policy, profile)), queries, luck_N)
                rows.append({"load": load, "seed": seed, "system": name, **_row(served, queries)})
            report(f"{load}, seed {seed}: {len(queries)} queries")
    result: dict[str, Any] = {
        "what": "Prodigy's chapter: five systems on its two loads, simulated",
        "profile": setup.profile.name,
        "trace": setup.trace.stem,
        "task": task,
        "seconds": {POISSON: setup.seconds, RECORDED: len(recorded_T)},
        "limit_s": kind.latency_s,
        "scale": scale,
        "seeds": list(seeds),
        "accuracy": {
            name: {str(gamma): share for gamma, share in of.accuracy[task].items()} for name, of in profiles.items()
        },
        "rows": rows,
    }
    plain: dict[str, Any] = json.loads(json.dumps(result))
    write_atomically(out / "result.json", json.dumps(plain))
    write_atomically(out / "result.md", markdown(plain))
    draw(plain, out)
    return plain


def _row(served: Run, queries: Sequence[Query]) -> dict[str, Any]:
    right = [outcome is Outcome.CORRECT_IN_TIME for outcome in served.outcomes]
    arrivals = [int(query.arrival_s) for query in queries]
    counts_T = np.bincount(arrivals, weights=right)
    ran = len(served.waits_s)
    latencies_s = np.percentile(served.latencies_s, PERCENTS) if ran else np.zeros(len(PERCENTS))
    return {
        "queries": len(queries),
        "right": sum(right),
        "seconds": max(arrivals, default=0) + 1,
        "late": served.share(Outcome.LATE),
        "evicted": served.share(Outcome.EVICTED),
        "ran": ran / max(1, len(queries)),
        "right_per_s": counts_T.astype(int).tolist(),
        "arriving_per_s": np.bincount(arrivals).tolist(),
        "latency_s": {str(percent): round(float(at), 5) for percent, at in zip(PERCENTS, latencies_s, strict=True)},
    }


def _of(result: Mapping[str, Any], load: str, system: str) -> list[Mapping[str, Any]]:
    return [row for row in result["rows"] if (row["load"], row["system"]) == (load, system)]


def markdown(result: Mapping[str, Any]) -> str:
    """Returns the table: means over seeds; "over OTAS" is paired, with the least of the seeds in brackets."""
    lines = ["| queries per second | system | right in time, per s | of all | late | evicted | over OTAS (least) | "]
    lines[0] += "latency, 50 / 95 / 99 %, ms |"
    lines.append("| --- |" + " --- |" * 7)
    for load in (POISSON, RECORDED):
        vanilla = _of(result, load, "OTAS")
        for name in SYSTEMS:
            rows = _of(result, load, name)
            ratios = [row["right"] / max(1, base["right"]) for row, base in zip(rows, vanilla, strict=True)]
            late, evicted, share, rate = (
                statistics.fmean(of)
                for of in zip(
                    *(
                        (
                            row["late"],
                            row["evicted"],
                            row["right"] / max(1, row["queries"]),
                            row["right"] / row["seconds"],
                        )
                        for row in rows
                    ),
                    strict=True,
                )
            )
            times = " / ".join(
                f"{1e3 * statistics.fmean(row['latency_s'][percent] for row in rows):.0f}"
                for percent in ("50", "95", "99")
            )
            lines.append(
                f"| {load} | {name} | {rate:.1f} | {share:.1%} | {late:.1%} | {evicted:.1%} | "
                f"{statistics.fmean(ratios):.3f} ({min(ratios):.3f}) | {times} |"
            )
    return "\n".join(lines) + "\n"


def draw(result: Mapping[str, Any], out: Path) -> list[Path]:
    """Draws throughput of right answers in time (4.9) and the latency's distribution (4.10), one picture per load."""
    from matplotlib.figure import Figure

    written = []
    for load, stem in ((POISSON, "poisson"), (RECORDED, "recorded")):
        seed = result["seeds"][0]
        figure = Figure(figsize=(11, 4.2), layout="constrained")
        bars, lines = figure.subplots(1, 2, width_ratios=(1, 1.6))
        means = [statistics.fmean(row["right"] / row["seconds"] for row in _of(result, load, name)) for name in SYSTEMS]
        bars.barh(list(SYSTEMS), means, color=[f"C{place}" for place in range(len(SYSTEMS))])
        bars.set(xlabel="right in time, per second", title="mean over seeds")
        for place, name in enumerate(SYSTEMS):
            row = next(row for row in _of(result, load, name) if row["seed"] == seed)
            if not place:
                lines.plot(_smooth(row["arriving_per_s"]), color="grey", linewidth=1, label="arriving")
            lines.plot(_smooth(row["right_per_s"]), color=f"C{place}", linewidth=1, label=name)
        lines.set(xlabel="s", ylabel="queries per second", title=f"right in time, by arrival, seed {seed}")
        lines.grid(alpha=0.3)
        figure.legend(*lines.get_legend_handles_labels(), fontsize=8, loc="outside right upper")
        figure.suptitle(f"Throughput, {load}")
        written.append(out / f"throughput-{stem}.png")
        write_atomically(written[-1], png(figure))

        figure = Figure(figsize=(7, 4.2), layout="constrained")
        axes = figure.subplots()
        for name in SYSTEMS:
            rows = _of(result, load, name)
            ran = statistics.fmean(row["ran"] for row in rows)
            at_ms = [1e3 * statistics.fmean(row["latency_s"][str(percent)] for row in rows) for percent in PERCENTS]
            axes.plot(at_ms, [ran * percent / 100 for percent in PERCENTS], label=name)
        axes.axvline(1e3 * result["limit_s"], color="black", linestyle="--", linewidth=1, label="limit")
        axes.set(xlabel="arrival to answer, ms", ylabel="share of all queries", title=f"Latency, {load}", ylim=(0, 1))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
        written.append(out / f"latency-{stem}.png")
        write_atomically(written[-1], png(figure))
    return written


def _smooth(counts: Sequence[int]) -> Floats:
    """Returns a moving average over five seconds, where there are as many."""
    width = min(5, len(counts))
    return np.convolve(counts, np.full(width, 1 / width), mode="valid")
