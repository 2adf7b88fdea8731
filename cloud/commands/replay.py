"""``isthmus elastic replay``: a trace, or the synthetic one, served by a policy, simulated or live."""

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from isthmus.cloud.commands.live_replay import LiveWorld, open_live
from isthmus.cloud.elastic.policies.by_name import DEFAULT_POLICY, POLICIES, make_policy
from isthmus.cloud.elastic.scheduling.bound import clairvoyant_bound
from isthmus.cloud.elastic.scheduling.engine import Engine
from isthmus.cloud.elastic.scheduling.policy import EPSILON
from isthmus.cloud.elastic.scheduling.profile import Profile, paper_profile
from isthmus.cloud.elastic.scheduling.query import Outcome
from isthmus.cloud.elastic.scheduling.simulate import Run, draws, serve, simulate
from isthmus.cloud.elastic.scheduling.workload import queries_at_load, rates_of_counts, wandering_rates
from isthmus.cloud.elastic.warm.profiled import warmed_profile
from isthmus.cloud.elastic.warm.store import WarmStore
from isthmus.data.traces import read_trace
from isthmus.distill.training.loop import pick_device
from isthmus.proto.errors import IsthmusError

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
    margin: Annotated[
        float | None,
        typer.Option(
            help="Plan as if batches took this share longer than the profile says; default: follow what they take.",
            min=0,
            max=10,
        ),
    ] = None,
    pace: Annotated[
        float,
        typer.Option(
            help="Simulated: batches take so many times what the profile says, as a live replay tells in the end.",
            min=0.1,
            max=10,
        ),
    ] = 1.0,
    live: Annotated[
        bool, typer.Option("--live/--simulate", help="In real time with the model, or a virtual clock and the profile.")
    ] = False,
    model: Annotated[str | None, typer.Option(help="Live: the model's safetensors file, or timm's name of it.")] = None,
    tasks: Annotated[Path | None, typer.Option(help="Live: folder of tasks of 'isthmus elastic prompts'.")] = None,
    data: Annotated[Path | None, typer.Option(help="Live: labelled pictures to ask about, Parquet.")] = None,
    warm: Annotated[
        Path | None, typer.Option(help="Warmed models, 'OUT/models' of 'isthmus elastic warmup': served by gamma.")
    ] = None,
    warm_bytes: Annotated[int | None, typer.Option(help="Live: memory for warmed models; none: room for all.")] = None,
    pixels: Annotated[str | None, typer.Option(help="Live: cifar10, imagenet or half; else the model's own.")] = None,
    device: Annotated[str, typer.Option(help="Live: 'auto' takes a GPU where there is one.")] = "auto",
    limit: Annotated[int | None, typer.Option(help="Live: ask about so many pictures, by chance.", min=2)] = 2_000,
) -> None:
    """Serve a trace and say what became of its queries, beside what a clairvoyant could have earned."""
    try:
        measured = Profile.from_json(profile.read_text(encoding="utf-8")) if profile is not None else paper_profile()
        if warm is not None:
            store = WarmStore(warm)
            measured = warmed_profile(measured, store.common().task, store.profiled())
        world: LiveWorld | None = None
        if live:
            if pace != 1:
                raise ValueError("--pace is for a simulated replay: live batches take what they take")
            if model is None or tasks is None or data is None or profile is None:
                raise ValueError("--live needs --profile, --model, --tasks and --data")
            world, measured, differences = open_live(
                measured,
                model=model,
                tasks=tasks,
                data=data,
                pixels=pixels,
                device=str(pick_device(device)),
                limit=limit,
                seed=seed,
                warm=warm,
                warm_bytes=warm_bytes,
            )
            for difference in differences:
                typer.echo(f"the profile is of another machine or model: {difference}", err=True)
        planned = measured.slowed(1 + (margin or 0.0))
        chosen = make_policy(policy, planned)
        rng = np.random.default_rng(seed)
        rates_T = (
            wandering_rates(rng, duration_s)
            if trace == SYNTHETIC
            else rates_of_counts(read_trace(Path(trace)), window_s)
        )
        queries = queries_at_load(rng, rates_T, load, measured)
    except (ValueError, OSError, IsthmusError) as error:
        typer.echo(f"isthmus elastic replay: {error}", err=True)
        raise typer.Exit(1) from error
    engine = Engine(planned, chosen, adapts=margin is None)
    if world is not None:
        world.begin(chosen.gammas)
        run = serve(engine, queries, world)
    else:
        luck_N = draws(np.random.default_rng([seed, 1]), len(queries))
        run = simulate(engine, queries, luck_N, lambda work: pace * measured.batch_time_s(work.gamma, len(work.batch)))
    bound = clairvoyant_bound(queries, measured, EPSILON)
    warmed: dict[str, Any] = {}
    if world is not None and world.warm is not None:
        at, held = world.warm, world.warm.residency
        warmed = {"switches": at.switches, "missed": at.missed, "loads": held.loads, "peak_bytes": held.peak_bytes}
        warmed |= {"limit_bytes": held.limit_bytes, "left_out": at.left_out}
        at.close()
        typer.echo(
            f"warmed models: {at.switches} switches, {at.missed} batches without their best one, {held.loads} loads, "
            f"at most {held.peak_bytes} of {held.limit_bytes} bytes"
        )
    sums = {
        "warmed": warmed,
        "policy": policy,
        "live": live,
        "margin": margin,
        "planned": engine.pace,
        "bound": bound,
        **_sums(run, measured),
    }
    how = "live" if live else "simulated"
    typer.echo(f"{policy} on {trace}, {how}, load {load:g}, seed {seed}: {len(queries)} queries in {run.end_s:.0f} s")
    typer.echo(f"utility {run.utility:.1f} (expected {run.expected_utility:.1f}; no policy passes {bound:.1f})")
    for outcome in Outcome:
        if run.share(outcome):
            typer.echo(f"  {outcome.value.replace('_', ' ')}: {100 * run.share(outcome):.2f} %")
    typer.echo(
        f"{len(run.batches)} batches of {sums['mean_batch_size']:.1f} on the mean, which took {sums['took']:.3f} times "
        f"as long as the profile says, and were planned at the end to take {engine.pace:.2f}"
    )
    if out is not None:
        batches = [[b.start_s, b.end_s, b.gamma, b.size, b.accuracy, b.utility] for b in run.batches]
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({**sums, "each": batches, "latencies_s": run.latencies_s}) + "\n", encoding="utf-8")
        typer.echo(f"written: {out}")


def _sums(run: Run, profile: Profile) -> dict[str, Any]:
    sizes = [batch.size for batch in run.batches]
    profiled_s = sum(profile.batch_time_s(batch.gamma, batch.size) for batch in run.batches)
    return {
        "queries": len(run.outcomes),
        "expected_utility": run.expected_utility,
        "utility": run.utility,
        "outcomes": {outcome.value: run.share(outcome) for outcome in Outcome},
        "batches": len(sizes),
        "mean_batch_size": sum(sizes) / max(1, len(sizes)),
        "took": sum(batch.end_s - batch.start_s for batch in run.batches) / profiled_s if run.batches else 1.0,
        "gammas": {
            str(gamma): sum(batch.size for batch in run.batches if batch.gamma == gamma) for gamma in profile.gammas
        },
    }
