"""The work of ``isthmus generate replay``: simulate a policy on a workload. It needs no torch."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import typer

from isthmus.cloud.commands.generation.options import GenerateReplayOptions
from isthmus.cloud.generation.policies.by_name import learning_lengths
from isthmus.cloud.generation.policies.lengths import KnownLengths, LengthPredictor
from isthmus.cloud.generation.prepare.replaying import (
    EARLIER,
    WARM_REQUESTS,
    check_room,
    learn,
    light_ttft_s,
    served,
    sizes_of,
)
from isthmus.cloud.generation.scheduling.blocks import BLOCK_TOKENS
from isthmus.cloud.generation.scheduling.bound import goodput_bound, mean_latency_bound_s
from isthmus.cloud.generation.scheduling.policy import Limits
from isthmus.cloud.generation.scheduling.profile import GenerationProfile, reference_profile
from isthmus.cloud.generation.scheduling.report import by_user, jain, report
from isthmus.cloud.generation.scheduling.workload import Workload, at_load, bursty_gaps, poisson_gaps, unequal_users
from isthmus.command_line import print_table
from isthmus.data.files import read_text, write_atomically

_SUMMARY: dict[str, Callable[[dict[str, Any]], float | None]] = {
    "tokens per second": lambda run: run["tokens_per_s"],
    "requests in time": lambda run: run["goodput"],
    "bound of requests in time": lambda run: run.get("bound_goodput"),
    "tokens in time": lambda run: run["goodput_tokens"],
    "mean seconds to the whole answer": lambda run: run["latency_s"].get("mean"),
    "bound of that mean": lambda run: run["bound_mean_s"],
    "mean seconds to the first token": lambda run: run["ttft_s"].get("mean"),
    "the same, of light users": lambda run: run.get("light_ttft_s"),
    "rows that decode in a step": lambda run: run["occupancy"],
    "preemptions": lambda run: run["preempted"],
}
_BOUNDED_REQUESTS = 2_000
"""The bound of goodput is a linear program, which takes minutes with more requests than this."""


def replay(asked: GenerateReplayOptions) -> None:
    """Simulate, print the figures, and write them to ``asked.out`` if it is given. Raises ValueError or OSError."""
    profile = reference_profile() if asked.profile is None else GenerationProfile.from_json(read_text(asked.profile))
    found = [_figures(replace(asked, seed=asked.seed + at), profile) for at in range(asked.seeds)]
    if asked.seeds == 1:
        _print_one(asked, found[0])
    else:
        _print_several(asked, found)
    if asked.out is not None:
        settings = {"policy": asked.policy, "workload": asked.workload, "load": asked.load, "lengths": asked.lengths}
        whole = found[0] if asked.seeds == 1 else {"runs": found}
        write_atomically(asked.out, json.dumps({**settings, **whole}, indent=1) + "\n")
        typer.echo(f"written: {asked.out}")


def _figures(asked: GenerateReplayOptions, profile: GenerationProfile) -> dict[str, Any]:
    """Return the figures of one seed, with the bounds, and by user if there are several."""
    workload = _workload(asked, profile)
    check_room(max(len(each.prompt) + each.max_tokens for each in workload.requests), asked.kv_tokens)
    limits = Limits(rows=asked.rows, blocks=max(1, asked.kv_tokens // BLOCK_TOKENS))
    lengths = _lengths(asked, profile, workload)
    run = served(workload, profile, asked.policy, lengths, limits, expires=asked.evict)
    found = {"seed": asked.seed, **report(run)}
    found["bound_mean_s"] = mean_latency_bound_s(workload, profile, asked.rows)
    if len(workload.requests) <= _BOUNDED_REQUESTS:
        found["bound_goodput"] = goodput_bound(workload, profile, asked.rows)
    users = by_user(run)
    if len(users) > 1:
        found["users"] = users
        found["jain"] = jain([each["tokens"] for each in users.values()])
        light = light_ttft_s(run)
        found["light_ttft_s"] = sum(light) / len(light)
    return found


def _print_one(asked: GenerateReplayOptions, found: dict[str, Any]) -> None:
    typer.echo(
        f"{asked.policy} on {asked.workload}, load {asked.load:g}, seed {asked.seed}: {found['requests']} requests, "
        f"{found['tokens']} tokens in {found['seconds']:.0f} s ({found['tokens_per_s']:.0f} per second)"
    )
    within = f"; no policy passes {found['bound_goodput']:.3f}" if "bound_goodput" in found else ""
    typer.echo(f"in time: {found['goodput']:.3f} of the requests{within}; {found['goodput_tokens']:.3f} of the tokens")
    print_table(
        ("seconds", "mean", "p50", "p95", "p99"),
        [
            (name, *(f"{found[key][each]:.3f}" for each in ("mean", "p50", "p95", "p99")))
            for name, key in (
                ("to the whole answer", "latency_s"),
                ("to the first token", "ttft_s"),
                ("per further token", "tpot_s"),
                ("largest gap", "largest_gap_s"),
            )
            if found[key]
        ],
    )
    typer.echo(
        f"no policy's mean is below {found['bound_mean_s']:.3f} s; {found['occupancy']:.1f} rows decode in a mean step"
    )
    typer.echo(f"{found['preempted']} preemptions, {found['recomputed_tokens']} tokens computed again")
    if "users" in found:
        print_table(
            ("user", "tokens", "seconds to the first token"),
            [(user, f"{each['tokens']:.0f}", f"{each['ttft_s']:.3f}") for user, each in found["users"].items()],
        )


def _print_several(asked: GenerateReplayOptions, found: list[dict[str, Any]]) -> None:
    typer.echo(
        f"{asked.policy} on {asked.workload}, load {asked.load:g}, "
        f"{asked.seeds} seeds of {found[0]['requests']} requests"
    )
    rows = []
    for name, value in _SUMMARY.items():
        values = [each for run in found if (each := value(run)) is not None]
        if values:
            rows.append((name, f"{median(values):.3f}", f"{min(values):.3f}", f"{max(values):.3f}"))
    print_table(("figure", "median", "least", "most"), rows)


def _lengths(asked: GenerateReplayOptions, profile: GenerationProfile, workload: Workload) -> LengthPredictor:
    if asked.lengths == "known":
        return KnownLengths(workload.lengths.__getitem__)
    learning = learning_lengths(asked.policy)
    if asked.lengths == "warm":
        if Path(asked.workload).is_file():
            raise ValueError("--lengths warm: a recorded trace has no earlier day; give 'learned' or 'known'")
        learn(learning, _workload(replace(asked, requests=WARM_REQUESTS, seed=asked.seed + EARLIER), profile))
    return learning


def _workload(asked: GenerateReplayOptions, profile: GenerationProfile) -> Workload:
    rng = np.random.default_rng(asked.seed)
    sizes, gaps_N = sizes_of(asked.workload, asked.requests, rng, asked.shrink)
    if gaps_N is None:
        gaps_N = (bursty_gaps if asked.bursty else poisson_gaps)(rng, asked.requests)
    users = None if asked.heavy is None else unequal_users(rng, len(gaps_N), heavy=asked.heavy)
    return at_load(sizes, gaps_N, asked.load, profile, users=users)
