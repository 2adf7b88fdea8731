"""``isthmus elastic``: learn prompts, search merging schedules, measure a profile; more commands are added to it."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from isthmus.cloud.commands.client import add_commands
from isthmus.cloud.commands.options import (
    Data,
    Device,
    Gammas,
    Held,
    Limit,
    Model,
    Pixels,
    Seed,
    Tasks,
    Threads,
    set_threads,
    steps,
    told,
)
from isthmus.cloud.commands.replay import replay
from isthmus.cloud.commands.warmup import app as warmup_app
from isthmus.cloud.elastic.model import schedules
from isthmus.cloud.elastic.model.runner import DTYPES, ElasticRunner, NumberType, ServedTask
from isthmus.cloud.elastic.model.vit import ElasticViT
from isthmus.cloud.elastic.prepare import precision, profiler, prompts
from isthmus.cloud.elastic.prepare.inputs import fitting, numbers, opened, pictures_of, profiling_sets, split_off
from isthmus.cloud.elastic.prepare.profile_figures import draw
from isthmus.cloud.elastic.prepare.schedule_file import read_schedules, read_search, write_search
from isthmus.cloud.elastic.scheduling.profile import Profile
from isthmus.cloud.elastic.tasks.files import TaskFiles
from isthmus.cloud.elastic.tasks.recipes import read_recipe
from isthmus.cloud.elastic.tasks.task import PROMPT_MODES, PromptMode, TaskSpec
from isthmus.cloud.elastic.warm.models import timed_model
from isthmus.cloud.elastic.warm.profiled import warmed_profile
from isthmus.cloud.elastic.warm.store import WarmStore
from isthmus.data.files import write_atomically
from isthmus.data.images import LabelledImages, PixelSpec
from isthmus.distill.training.checkpoint import state_hash
from isthmus.distill.training.loop import pick_device
from isthmus.distill.training.progress import EpochBars, bars, save_loss_curves

PRECISION_PICTURES = 1_000
"""At most so many pictures of the first task judge number types."""

app = typer.Typer(
    no_args_is_help=True,
    help="Elastic serving of one vision transformer to many image tasks.\n\n"
    "'prompts' makes a task of labelled pictures, 'schedules' finds out where to merge, 'profile' measures this "
    "machine; then 'isthmus cloud serve --elastic-model ... --elastic-profile ...' serves. What was stopped goes on "
    "where it stood when the same command is run again.",
)
app.command("replay")(replay)
add_commands(app)
app.add_typer(warmup_app, name="warmup")

ALL_GAMMAS = ",".join(map(str, profiler.GAMMAS))
ALL_SIZES = ",".join(map(str, profiler.SIZES))


@app.command("prompts")
@told
def learn_prompts(
    model: Model,
    data: Data,
    out: Annotated[Path, typer.Option(help="Folder for the task's files.")],
    task: Annotated[
        str,
        typer.Option(
            help="cifar10, animals-vehicles, animals, or a JSON file: name, classes, class_of_label (null: left out)."
        ),
    ] = "cifar10",
    mode: Annotated[str, typer.Option(help="append or replace the prompts of the layer before.")] = "append",
    gammas: Gammas = "2,4,8",
    measured: Annotated[
        str, typer.Option(help="Gammas up to 0 to measure accuracy at, with commas.")
    ] = "-20,-15,-10,-5,0",
    epochs: Annotated[int, typer.Option(min=1, help="For each number of prompts.")] = prompts.PROMPTS.epochs,
    learning_rate: float = prompts.PROMPTS.learning_rate,
    held: Held = 0.2,
    limit: Limit = None,
    pixels: Pixels = None,
    seed: Seed = 0,
    device: Device = "auto",
    threads: Threads = 0,
) -> None:
    """Learn a task: a head, then prompts for one gamma after the other, more starting from fewer."""
    if mode not in PROMPT_MODES:
        raise ValueError(f"mode {mode!r}: one of {', '.join(PROMPT_MODES)} is wanted")
    chosen_mode: PromptMode = "append" if mode == "append" else "replace"
    set_threads(threads)
    elastic, pixel = opened(model, pixels)
    recipe = read_recipe(task)
    learning, profiling = split_off(recipe.apply(pictures_of(data, elastic, limit, seed)), held, seed)
    config = prompts.PromptConfig(
        numbers(gammas),
        chosen_mode,
        prompts=dataclasses.replace(prompts.PROMPTS, epochs=epochs, learning_rate=learning_rate),
        seed=seed,
    )
    wanted = fitting((*numbers(measured), *config.gammas), elastic)
    where = pick_device(device)
    work = out / f"{recipe.name}.learning"
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
    served = runner.prepare(weights, chosen_mode)
    with steps() as on_step:
        shares = profiler.measure_accuracy(runner, {recipe.name: (served, profiling)}, wanted, on_step=on_step)
    spec = TaskSpec(recipe.name, recipe.classes, chosen_mode, shares[recipe.name])
    path = TaskFiles(recipe, spec, weights).save(out)
    table = Table("gamma", "right", title=f"{recipe.name}, {len(profiling)} pictures held back", title_justify="left")
    for gamma, share in spec.accuracy.items():
        table.add_row(str(gamma), f"{share:.1%}")
    Console().print(table)
    Console().print(f"written: {path}", highlight=False, soft_wrap=True)


@app.command("schedules")
@told
def search_schedules(
    model: Model,
    data: Data,
    tasks: Tasks,
    out: Annotated[Path, typer.Option(help="JSON file: what was tried, and the best schedule of each gamma.")],
    gammas: Gammas = "-20,-15,-10,-5",
    evaluations: Annotated[int, typer.Option(min=1, help="At most so many schedules for each gamma.")] = 40,
    held: Held = 0.2,
    limit: Limit = None,
    pixels: Pixels = None,
    seed: Seed = 0,
    device: Device = "auto",
    threads: Threads = 0,
) -> None:
    """Find at which layers to merge: the best mean accuracy over the tasks, at no more operations than alike layers."""
    set_threads(threads)
    elastic, pixel = opened(model, pixels)
    where = str(pick_device(device))
    labelled = profiling_sets(elastic, tasks, data, held, limit, seed)
    pictures = {name: some.digest() for name, (_, some) in labelled.items()}
    state = read_search(out, key=[state_hash([elastic]), pictures])
    table = Table("gamma", "alike layers", "found", "schedule", "tried", title="Schedules", title_justify="left")
    with steps() as on_step:
        for gamma in fitting(numbers(gammas), elastic):
            tried = state["tried"].setdefault(str(gamma), [])
            known = {tuple(schedule): share for schedule, share in tried}

            def scheduled(schedule: schedules.Schedule, gamma: int = gamma) -> ElasticViT:
                return ElasticViT(elastic.vit, {gamma: schedule})

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
                    write_search(out, state)
                on_step(f"gamma {gamma}", min(len(tried), evaluations), evaluations)

            found = schedules.search(
                gamma,
                elastic.depth,
                evaluate,
                operations,
                most=elastic.tokens,
                known=known,
                max_evaluations=evaluations,
                on_evaluated=keep,
            )
            state["schedules"][str(gamma)] = found.schedule
            write_search(out, state)
            table.add_row(
                str(gamma),
                f"{found.uniform_accuracy:.2%}",
                f"{found.accuracy:.2%}",
                " ".join(map(str, found.schedule)),
                str(found.tried),
            )
    Console().print(table)


@app.command("profile")
@told
def measure_profile(
    model: Model,
    out: Annotated[Path, typer.Option(help="The profile, JSON; a PNG with the same name is drawn beside it.")],
    tasks: Annotated[Path | None, typer.Option(help="Folder of tasks to measure the accuracy of.")] = None,
    data: Annotated[Path | None, typer.Option(help="Labelled pictures for the tasks: Parquet.")] = None,
    schedule_file: Annotated[
        Path | None, typer.Option("--schedules", help="What 'isthmus elastic schedules' wrote.")
    ] = None,
    gammas: Gammas = ALL_GAMMAS,
    sizes: Annotated[str, typer.Option(help="Batch sizes, with commas between.")] = ALL_SIZES,
    mode: Annotated[str, typer.Option(help="Whose times count above gamma 0: append or replace.")] = "append",
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    number_type: Annotated[
        str, typer.Option(help="float32, bfloat16, int8, or auto to measure which serves best.")
    ] = "auto",
    compiler: Annotated[str | None, typer.Option(help="A backend of torch.compile, such as inductor.")] = None,
    warm: Annotated[
        Path | None,
        typer.Option(help="Warmed models, whose accuracies take the vanilla ones' place; where they prune, times too."),
    ] = None,
    random: Annotated[bool, typer.Option(help="A timm name without its weights: speed alone is measured.")] = False,
    held: Held = 0.2,
    limit: Limit = None,
    pixels: Pixels = None,
    seed: Seed = 0,
    device: Device = "auto",
    threads: Threads = 0,
) -> None:
    """Measure accuracy by task and gamma, time and memory by gamma and batch size, on this machine."""
    if mode not in PROMPT_MODES:
        raise ValueError(f"mode {mode!r}: one of {', '.join(PROMPT_MODES)} is wanted")
    if (tasks is None) != (data is None):
        raise ValueError("--tasks and --data go together")
    set_threads(threads)
    found = read_schedules(schedule_file)
    elastic, pixel = opened(model, pixels, found, random=random)
    where = str(pick_device(device))
    labelled = {} if tasks is None or data is None else profiling_sets(elastic, tasks, data, held, limit, seed)
    store = None if warm is None else WarmStore(warm)
    chosen = _number_type(number_type, elastic, pixel, labelled, where, compiler, packed=store is None)
    reduced = elastic if store is None else timed_model(store, elastic)
    if reduced is not elastic and labelled:
        raise ValueError("pruning is for the warmed task alone: leave --tasks and --data out")
    runner = ElasticRunner(reduced, pixel, device=where, number_type=chosen, compiler=compiler, packed=store is None)
    served: dict[str, tuple[ServedTask, LabelledImages]] = {
        name: (runner.prepare(one.weights, one.spec.prompt_mode), some) for name, (one, some) in labelled.items()
    }
    with steps() as on_step:
        profile = profiler.measure(
            runner,
            gammas=fitting(numbers(gammas), reduced),
            sizes=numbers(sizes),
            mode="append" if mode == "append" else "replace",
            tasks=served,
            repeats=repeats,
            on_step=on_step,
        )
    if store is not None:
        profile = warmed_profile(profile, store.common().task, store.profiled())
    if reduced is not elastic:  # the model that is served beside the pruning ones is what a server knows itself by
        vanilla = ElasticRunner(elastic, pixel, device=where, number_type=chosen)
        profile = dataclasses.replace(profile, key=profiler.machine_key(vanilla))
    write_atomically(out, profile.to_json())
    pictures = next((some for _, some in labelled.values()), None)
    similarity_L = profiler.key_similarity(runner, pictures.only(np.arange(min(64, len(pictures))))) if pictures else ()
    draw(profile, similarity_L, out.with_suffix(".png"))
    Console(width=None if Console().is_terminal else 160).print(_table(profile))
    if similarity_L:
        Console().print("mean cosine of keys by layer: " + " ".join(f"{value:.2f}" for value in similarity_L))


def _table(profile: Profile) -> Table:
    key = profile.key
    title = f"{key.processor}, {key.device}, {key.threads} threads, {key.number_type}"
    largest = profile.sizes[-1]
    rates = [f"img/s at {size}" for size in profile.sizes]
    table = Table("gamma", *profile.accuracy, *rates, f"MB at {largest}", title=title, title_justify="left")
    for gamma in profile.gammas:
        table.add_row(
            str(gamma),
            *(f"{shares[gamma]:.1%}" if gamma <= 0 or shares[gamma] else "-" for shares in profile.accuracy.values()),
            *(f"{profile.capacity_per_s(gamma, size):.0f}" for size in profile.sizes),
            f"{profile.memory_bytes(gamma, largest) / 1e6:.1f}",
        )
    return table


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
        raise ValueError(f"number type {wanted!r}: one of auto, {', '.join(DTYPES)} is wanted")
    task, pictures = next(
        ((one.weights, some) for one, some in labelled.values()), (None, precision.noise(model.image_px))
    )
    chosen = precision.choose(
        model,
        pixels,
        pictures.only(np.arange(min(PRECISION_PICTURES, len(pictures)))),
        task=task,
        device=device,
        compiler=compiler,
        packed=packed,
    )
    Console().print(chosen.said(), highlight=False, soft_wrap=True)
    return chosen.number_type
