"""The work of ``isthmus elastic replay``: serve a trace by a policy, simulated or live, and report the outcome.

A simulated replay needs no torch: what needs it is imported for a live one.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import typer

from isthmus.cloud.commands.options import ReplayOptions
from isthmus.cloud.elastic.model.executor import Supervised
from isthmus.cloud.elastic.policies.by_name import make_policy
from isthmus.cloud.elastic.policies.infaas import memory_named, simulated
from isthmus.cloud.elastic.scheduling.bound import clairvoyant_bound
from isthmus.cloud.elastic.scheduling.engine import Engine
from isthmus.cloud.elastic.scheduling.levels import said
from isthmus.cloud.elastic.scheduling.policy import EPSILON
from isthmus.cloud.elastic.scheduling.profile import Profile, paper_profile
from isthmus.cloud.elastic.scheduling.query import Outcome, Query
from isthmus.cloud.elastic.scheduling.simulate import Run, draws, serve, simulate
from isthmus.cloud.elastic.scheduling.workload import queries_at_load, rates_of_counts, wandering_rates
from isthmus.cloud.elastic.variants.folder import Variants
from isthmus.cloud.elastic.warm.profiled import warmed_profile
from isthmus.data.files import read_text, write_atomically
from isthmus.data.traces import read_trace
from isthmus.extensions import load_extensions

if TYPE_CHECKING:
    from isthmus.cloud.commands.live_replay import LiveWorld

SYNTHETIC = "synthetic"


def replay(asked: ReplayOptions) -> None:
    """Replay the trace, print how its queries ended, and write the batches to ``asked.out`` if it is given.

    Raises ValueError, OSError or IsthmusError before anything is served.
    """
    load_extensions()
    variants = None if asked.variants is None else _variants(asked)
    if variants is not None:
        measured = variants.profile
    else:
        measured = paper_profile() if asked.profile is None else Profile.from_json(read_text(asked.profile))
    if asked.warm is not None:
        from isthmus.cloud.elastic.warm.store import WarmStore

        store = WarmStore(asked.warm)
        measured = warmed_profile(measured, store.common().task, store.profiled())
    infaas_bytes = memory_named(asked.policy)
    if infaas_bytes is not None:
        _check_infaas(asked)
    else:
        make_policy(asked.policy, measured)  # an unknown policy is refused before a model is loaded
    if asked.server is not None:
        _on_server(asked, measured, variants)
        return
    world: LiveWorld | None = None
    if asked.live:
        world, measured = _live_world(asked, measured)
    queries = queries_asked(asked, measured)
    bound = clairvoyant_bound(queries, measured, EPSILON, executors=asked.executors)
    luck_N = draws(np.random.default_rng([asked.seed, 1]), len(queries))
    if infaas_bytes is not None:
        sizes = None if variants is None else variants.sizes
        measured, policy, executor = simulated(measured, infaas_bytes, asked.executors, asked.pace, sizes=sizes)
        engine = Engine(measured, policy, adapts=False, executors=asked.executors)
        run = simulate(engine, queries, luck_N, executor)
    else:
        planned = measured.slowed(1 + (asked.margin or 0.0))
        engine = Engine(
            planned, make_policy(asked.policy, planned), adapts=asked.margin is None, executors=asked.executors
        )
        if world is not None:
            world.begin(engine.policy.gammas)
            run = _served(engine, queries, world)
        else:
            run = simulate(
                engine, queries, luck_N, lambda work: asked.pace * measured.batch_time_s(work.gamma, len(work.batch))
            )
    sums = {
        "warmed": {} if world is None else _warmed(world),
        "policy": asked.policy,
        "executors": asked.executors,
        "live": asked.live,
        "margin": asked.margin,
        "planned": engine.pace,
        "bound": bound,
        **_sums(run, measured),
    }
    how = "live" if asked.live else "simulated"
    typer.echo(
        f"{asked.policy} on {asked.trace}, {how}, load {asked.load:g}, seed {asked.seed}: "
        f"{len(queries)} queries in {run.end_s:.0f} s"
    )
    typer.echo(f"utility {run.utility:.1f} (expected {run.expected_utility:.1f}; no policy passes {bound:.1f})")
    for outcome in Outcome:
        if run.share(outcome):
            typer.echo(f"  {outcome.value.replace('_', ' ')}: {100 * run.share(outcome):.2f} %")
    typer.echo(
        f"{len(run.batches)} batches, mean size {sums['mean_batch_size']:.1f}. They took {sums['took']:.3f} times as "
        f"long as the profile says; at the end, plans allowed {engine.pace:.2f} times."
    )
    if measured.experts:
        used = {said(int(level), measured.experts): count for level, count in sums["gammas"].items() if count}
        typer.echo(
            "images by gamma and experts per token: " + "; ".join(f"{at}: {count}" for at, count in used.items())
        )
    if asked.out is not None:
        batches = [[b.start_s, b.end_s, b.gamma, b.size, b.accuracy, b.utility] for b in run.batches]
        write_atomically(asked.out, json.dumps({**sums, "each": batches, "latencies_s": run.latencies_s}) + "\n")
        typer.echo(f"written: {asked.out}")


def _on_server(asked: ReplayOptions, measured: Profile, variants: Variants | None) -> None:
    """Replay through a running server."""
    from isthmus.cloud.commands.load import server_replay
    from isthmus.data.images import Columns

    server_replay.check(asked)
    assert asked.tasks is not None and asked.data is not None
    columns = Columns(asked.image_column, asked.label_column)
    pictures = server_replay.pictures_of(
        asked.tasks, asked.data, asked.limit, asked.seed, columns, set(measured.accuracy)
    )
    for task in measured.accuracy.keys() - pictures.keys():
        measured = measured.without_task(task)
    sizes = None if variants is None else variants.sizes
    server_replay.replay_on_server(asked, measured, queries_asked(asked, measured), pictures, sizes)


def queries_asked(asked: ReplayOptions, measured: Profile) -> list[Query]:
    """Return the queries of the trace, at the load that is asked for."""
    rng = np.random.default_rng(asked.seed)
    rates_T = (
        wandering_rates(rng, asked.duration_s)
        if asked.trace == SYNTHETIC
        else rates_of_counts(read_trace(Path(asked.trace)), asked.window_s)
    )
    return queries_at_load(rng, rates_T, asked.load * asked.executors, measured)


def _check_infaas(asked: ReplayOptions) -> None:
    """Raise ValueError for options that INFaaS cannot have."""
    if asked.live:
        raise ValueError(
            "--live runs one model, and --policy infaas several: start 'isthmus cloud serve --elastic-variants' and "
            "name it with --server"
        )
    if asked.server is not None and asked.variants is None:
        raise ValueError("--server with --policy infaas needs --variants: the server's folder of model variants")
    if asked.margin is not None or asked.warm is not None:
        raise ValueError("--policy infaas has its own models: leave out --margin and --warm")


def _variants(asked: ReplayOptions) -> Variants:
    """Return the folder of variants. Raises ValueError for options that do not go with it, BadVariants (ValueError)."""
    if memory_named(asked.policy) is None:
        raise ValueError("--variants are models for INFaaS: add --policy infaas:GB")
    if asked.profile is not None:
        raise ValueError("--variants has a profile of its own: leave out --profile")
    assert asked.variants is not None, "checked by the caller"
    return Variants.read(asked.variants)


def _live_world(asked: ReplayOptions, measured: Profile) -> "tuple[LiveWorld, Profile]":
    """Open the model, its tasks and pictures; return them with the profile of the tasks that are there."""
    from isthmus.cloud.commands.live_replay import open_live
    from isthmus.data.images import Columns
    from isthmus.distill.training.loop import pick_device

    if asked.warm is not None and (asked.executors > 1 or asked.executor != "thread"):
        raise ValueError("--warm places its models for one executor in a thread: leave out --executors and --executor")
    if asked.pace != 1:
        raise ValueError("--pace is for a simulated replay: leave it out with --live")
    if asked.model is None or asked.tasks is None or asked.data is None or asked.profile is None:
        raise ValueError("--live needs --profile, --model, --tasks and --data")
    world, measured, differences = open_live(
        measured,
        model=asked.model,
        tasks=asked.tasks,
        data=asked.data,
        pixels=asked.pixels,
        device=str(pick_device(asked.device)),
        limit=asked.limit,
        seed=asked.seed,
        warm=asked.warm,
        warm_bytes=asked.warm_bytes,
        columns=Columns(asked.image_column, asked.label_column),
        executors=asked.executors,
        kind=asked.executor,
    )
    for difference in differences:
        typer.echo(f"the profile was measured on another machine or model: {difference}", err=True)
    return world, measured


def _served(engine: Engine, queries: Sequence[Query], world: "LiveWorld") -> Run:
    """Serve in real time: one executor on this thread, several by the engine that also serves clients."""
    if len(world.executors) == 1 and not isinstance(world.executors[0], Supervised):
        return serve(engine, queries, world)
    import torch

    from isthmus.cloud.elastic.serve.traced import serve_at_once

    threads = torch.get_num_threads()
    return serve_at_once(engine, queries, world.executors, world.asked, on_start=lambda: torch.set_num_threads(threads))


def _warmed(world: "LiveWorld") -> dict[str, Any]:
    """Close the warmed models, and print and return how they were used; nothing if there are none."""
    if world.warm is None:
        return {}
    at, held = world.warm, world.warm.residency
    used: dict[str, Any] = {
        "switches": at.switches,
        "missed": at.missed,
        "loads": held.loads,
        "peak_bytes": held.peak_bytes,
    }
    used |= {"limit_bytes": held.limit_bytes, "left_out": at.left_out}
    at.close()
    typer.echo(
        f"warmed models: {at.switches} switches, {at.missed} batches without their best one, {held.loads} loads, "
        f"at most {held.peak_bytes} of {held.limit_bytes} bytes"
    )
    return used


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
