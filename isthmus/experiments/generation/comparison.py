"""All cells of the experiment, run one after the other and kept as JSON, and what they show, beside the papers."""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from isthmus import __version__
from isthmus.cloud.generation.policies.by_name import POLICIES
from isthmus.data.files import read_text, write_atomically
from isthmus.experiments.generation.cells import (
    FLEETS,
    GOALS,
    PREDICTORS,
    PREFIXES,
    SWAP_POLICY,
    SWAPS,
    SYSTEM_TOKENS,
    Cell,
    run,
)

Report = Callable[[str], None]
Found = Sequence[Mapping[str, Any]]

FAIRNESS_LOAD: Final = 1.1
FAIRNESS_TIMES: Final = 4
"""Times as many requests as elsewhere: unfairness is between users who wait, and a queue takes time to grow."""
AZURE_LOAD: Final = 0.7
AZURE_POLICIES: Final = ("fused", "srpt", "jitserve", "paced")
FLEET_LOAD: Final = 0.9
NO_LENGTHS: Final = frozenset({"static", "orca", "baton", "fused", "vtc"})


def cells_of(
    policies: Sequence[str], loads: Sequence[float], seeds: Sequence[int], requests: int, trace: Path | None
) -> list[Cell]:
    """Returns the cells of an experiment, the ones that much depends on first."""
    found: list[Cell] = []
    for seed in seeds:
        for load in loads:
            for workload in ("lmaas", "chat"):
                found.append(Cell("bound", workload, load, seed, "bound", requests))
                found += [Cell("policy", workload, load, seed, policy, requests) for policy in policies]
                found += [Cell("policy", workload, load, seed, each, requests, "known") for each in ("paced", "magnus")]
            found += [Cell("prefix", "lmaas", load, seed, each, requests) for each in PREFIXES]
            found += [Cell("swap", "lmaas", load, seed, each, requests) for each in SWAPS]
        found += [
            Cell("fairness", "lmaas", FAIRNESS_LOAD, seed, each, FAIRNESS_TIMES * requests) for each in ("fused", "vtc")
        ]
        for workload in ("lmaas", "chat", *(() if trace is None else (str(trace),))):
            found += [Cell("prediction", workload, 1.0, seed, each, requests) for each in PREDICTORS]
        found += [Cell("fleet", "chat", FLEET_LOAD, seed, each, requests) for each in FLEETS]
        for workload in ("chat", *(() if trace is None else (str(trace),))):
            found += [Cell("placement", workload, 1.0, seed, each, requests) for each in GOALS]
    if trace is not None:
        found.append(Cell("bound", str(trace), AZURE_LOAD, 0, "bound", 1_000))
        found += [Cell("policy", str(trace), AZURE_LOAD, 0, policy, 1_000) for policy in AZURE_POLICIES]
        found += [Cell("swap", str(trace), AZURE_LOAD, 0, each, 1_000) for each in SWAPS]
    return [cell for cell in found if cell.kind != "policy" or cell.name in POLICIES]


def run_all(cells: Sequence[Cell], out: Path, report: Report) -> list[dict[str, Any]]:
    """Runs the cells that have no file yet, and returns the figures of all."""
    (out / "cells").mkdir(parents=True, exist_ok=True)
    found = []
    for at, cell in enumerate(cells, 1):
        file = out / "cells" / f"{cell.key}.json"
        if not file.is_file():
            report(f"{at} of {len(cells)}: {cell.key}")
            write_atomically(file, json.dumps({"version": __version__, **run(cell)}, indent=1) + "\n")
        found.append(json.loads(read_text(file)))
    return found


def of(found: Found, kind: str, workload: str, load: float, name: str, lengths: str = "warm") -> Found:
    """Returns the cells of one row, one per seed."""
    wanted = (kind, workload, load, name, lengths)
    return [
        each
        for each in found
        if (each["kind"], Path(each["workload"]).stem, each["load"], each["name"], each["lengths"]) == wanted
    ]


def spread(values: Sequence[float], form: str = ".2f") -> str:
    """Returns the median, with the least and the most.

    >>> spread([1.0, 2.0, 4.0])
    '2.00 (1.00 to 4.00)'
    """
    if not values:
        return ""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def median_of(cells: Found, *path: str) -> float | None:
    """Returns the median of a figure over seeds; None if no cell has it."""
    values = [value for cell in cells if (value := _value(cell, path)) is not None]
    return statistics.median(values) if values else None


def _value(cell: Mapping[str, Any], path: Sequence[str]) -> float | None:
    value: Any = cell
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    return None if value is None else float(value)


def _values(cells: Found, *path: str) -> list[float]:
    return [value for cell in cells if (value := _value(cell, path)) is not None]


def policy_rows(found: Found, workload: str, load: float) -> list[tuple[str, str, Found]]:
    """Returns (policy, what it knows of lengths, its cells) of one workload and load."""
    rows = []
    for name in POLICIES:
        for lengths in ("warm", "known"):
            cells = of(found, "policy", workload, load, name, lengths)
            if cells:
                rows.append((name, "none" if name in NO_LENGTHS else lengths, cells))
    return rows


def markdown(found: Found) -> str:
    """Returns the result as a page: a table per question, then each system beside its paper's claim."""
    parts = ["# Generation by simulation\n\nMedian over seeds, with least and most. A step takes the profile's time.\n"]
    loads = sorted({(Path(each["workload"]).stem, each["load"]) for each in found if each["kind"] == "policy"})
    head: Sequence[str]
    rows: list[Sequence[str]]
    for workload, load in loads:
        parts.append(f"\n## `{workload}`, load {load:g}\n")
        head = ("policy", "lengths", "tokens/s", "in time", "tokens in time", "mean s", "TTFT s", "rows", "preempted")
        rows = [
            (
                f"`{name}`",
                lengths,
                spread(_values(cells, "tokens_per_s"), ".0f"),
                spread(_values(cells, "goodput")),
                spread(_values(cells, "goodput_tokens")),
                spread(_values(cells, "latency_s", "mean"), ".1f"),
                spread(_values(cells, "ttft_s", "mean")),
                spread(_values(cells, "occupancy"), ".1f"),
                spread(_values(cells, "preempted"), ".0f"),
            )
            for name, lengths, cells in policy_rows(found, workload, load)
        ]
        bound = of(found, "bound", workload, load, "bound")
        goodput, mean_s = spread(_values(bound, "goodput")), spread(_values(bound, "mean_s"), ".1f")
        rows.append(("bound", "known", "", goodput, "", mean_s, "", "", ""))
        parts.append(_table(head, rows))
    parts.append("\n## One of five users sends 80 % of the requests\n")
    rows = [
        (
            f"`{name}`",
            spread(_values(cells, "light_ttft_s")),
            spread(_values(cells, "heavy_ttft_s")),
            spread(_values(cells, "tokens_per_s"), ".0f"),
            spread(_values(cells, "jain")),
        )
        for name in ("fused", "vtc")
        if (cells := of(found, "fairness", "lmaas", FAIRNESS_LOAD, name))
    ]
    parts.append(_table(("policy", "light users' TTFT s", "heavy user's TTFT s", "tokens/s", "Jain, tokens"), rows))
    parts.append(f"\n## Prompts that begin with {SYSTEM_TOKENS} tokens of their class, `fused`\n")
    rows = [
        (
            f"{load:g}",
            name,
            spread(_values(cells, "shared_share")),
            spread(_values(cells, "tokens_per_s"), ".0f"),
            spread(_values(cells, "goodput")),
            spread(_values(cells, "latency_s", "mean"), ".1f"),
            spread(_values(cells, "ttft_s", "mean")),
        )
        for load in sorted({each["load"] for each in found if each["kind"] == "prefix"})
        for name in PREFIXES
        if (cells := of(found, "prefix", "lmaas", load, name))
    ]
    head = ("load", "beginnings", "prompt tokens shared", "tokens/s", "in time", "mean s", "TTFT s")
    parts.append(_table(head, rows))
    parts.append(f"\n## Preempted requests, `{SWAP_POLICY}`: computed again, or swapped where that is sooner\n")
    rows = [
        (
            workload,
            f"{load:g}",
            name,
            spread(_values(cells, "swapped"), ".0f"),
            spread(_values(cells, "recomputed_tokens"), ".0f"),
            spread(_values(cells, "goodput")),
            spread(_values(cells, "ttft_s", "mean")),
            spread(_values(cells, "largest_gap_s", "p99")),
        )
        for workload, load in sorted({(Path(e["workload"]).stem, e["load"]) for e in found if e["kind"] == "swap"})
        for name in SWAPS
        if (cells := of(found, "swap", workload, load, name))
    ]
    head = ("workload", "load", "preempted ones are", "swapped", "tokens again", "in time", "TTFT s", "p99 of gaps s")
    parts.append(_table(head, rows))
    parts.append("\n## Predictors of lengths: the 0.9 quantile, in tokens\n")
    workloads = sorted({Path(each["workload"]).stem for each in found if each["kind"] == "prediction"})
    rows = [
        (
            workload,
            name,
            spread(_values(cells, "mean_length"), ".0f"),
            spread(_values(cells, "mean_error"), ".0f"),
            spread(_values(cells, "coverage")),
            spread(_values(cells, "mean_error_half"), ".0f"),
            spread(_values(cells, "coverage_half")),
            spread(_values(cells, "rank_correlation")),
        )
        for workload in workloads
        for name in PREDICTORS
        if (cells := of(found, "prediction", workload, 1.0, name))
    ]
    head = (
        "workload",
        "predictor",
        "length",
        "error",
        "covered",
        "error at half",
        "covered at half",
        "rank correlation",
    )
    parts.append(_table(head, rows))
    parts.append("\n## Four replicas, bursty conversations\n")
    rows = [
        (
            name,
            spread(_values(cells, "ttft_s", "mean")),
            spread(_values(cells, "ttft_s", "p99")),
            spread(_values(cells, "moves"), ".0f"),
            spread([1e3 * each for each in _values(cells, "longest_pause_s")], ".1f"),
            spread(_values(cells, "emptied_after_s"), ".1f"),
        )
        for name in FLEETS
        if (cells := of(found, "fleet", "chat", FLEET_LOAD, name))
    ]
    head = ("rules", "TTFT s", "TTFT p99 s", "moves", "longest pause ms", "emptied after s")
    parts.append(_table(head, rows))
    parts.append("\n## Two replicas: requests per second at which 90 % are in time\n")
    rows = [
        (workload, name, spread(_values(cells, "fused")), spread(_values(cells, "apart")))
        for workload in sorted({Path(each["workload"]).stem for each in found if each["kind"] == "placement"})
        for name in GOALS
        if (cells := of(found, "placement", workload, 1.0, name))
    ]
    parts.append(_table(("workload", "goals", "best of two fused", "one for prompts + one for decodes"), rows))
    parts.append("\n## Beside the papers\n")
    parts.append(_table(("system", "mechanism here", "ours", "theirs", "why they differ"), beside_papers(found)))
    return "\n".join(parts) + "\n"


def beside_papers(found: Found) -> list[tuple[str, str, str, str, str]]:
    """Returns a row per system: its mechanism here, our measure, its paper's claim, and why the two differ."""
    top = max((each["load"] for each in found if each["kind"] == "policy" and each["workload"] == "lmaas"), default=0.0)

    def ratio(said: str, over: str, under: str, *figures: str) -> str:
        """Returns ``said`` with the ratio of two policies in place of each {}: the median over seeds."""
        by_seed = [{each["seed"]: each for each in of(found, "policy", "lmaas", top, name)} for name in (over, under)]
        seeds = by_seed[0].keys() & by_seed[1].keys()
        told = []
        for figure in figures:
            pairs = [[_value(cells[seed], figure.split(".")) for cells in by_seed] for seed in seeds]
            ratios = [value / other for value, other in pairs if value is not None and other]
            if not ratios:
                return "not run"
            told.append(f"{statistics.median(ratios):.2f} times")
        return said.format(*told)

    fleets = [of(found, "fleet", "chat", FLEET_LOAD, name) for name in ("freeness and moves", "round robin")]
    p99_s = [median_of(cells, "ttft_s", "p99") for cells in fleets]
    times = p99_s[1] / p99_s[0] if p99_s[0] and p99_s[1] else None
    llumnix = "not run" if times is None else f"round robin's p99 TTFT is {times:.2f} times freeness' with moves"
    cells = [each for each in found if each["kind"] == "placement" and each["fused"]]
    gains = [each["apart"] / each["fused"] for each in cells]
    distserve = f"{min(gains):.2f} to {max(gains):.2f} times the rate of fused replicas" if gains else "not run"
    pairs = sorted({(Path(each["workload"]).stem, each["load"]) for each in found if each["kind"] == "swap"})
    swaps = [[median_of(of(found, "swap", *pair, name), "ttft_s", "mean") for name in SWAPS] for pair in pairs]
    sooner = [again_s / swapped_s for again_s, swapped_s in swaps if again_s and swapped_s]
    fastswitch = (
        f"TTFT {min(sooner):.2f} to {max(sooner):.2f} times shorter than computed again" if sooner else "not run"
    )
    fair = [median_of(of(found, "fairness", "lmaas", FAIRNESS_LOAD, each), "light_ttft_s") for each in ("vtc", "fused")]
    vtc = f"light users' TTFT {fair[0] / fair[1]:.2f} of first come's" if fair[0] and fair[1] else "not run"
    return [
        (
            "Magnus",
            "batches of least waste by predicted length, HRRN between batches",
            ratio(
                "throughput {} that of static batches, response {} theirs",
                "magnus",
                "static",
                "tokens_per_s",
                "latency_s.mean",
            ),
            "throughput +66 to +234 %, response -89.7 %",
            "a batch's waste is bounded as a share of its longest answer here, and our static batches are larger",
        ),
        (
            "BATON",
            "a newcomer a step joins padded rows, no recomputation",
            ratio("{} Orca's throughput", "baton", "orca", "tokens_per_s"),
            "1.75 times Orca's",
            "our Orca computes no padding, theirs pads; here padding to long rows is what costs",
        ),
        (
            "JITServe",
            "gain per second, windows alike in length",
            ratio("goodput {} first come's", "jitserve", "fused", "goodput"),
            "goodput 1.4 to 6.3 times",
            "their load is higher, with compound requests; here first come has chunked prompts too",
        ),
        ("DistServe", "placement by simulation, prompts apart from decodes", distserve, "4.48 times the rate",
         "their baseline runs prompts whole, ours in chunks, which keeps gaps small without dividing"),
        ("Llumnix", "dispatch by freeness, live moves, drain", llumnix, "p99 TTFT up to 14.8 times shorter, cost -36 %",
         "their requests differ more in length, and memory is short there"),
        ("FastSwitch", "swapping on a thread of its own, runs of blocks, no second copy", fastswitch,
         "TTFT 1.4 to 5.8 times shorter", "they preempt each request many times, for conversations of many turns"),
        ("VTC", "least served user first", vtc, "light users unharmed by heavy ones", "same mechanism"),
    ]  # fmt: skip


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
