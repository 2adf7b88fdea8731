"""The work of ``isthmus elastic`` prompts, schedules and profile."""

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import typer

from isthmus.cloud.commands.options import Picturing, ProfileOptions, PromptOptions, ScheduleOptions, ascending
from isthmus.cloud.elastic.model import schedules
from isthmus.cloud.elastic.model.runner import DTYPES, ElasticRunner, NumberType, ServedTask
from isthmus.cloud.elastic.model.vit import ElasticViT
from isthmus.cloud.elastic.prepare import precision, profiler, prompts
from isthmus.cloud.elastic.prepare.inputs import fitting, opened, pictures_of, profiling_sets, split_off
from isthmus.cloud.elastic.prepare.profile_figures import draw
from isthmus.cloud.elastic.prepare.schedule_file import (
    order_of_search,
    read_schedules,
    read_search,
    search_key,
    write_search,
)
from isthmus.cloud.elastic.scheduling.levels import levels, said
from isthmus.cloud.elastic.scheduling.merge_order import order_for
from isthmus.cloud.elastic.scheduling.profile import Profile
from isthmus.cloud.elastic.tasks.files import TaskFiles, order_of_task
from isthmus.cloud.elastic.tasks.recipes import read_recipe
from isthmus.cloud.elastic.tasks.task import TaskSpec
from isthmus.cloud.elastic.warm.models import timed_model
from isthmus.cloud.elastic.warm.profiled import warmed_profile
from isthmus.cloud.elastic.warm.store import WarmStore
from isthmus.command_line import print_table
from isthmus.data.files import write_atomically
from isthmus.data.images import Columns, LabelledImages, PixelSpec
from isthmus.distill.training.checkpoint import state_hash
from isthmus.distill.training.loop import pick_device, set_threads
from isthmus.distill.training.progress import EpochBars, bars, save_loss_curves

PRECISION_PICTURES = 1_000
"""Number types are compared on at most this many pictures of the first task."""


@contextmanager
def steps() -> Iterator[profiler.OnStep]:
    """Show progress bars for measurements, one per kind."""
    with bars() as progress:
        shown: dict[str, Any] = {}

        def on_step(what: str, done: int, every: int) -> None:
            if what not in shown:
                shown[what] = progress.add_task(what, total=every, note="")
            progress.update(shown[what], completed=done, total=every)

        yield on_step


def learn_prompts(asked: PromptOptions, picturing: Picturing) -> None:
    """Learn a task and write its files. Raises ValueError, ImageError, CheckpointError, TrainingDiverged or OSError."""
    seed = picturing.seed
    gammas, measured = ascending(asked.gammas, "--gammas"), ascending(asked.measured, "--measured")
    set_threads(picturing.threads)
    recipe = read_recipe(asked.task)
    # Only the accuracies depend on the order, and they are all measured again: another one may be asked for.
    order = picturing.merge_order or order_for(None, {recipe.name: order_of_task(asked.out, recipe.name)})
    elastic, pixel = opened(asked.model, picturing.pixels, merge_order=order)
    config = prompts.PromptConfig(
        gammas,
        asked.mode,
        prompts=dataclasses.replace(prompts.PROMPTS, epochs=asked.epochs, learning_rate=asked.learning_rate),
        seed=seed,
    )
    wanted = fitting((*measured, *config.gammas), elastic)
    pictures = recipe.apply(pictures_of(asked.data, pixel, picturing.limit, seed, _columns(picturing)))
    learning, profiling = split_off(pictures, picturing.held, seed)
    where = pick_device(picturing.device)
    work = asked.out / f"{recipe.name}.learning"
    losses: dict[str, list[float]] = {}
    with bars() as progress:
        watch = EpochBars(progress, len(learning), "pictures")

        def on_epoch(what: str, report: Any) -> None:
            losses.setdefault(what, []).append(report.loss)
            watch(what, report)

        weights = prompts.learn_task(
            elastic, pixel, learning, len(recipe.classes), config, folder=work, device=where, on_epoch=on_epoch
        )
    save_loss_curves(work, losses, recipe.name)
    runner = ElasticRunner(elastic, pixel, device=str(where))
    served = runner.prepare(weights, asked.mode)
    with steps() as on_step:
        shares = profiler.measure_accuracy(runner, {recipe.name: (served, profiling)}, wanted, on_step=on_step)
    spec = TaskSpec(recipe.name, recipe.classes, asked.mode, shares[recipe.name])
    path = TaskFiles(recipe, spec, weights).save(asked.out, order)
    print_table(
        ("gamma", "accuracy"),
        [(str(gamma), f"{share:.1%}") for gamma, share in spec.accuracy.items()],
        title=f"{recipe.name}, {len(profiling)} pictures held out",
    )
    typer.echo(f"written: {path}")


def wanted_levels(gammas: str, experts: str, model: ElasticViT) -> tuple[int, ...]:
    """Return the levels of ``--gammas`` with ``--experts``. Raises ValueError for those that the model cannot run."""
    usual = model.experts.k
    counts = ascending(experts, "--experts") if experts else tuple(range(1, usual + 1))
    return levels(fitting(ascending(gammas, "--gammas"), model), counts, usual)


def _columns(picturing: Picturing) -> Columns:
    return Columns(picturing.image_column, picturing.label_column)


def _profiled(
    elastic: ElasticViT, pixel: PixelSpec, tasks: Path, data: Path, picturing: Picturing
) -> dict[str, tuple[TaskFiles, LabelledImages]]:
    held, limit, seed = picturing.held, picturing.limit, picturing.seed
    return profiling_sets(elastic, pixel, tasks, data, held, limit, seed, _columns(picturing))


def search_schedules(asked: ScheduleOptions, picturing: Picturing) -> None:
    """Search schedules and write them, after each one that is tried. Raises ValueError, ImageError or OSError."""
    gammas = ascending(asked.gammas, "--gammas")
    set_threads(picturing.threads)
    order = order_for(picturing.merge_order, {asked.out.name: order_of_search(asked.out)})
    elastic, pixel = opened(asked.model, picturing.pixels, merge_order=order)
    wanted = fitting(gammas, elastic)
    where = str(pick_device(picturing.device))
    labelled = _profiled(elastic, pixel, asked.tasks, asked.data, picturing)
    pictures = {name: some.digest() for name, (_, some) in labelled.items()}
    state = read_search(asked.out, search_key(state_hash([elastic]), pictures, order))
    rows: list[tuple[str, ...]] = []
    with steps() as on_step:
        for gamma in wanted:
            tried = state["tried"].setdefault(str(gamma), [])
            known = {tuple(schedule): share for schedule, share in tried}

            def scheduled(schedule: schedules.Schedule, gamma: int = gamma) -> ElasticViT:
                return ElasticViT(elastic.vit, {gamma: schedule}, merge_order=elastic.merge_order)

            def evaluate(schedule: schedules.Schedule, gamma: int = gamma) -> float:
                runner = ElasticRunner(scheduled(schedule, gamma), pixel, device=where)
                return float(
                    np.mean(
                        [
                            profiler.accuracy(runner, runner.prepare(one.weights, one.spec.prompt_mode), some, gamma)
                            for one, some in labelled.values()
                        ]
                    )
                )

            def operations(schedule: schedules.Schedule, gamma: int = gamma) -> int:
                return scheduled(schedule, gamma).operations(gamma)

            def keep(
                schedule: schedules.Schedule,
                share: float,
                gamma: int = gamma,
                tried: list[Any] = tried,
                known: Mapping[schedules.Schedule, float] = known,
            ) -> None:
                if schedule not in known:
                    tried.append([schedule, share])
                    write_search(asked.out, state)
                on_step(f"gamma {gamma}", min(len(tried), asked.evaluations), asked.evaluations)

            found = schedules.search(
                gamma,
                elastic.depth,
                evaluate,
                operations,
                most=elastic.tokens,
                known=known,
                max_evaluations=asked.evaluations,
                on_evaluated=keep,
            )
            state["schedules"][str(gamma)] = found.schedule
            write_search(asked.out, state)
            schedule = " ".join(map(str, found.schedule))
            shares = f"{found.uniform_accuracy:.2%}", f"{found.accuracy:.2%}"
            rows.append((str(gamma), *shares, schedule, str(found.tried)))
    print_table(("gamma", "same in every layer", "found", "schedule", "tried"), rows, title="Accuracy by schedule")


def measure_profile(asked: ProfileOptions, picturing: Picturing) -> None:
    """Measure this machine and write the profile. Raises ValueError, ImageError or OSError."""
    sizes = ascending(asked.sizes, "--sizes")
    if (asked.tasks is None) != (asked.data is None):
        raise ValueError("--tasks and --data go together: give both or neither")
    set_threads(picturing.threads)
    found = read_schedules(asked.schedules)
    store = None if asked.warm is None else WarmStore(asked.warm)
    used = {"the file of --schedules": order_of_search(asked.schedules)}
    used["the store of --warm"] = None if store is None else store.merge_order()
    order = order_for(picturing.merge_order, used)
    elastic, pixel = opened(asked.model, picturing.pixels, found, random=asked.random, merge_order=order)
    where = str(pick_device(picturing.device))
    reduced = elastic if store is None else timed_model(store, elastic)
    of_levels = wanted_levels(asked.gammas, asked.experts, reduced)  # a pruning model knows other numbers
    labelled = (
        {}
        if asked.tasks is None or asked.data is None
        else _profiled(elastic, pixel, asked.tasks, asked.data, picturing)
    )
    chosen = _number_type(asked.number_type, elastic, pixel, labelled, where, asked.compiler, packed=store is None)
    if reduced is not elastic and labelled:
        raise ValueError("a pruning model answers the warmed task alone: leave out --tasks and --data")
    runner = ElasticRunner(
        reduced, pixel, device=where, number_type=chosen, compiler=asked.compiler, packed=store is None
    )
    served: dict[str, tuple[ServedTask, LabelledImages]] = {
        name: (runner.prepare(one.weights, one.spec.prompt_mode), some) for name, (one, some) in labelled.items()
    }
    with steps() as on_step:
        profile = profiler.measure(
            runner,
            gammas=of_levels,
            sizes=sizes,
            mode=asked.mode,
            tasks=served,
            repeats=asked.repeats,
            on_step=on_step,
        )
    if store is not None:
        profile = warmed_profile(profile, store.common().task, store.profiled())
    if reduced is not elastic:  # the model that is served beside the pruning ones is what a server knows itself by
        vanilla = ElasticRunner(elastic, pixel, device=where, number_type=chosen)
        profile = dataclasses.replace(profile, key=profiler.machine_key(vanilla))
    write_atomically(asked.out, profile.to_json())
    pictures = next((some for _, some in labelled.values()), None)
    similarity_L: tuple[float, ...] = ()
    if pictures and not elastic.expert_layers:
        similarity_L = profiler.key_similarity(runner, pictures.spread(64))
    draw(profile, similarity_L, asked.out.with_suffix(".png"))
    _print_profile(profile)
    if similarity_L:
        typer.echo("mean cosine of keys by layer: " + " ".join(f"{value:.2f}" for value in similarity_L))


def _print_profile(profile: Profile) -> None:
    key = profile.key
    largest = profile.sizes[-1]
    print_table(
        ("gamma", *profile.accuracy, *(f"img/s at {size}" for size in profile.sizes), f"MB at {largest}"),
        [
            (
                said(gamma, profile.experts),
                *(f"{share[gamma]:.1%}" if gamma <= 0 or share[gamma] else "-" for share in profile.accuracy.values()),
                *(f"{profile.capacity_per_s(gamma, size):.0f}" for size in profile.sizes),
                f"{profile.memory_bytes(gamma, largest) / 1e6:.1f}",
            )
            for gamma in profile.gammas
        ],
        title=f"{key.processor}, {key.device}, {key.threads} threads, {key.number_type}",
    )


def _number_type(
    wanted: str,
    model: ElasticViT,
    pixels: PixelSpec,
    labelled: Mapping[str, tuple[TaskFiles, LabelledImages]],
    device: str,
    compiler: str | None,
    *,
    packed: bool,
) -> NumberType:
    asked = precision.named(wanted)
    if asked is not None:
        return asked
    if wanted != "auto":
        raise ValueError(f"number type {wanted!r} is not one of auto, {', '.join(DTYPES)}")
    task, pictures = next(
        ((one.weights, some) for one, some in labelled.values()), (None, precision.noise(model.image_px))
    )
    chosen = precision.choose(
        model,
        pixels,
        pictures.spread(PRECISION_PICTURES),
        task=task,
        device=device,
        compiler=compiler,
        packed=packed,
    )
    typer.echo(chosen.said())
    return chosen.number_type
