"""``isthmus elastic replay``: a trace, or the synthetic one, served by a policy under a virtual clock."""

import json
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from isthmus.cloud.elastic.bound import clairvoyant_bound
from isthmus.cloud.elastic.engine import Engine
from isthmus.cloud.elastic.policies import DEFAULT_POLICY, POLICIES, make_policy
from isthmus.cloud.elastic.policy import EPSILON
from isthmus.cloud.elastic.profile import Profile, paper_profile
from isthmus.cloud.elastic.query import Outcome
from isthmus.cloud.elastic.simulate import draws, simulate
from isthmus.cloud.elastic.workload import queries_at_load, rates_of_counts, wandering_rates
from isthmus.data.traces import read_trace

SYNTHETIC = "synthetic"


def replay(
    trace: Annotated[
        str, typer.Argument(help="'synthetic', or a CSV file of the Azure Functions 2021 or Azure LLM 2023 traces.")
    ] = SYNTHETIC,
    policy: Annotated[
        str, typer.Option(help=f"One of {', '.join(POLICIES)}, or fixed:G for gamma G throughout.")
    ] = DEFAULT_POLICY,
    profile: Annotated[
        Path | None, typer.Option(help="A measured profile (JSON). Without one, the paper-like profile.")
    ] = None,
    load: Annotated[float, typer.Option(help="Mean arrivals, as a multiple of what gamma 0 serves.", min=0.01)] = 1.0,
    seed: Annotated[int, typer.Option(help="Of arrivals, kinds of query, and which answers are right.")] = 0,
    duration_s: Annotated[float, typer.Option(help="Length of the synthetic trace.", min=1, max=36_000)] = 60.0,
    window_s: Annotated[float, typer.Option(help="So much of a file's time is played as one second.", min=0.01)] = 60.0,
    out: Annotated[Path | None, typer.Option(help="Write every batch and the sums to this JSON file.")] = None,
) -> None:
    """Serve a trace in simulation and say what became of its queries, beside what a clairvoyant could have earned."""
    try:
        measured = Profile.from_json(profile.read_text(encoding="utf-8")) if profile is not None else paper_profile()
        chosen = make_policy(policy, measured)
        rng = np.random.default_rng(seed)
        rates_T = (
            wandering_rates(rng, duration_s)
            if trace == SYNTHETIC
            else rates_of_counts(read_trace(Path(trace)), window_s)
        )
        queries = queries_at_load(rng, rates_T, load, measured)
    except (ValueError, OSError) as error:
        typer.echo(f"isthmus elastic replay: {error}", err=True)
        raise typer.Exit(1) from error
    run = simulate(Engine(measured, chosen), queries, draws(np.random.default_rng([seed, 1]), len(queries)))
    bound = clairvoyant_bound(queries, measured, EPSILON)
    sums = {
        "policy": policy,
        "queries": len(queries),
        "expected_utility": run.expected_utility,
        "utility": run.utility,
        "bound": bound,
        "outcomes": {outcome.value: run.share(outcome) for outcome in Outcome},
        "batches": len(run.batches),
        "mean_batch_size": sum(batch.size for batch in run.batches) / max(1, len(run.batches)),
        "gammas": {
            str(gamma): sum(batch.size for batch in run.batches if batch.gamma == gamma) for gamma in measured.gammas
        },
    }
    typer.echo(f"{policy} on {trace}, load {load:g}, seed {seed}: {len(queries)} queries in {run.end_s:.0f} s")
    typer.echo(f"utility {run.utility:.1f} (expected {run.expected_utility:.1f}; no policy passes {bound:.1f})")
    for outcome in Outcome:
        if run.share(outcome):
            typer.echo(f"  {outcome.value.replace('_', ' ')}: {100 * run.share(outcome):.2f} %")
    typer.echo(f"{len(run.batches)} batches of {sums['mean_batch_size']:.1f} on the mean")
    if out is not None:
        batches = [[b.start_s, b.end_s, b.gamma, b.size, b.accuracy, b.utility] for b in run.batches]
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({**sums, "each": batches}) + "\n", encoding="utf-8")
        typer.echo(f"written: {out}")
