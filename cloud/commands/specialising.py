"""The work of ``isthmus elastic experts``: make experts of a dense model, and learn several tasks with them."""

import dataclasses
from pathlib import Path

import typer

from isthmus.cloud.commands.options import ExpertOptions, Picturing, ascending
from isthmus.cloud.commands.preparing import steps
from isthmus.cloud.elastic.model.runner import ElasticRunner
from isthmus.cloud.elastic.prepare import joint, profiler
from isthmus.cloud.elastic.prepare.inputs import fitting, opened, pictures_of, split_off
from isthmus.cloud.elastic.prepare.upcycling import save, with_experts
from isthmus.cloud.elastic.scheduling.levels import levels, said
from isthmus.cloud.elastic.scheduling.merge_order import order_for
from isthmus.cloud.elastic.tasks.files import TaskFiles, order_of_task
from isthmus.cloud.elastic.tasks.recipes import TaskRecipe, read_recipe
from isthmus.cloud.elastic.tasks.router import windows
from isthmus.cloud.elastic.tasks.task import TaskSpec
from isthmus.command_line import print_table
from isthmus.data.images import Columns, LabelledImages, PixelSpec
from isthmus.distill.training.loop import EpochReport, pick_device, set_threads
from isthmus.distill.training.progress import EpochBars, bars, save_loss_curves


def learn_experts(asked: ExpertOptions, picturing: Picturing) -> None:
    """Learn the tasks and write model and tasks. Raises ValueError, ImageError, CheckpointError, TrainingDiverged or
    OSError."""
    set_threads(picturing.threads)
    names = [read_recipe(text.partition("@")[0]).name for text in asked.task]
    # Experts are learned without merging, and all accuracies are measured again: another order may be asked for.
    kept = {name: order_of_task(asked.out / "tasks", name) for name in names}
    order = picturing.merge_order or order_for(None, kept)
    dense, pixels = opened(asked.model, picturing.pixels, merge_order=order)
    gammas = fitting(ascending(asked.measured, "--measured"), dense)
    if any(gamma > 0 for gamma in gammas):
        raise ValueError("--measured: gammas above 0 need prompts, which 'experts' does not learn")
    windows(len(asked.task), asked.experts, asked.window or asked.experts)
    model = with_experts(dense, experts=asked.experts, k=asked.used, ratio=asked.ratio)
    given = [_task(text, asked.data, pixels, picturing) for text in asked.task]
    learning, held = [], {}
    for recipe, labelled in given:
        part, held[recipe.name] = split_off(labelled, picturing.held, picturing.seed)
        learning.append(joint.JointTask(recipe.name, len(recipe.classes), part))
    joint.check_tasks(model, learning)
    config = joint.JointConfig(
        train=dataclasses.replace(
            joint.JOINT,
            epochs=asked.epochs,
            batch_size=asked.batch_size,
            learning_rate=asked.learning_rate,
            augment=asked.augment,
        ),
        router=asked.router,
        start=asked.start,
        window=asked.window,
        seed=picturing.seed,
    )
    where = pick_device(picturing.device)
    units = dense.blocks[0].mlp.fc1.out_features
    pictures = asked.pictures or max(len(task.labelled) for task in learning)
    heads = joint.first_heads(dense, pixels, learning, device=where, seed=picturing.seed)
    losses: list[float] = []
    with bars() as progress:
        watch = EpochBars(progress, pictures * len(learning), "pictures")
        work = asked.out / "learning"

        def on_epoch(report: EpochReport) -> None:
            losses.append(report.loss)
            watch("tasks", report)

        model, weights, _ = joint.learn_together(
            model,
            pixels,
            learning,
            config,
            heads=heads,
            units=units,
            pictures=pictures,
            device=where,
            checkpoint=work / "joint.safetensors",
            on_epoch=on_epoch,
        )
    save_loss_curves(work, {"tasks": losses}, "experts")
    files = save(model, asked.out / "model", source=asked.model, pixels=pixels, units=units)
    runner = ElasticRunner(model, pixels, device=str(where))
    measured = levels(gammas, range(1, asked.used + 1), asked.used)
    served = {name: (runner.prepare(weights[name]), some) for name, some in held.items()}
    with steps() as on_step:
        shares = profiler.measure_accuracy(runner, served, measured, on_step=on_step)
    for recipe, _ in given:
        spec = TaskSpec(recipe.name, recipe.classes, accuracy=shares[recipe.name])
        TaskFiles(recipe, spec, weights[recipe.name]).save(asked.out / "tasks", order)
    print_table(
        ("gamma", *shares),
        [(said(level, asked.used), *(f"{of[level]:.1%}" for of in shares.values())) for level in measured],
        title="accuracy on the pictures held out",
    )
    typer.echo(
        f"written: {asked.out / 'model'} ({files.shape.layers} x {files.shape.experts} experts of "
        f"{files.expert_bytes} bytes) and {asked.out / 'tasks'}"
    )


def _task(text: str, data: Path, pixels: PixelSpec, picturing: Picturing) -> tuple[TaskRecipe, LabelledImages]:
    """Read TASK or TASK@DATA. Raises ValueError or ImageError."""
    source, _, other = text.partition("@")
    recipe = read_recipe(source)
    columns = Columns(picturing.image_column, picturing.label_column)
    labelled = pictures_of(Path(other) if other else data, pixels, picturing.limit, picturing.seed, columns)
    return recipe, recipe.apply(labelled)
