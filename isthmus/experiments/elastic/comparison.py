"""Every policy of elastic serving on the same queries, simulated: profiles x traces x loads x seeds, and their bound.

At load 1 the mean rate of the trace equals what the machine serves at gamma 0 in full batches. The compared figure is
the expected utility (profiled accuracy x utility, summed over answers in time), because the clairvoyant bound limits
that. The drawn utility is reported beside it. Resumable: each finished cell is kept as JSON, and made again if the
profile or the trace of its name has changed.
"""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from isthmus import __version__
from isthmus.cloud.elastic.policies.by_name import POLICIES, make_policy
from isthmus.cloud.elastic.policies.infaas import memory_named, simulated
from isthmus.cloud.elastic.scheduling.bound import clairvoyant_bound
from isthmus.cloud.elastic.scheduling.engine import Engine
from isthmus.cloud.elastic.scheduling.policy import EPSILON
from isthmus.cloud.elastic.scheduling.profile import MachineKey, Profile, paper_profile
from isthmus.cloud.elastic.scheduling.query import Outcome, Query
from isthmus.cloud.elastic.scheduling.simulate import Run, draws, simulate
from isthmus.cloud.elastic.scheduling.workload import queries_at_load, rates_of_counts, wandering_rates
from isthmus.data.cache.keys import digest
from isthmus.data.files import read_text, write_atomically
from isthmus.data.made_by import made_by
from isthmus.data.traces import read_trace
from isthmus.experiments.elastic.figures import draw_all

Floats = npt.NDArray[np.float64]
Report = Callable[[str], None]

LOADS: Final = (0.5, 1.0, 1.5, 2.0)
OURS: Final = ("priced", "exact", "otas")
SYNTHETIC: Final = "synthetic"
LITTLE_INFAAS: Final = "infaas:1.04"
"""INFaaS with room for one base model per task; "infaas" has the memory of the paper's machine."""


@dataclass(frozen=True)
class Workload:
    """One trace at one load and seed. ``trace``: "synthetic", or a file in a format of data/traces.py. ``window_s``:
    seconds of trace replayed per second."""

    trace: str
    load: float
    seed: int
    duration_s: float = 60.0
    window_s: float = 60.0


@dataclass(frozen=True)
class Row:
    """The result of one policy on one workload. Shares are of all queries; ``of_bound`` is of the clairvoyant bound."""

    policy: str
    expected_utility: float
    utility: float
    of_bound: float
    shares: Mapping[str, float]
    batch_accuracy: float
    batch_size: float
    wait_s: float
    run_s: float


def modelled_profile() -> Profile:
    """Return the profile of a small ViT (65 tokens, 6 layers), predicted from operations: 420 images/s at gamma 0.

    Not measured. It represents a machine with little cost per batch, and a model that loses little by merging.
    ``isthmus elastic profile`` measures a real one.
    """
    gammas = (-32, -24, -16, -8, -4, 0, 2, 4)
    tokens, depth, sizes = 65, 6, (1, 64)

    def operations(gamma: int) -> float:
        left, total = tokens, 0.0
        for _ in range(depth):
            entered = left = left + max(gamma, 0)
            left = max(2, left - min(max(-gamma, 0), (left - 1) // 2))
            total += entered / 3 + left * 2 / 3
        return total

    seconds = {gamma: operations(gamma) / operations(0) / 420 for gamma in gammas}
    accuracy = {
        "ten classes": (0.58, 0.628, 0.665, 0.676, 0.679, 0.680, 0.683, 0.685),
        "animals or vehicles": (0.90, 0.925, 0.945, 0.952, 0.953, 0.955, 0.956, 0.957),
        "means of travel": (0.74, 0.78, 0.81, 0.82, 0.822, 0.825, 0.828, 0.83),
    }
    return Profile(
        key=MachineKey("modelled", "cpu", 1, "unknown", "ViT of 65 tokens"),
        gammas=gammas,
        sizes=sizes,
        accuracy={task: dict(zip(gammas, shares, strict=True)) for task, shares in accuracy.items()},
        latency_s={gamma: tuple(0.0025 + size * each_s for size in sizes) for gamma, each_s in seconds.items()},
    )


def load_profile(name: str) -> Profile:
    """Return the profile called ``paper`` or ``modelled``, or read a profile's JSON. Raises BadProfile or OSError."""
    built_in: dict[str, Callable[[], Profile]] = {"paper": paper_profile, "modelled": modelled_profile}
    return built_in[name]() if name in built_in else Profile.from_json(read_text(Path(name)))


def queries_of(workload: Workload, profile: Profile) -> list[Query]:
    """Return the workload's queries, scaled to the machine of ``profile``. Raises TraceError or OSError."""
    rng = np.random.default_rng(workload.seed)
    if workload.trace == SYNTHETIC:
        rates_T = wandering_rates(rng, workload.duration_s)
    else:
        rates_T = rates_of_counts(read_trace(Path(workload.trace)), workload.window_s)
    return queries_at_load(rng, rates_T, workload.load, profile)


def policies_for(profile: Profile) -> list[str]:
    return [*POLICIES, "infaas", LITTLE_INFAAS, *(f"fixed:{gamma}" for gamma in profile.gammas)]


def serve(name: str, profile: Profile, queries: Sequence[Query], seed: int) -> Run:
    """Simulate one policy. All policies get the same random draws. Raises ValueError for an unknown name."""
    luck_N = draws(np.random.default_rng([seed, 1]), len(queries))
    if (memory_bytes := memory_named(name)) is not None:
        # Its batches include loading time, which the profile does not contain.
        sizes, policy, executor = simulated(profile, memory_bytes)
        return simulate(Engine(sizes, policy, adapts=False), queries, luck_N, executor)
    return simulate(Engine(profile, make_policy(name, profile)), queries, luck_N)


def row_of(name: str, run: Run, bound: float) -> Row:
    sizes = [batch.size for batch in run.batches]
    return Row(
        policy=name,
        expected_utility=round(run.expected_utility, 4),
        utility=round(run.utility, 4),
        of_bound=round(run.expected_utility / bound, 6) if bound else 1.0,
        shares={outcome.value: round(run.share(outcome), 6) for outcome in Outcome if run.share(outcome)},
        batch_accuracy=round(np.average([batch.accuracy for batch in run.batches], weights=sizes), 5) if sizes else 0.0,
        batch_size=round(statistics.mean(sizes), 3) if sizes else 0.0,
        wait_s=round(statistics.median(run.waits_s), 5) if run.waits_s else 0.0,
        run_s=round(statistics.median(batch.end_s - batch.start_s for batch in run.batches), 5) if sizes else 0.0,
    )


def run(
    profiles: Sequence[str],
    traces: Sequence[str],
    *,
    loads: Sequence[float] = LOADS,
    seeds: Sequence[int],
    out: Path,
    report: Report,
    duration_s: float = 60.0,
    window_s: float = 60.0,
    policies: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Run the missing cells, write ``out/result.json`` and ``.md``, and return the whole result."""
    made = made_by(out, report)
    cells: list[dict[str, Any]] = []
    for profile_name in profiles:
        profile = load_profile(profile_name)
        for trace in traces:
            for load in loads:
                for seed in seeds:
                    workload = Workload(trace, load, seed, duration_s, window_s)
                    cells.append(_cell(profile_name, profile, workload, policies, out))
                    best = max(cells[-1]["rows"], key=lambda row: row["expected_utility"])
                    report(
                        f"{_short(profile_name)}, {_short(trace)}, load {load:g}, seed {seed}: best {best['policy']}, "
                        f"{best['of_bound']:.3f} of the bound"
                    )
    result = {
        "what": "utility of every policy, simulated",
        "code": made,
        "versions": {"isthmus": __version__, "numpy": np.__version__},
        "profiles": [_short(name) for name in profiles],
        "traces": [_short(trace) for trace in traces],
        "loads": list(loads),
        "seeds": list(seeds),
        "duration_s": duration_s,
        "window_s": window_s,
        "epsilon": EPSILON,
        "cells": cells,
    }
    write_atomically(out / "result.json", json.dumps(result))
    write_atomically(out / "result.md", markdown(result))
    return result


def draw(profile_name: str, workload: Workload, out: Path, policies: Sequence[str] | None = None) -> list[Path]:
    """Draw all pictures of one workload, with every policy. Returns the files written below ``out``."""
    profile = load_profile(profile_name)
    queries = queries_of(workload, profile)
    names = policies if policies is not None else [*POLICIES, "infaas"]
    runs = {name: serve(name, profile, queries, workload.seed) for name in names}
    return draw_all(out, profile, queries, runs, clairvoyant_bound(queries, profile, EPSILON), names[0])


def _cell(
    profile_name: str, profile: Profile, workload: Workload, policies: Sequence[str] | None, out: Path
) -> dict[str, Any]:
    names = list(policies) if policies is not None else policies_for(profile)
    asked = {**asdict(workload), "trace": _short(workload.trace), "profile": _short(profile_name), "policies": names}
    asked["inputs"] = digest([profile.to_json(), _content(workload.trace)])[:16]
    stem = f"{asked['profile']}-{asked['trace']}-{workload.load:g}-{workload.seed}"
    path = out / "cells" / f"{stem}.json"
    if path.exists():
        kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        # Cells of before inputs were noted are taken by their names; the folder's record says that others made them.
        if {"inputs": asked["inputs"], **{key: kept[key] for key in asked if key in kept}} == asked:
            return kept
    queries = queries_of(workload, profile)
    bound = clairvoyant_bound(queries, profile, EPSILON)
    rows = [asdict(row_of(name, serve(name, profile, queries, workload.seed), bound)) for name in names]
    cell = {
        **asked,
        "queries": len(queries),
        "bound": bound,
        "possible": sum(query.utility for query in queries),
        "rows": rows,
    }
    write_atomically(path, json.dumps(cell, indent=1))
    return cell


def _content(trace: str) -> str:
    return trace if trace == SYNTHETIC else read_text(Path(trace))


def _short(name: str) -> str:
    return Path(name).stem


def markdown(result: Mapping[str, Any]) -> str:
    """Return tables: shares of the bound by policy and load (mean and minimum over seeds), then ours to others."""
    lines = []
    for profile in result["profiles"]:
        for trace in result["traces"]:
            lines += _table(result, profile, trace)
    return "\n".join(lines) + "\n"


def _table(result: Mapping[str, Any], profile: str, trace: str) -> list[str]:
    by_load = {
        load: [
            {row["policy"]: row["of_bound"] for row in cell["rows"]}
            for cell in result["cells"]
            if (cell["profile"], cell["trace"], cell["load"]) == (profile, trace, load)
        ]
        for load in result["loads"]
    }
    names = list(dict.fromkeys(name for cells in by_load.values() for cell in cells for name in cell))
    lines = [f"### {profile} profile, {trace}: share of the clairvoyant bound, mean (minimum) over seeds", ""]
    lines += [f"| policy | {' | '.join(f'load {load:g}' for load in by_load)} |", f"| --- |{' --- |' * len(by_load)}"]
    for name in names:
        utilities = [[cell[name] for cell in cells] for cells in by_load.values()]
        lines.append(f"| {name} | {' | '.join(f'{statistics.mean(of):.3f} ({min(of):.3f})' for of in utilities)} |")
    for rival, label in (
        ("pets", "PetS"),
        ("fixed:0", "gamma 0"),
        ("infaas", "INFaaS"),
        (LITTLE_INFAAS, "INFaaS with 1.04 GB"),
        ("fixed", "best fixed gamma"),
    ):
        ratios = []
        for cells in by_load.values():
            if "priced" not in names or not (rival in names or rival == "fixed"):
                continue
            if rival == "fixed":
                fixed = [name for name in names if name.startswith("fixed:")]
                other = max((statistics.mean(cell[name] for cell in cells) for name in fixed), default=0.0)
            else:
                other = statistics.mean(cell[rival] for cell in cells)
            ours = statistics.mean(cell["priced"] for cell in cells)
            ratios.append(f"{ours / other:.3f}" if other else "-")
        if ratios:
            lines.append(f"| priced over {label} | {' | '.join(ratios)} |")
    return [*lines, ""]
