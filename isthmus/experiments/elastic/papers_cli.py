"""``isthmus experiment`` prompts, schedules, averages and prodigy: tables and figures that two papers have."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer
from typer import Option

from isthmus.cloud.commands.options import MergeOrderOption, WarmupOptions
from isthmus.command_line import App, whole_numbers

Out = Annotated[Path, Option(help="Folder to write to: cells, result.json, result.md and pictures.")]
Seeds = Annotated[str, Option(help="Seeds, with commas.")]


def add_commands(app: App) -> None:
    """Add the commands of this file to the ``isthmus experiment`` command."""
    app.command(
        "prompts",
        resumes=True,
        example="isthmus experiment prompts --model vit.safetensors --pixels cifar10 --data train.parquet --test "
        "test.parquet --out prompts",
    )(prompts)
    app.command(
        "schedules",
        resumes=True,
        example="isthmus experiment schedules --model vit.safetensors --pixels cifar10 --data test.parquet --out "
        "schedules",
    )(schedules)
    app.command(
        "averages",
        resumes=True,
        example="isthmus experiment averages --model vit.safetensors --pixels cifar10 --data train.parquet --test "
        "test.parquet --numbers 8,24 --out averages",
    )(averages)
    app.command(
        "prodigy",
        example="isthmus experiment prodigy --profile profile.json --warmed warm/result.json --trace trace.csv --out "
        "prodigy",
    )(prodigy)


@dataclass(frozen=True)
class PromptsOptions:
    """Options of ``isthmus experiment prompts``."""

    model: Annotated[str, Option(help="A vision transformer: its shape, or with --task details the backbone itself.")]
    data: Annotated[Path, Option(help="CIFAR-10's pictures to learn from, a Parquet file.")]
    test: Annotated[Path, Option(help="CIFAR-10's pictures to test on, a Parquet file.")]
    pixels: Annotated[str | None, Option(help="cifar10, imagenet or half. Default: the model's.")] = None
    task: Annotated[
        Literal["unseen", "details"],
        Option(
            help="unseen: a new backbone learns some classes, and prompts the others. details: readings of generated "
            "marks, on --model as it is."
        ),
    ] = "unseen"
    known: Annotated[int, Option(min=2, max=8, help="Classes that the backbone learns.")] = 5
    backbone_pictures: Annotated[int, Option(min=2, help="Pictures that the backbone learns from.")] = 25_000
    backbone_epochs: Annotated[int, Option(min=1, help="Epochs of learning the backbone.")] = 20
    backbone_merges: Annotated[
        int, Option(min=0, help="Merges per layer in all but the last epoch of the backbone, to save time.")
    ] = 0
    patch_px: Annotated[int | None, Option(min=1, help="Side of the new backbone's patches. Default: the model's.")] = (
        None
    )
    pictures: Annotated[int, Option(min=2, help="Pictures that head and prompts learn from.")] = 5_000
    tested: Annotated[int, Option(min=2, help="Pictures to test on.")] = 2_500
    epochs: Annotated[int, Option(min=1, help="Epochs of learning prompts.")] = 10
    batch_size: Annotated[int, Option(min=2, help="Pictures per step of learning prompts.")] = 32
    learning_rate: Annotated[float, Option(help="Learning rate of prompts.")] = 1e-3
    gammas: Annotated[str, Option(help="Numbers of prompts per layer, ascending, with commas.")] = "2,4,8"
    merged: Annotated[str, Option(help="Merges per layer at which the head alone is tested.")] = "8,16,24"
    marks: Annotated[int, Option(min=1, max=4, help="Details per picture, with --task details.")] = 2
    merge_order: MergeOrderOption = None
    seeds: Seeds = "0,1,2"
    threads: Annotated[int, Option(min=1, help="Threads of torch.")] = 1


def prompts(asked: PromptsOptions, *, out: Out) -> None:
    """Learn prompts for a task that the backbone has not seen: from scratch, and from those for a smaller gamma.

    Needs a vision transformer and CIFAR-10. Writes --out: accuracies, curves, the backbones, and each seed's task in
    tasks-SEED, for 'isthmus experiment schedules'. A run that was stopped continues.
    """
    import torch

    from isthmus.experiments.elastic.prompts import Setup, markdown, run

    torch.set_num_threads(asked.threads)
    setup = Setup(
        asked.model,
        asked.data,
        asked.test,
        asked.pixels,
        task=asked.task,
        known=asked.known,
        backbone_pictures=asked.backbone_pictures,
        backbone_epochs=asked.backbone_epochs,
        backbone_merges=asked.backbone_merges,
        patch_px=asked.patch_px,
        pictures=asked.pictures,
        tested=asked.tested,
        epochs=asked.epochs,
        batch_size=asked.batch_size,
        learning_rate=asked.learning_rate,
        gammas=whole_numbers(asked.gammas, "--gammas"),
        merged=tuple(-number for number in reversed(whole_numbers(asked.merged, "--merged"))),
        marks=asked.marks,
    )
    seeds = whole_numbers(asked.seeds, "--seeds")
    result = run(setup, seeds=seeds, out=out, report=_say, merge_order=asked.merge_order)
    typer.echo(markdown(result))
    typer.echo(f"written: {out / 'result.json'}, {out / 'result.md'} and {out / 'learning.png'}")


@dataclass(frozen=True)
class SchedulesOptions:
    """Options of ``isthmus experiment schedules``."""

    model: Annotated[str, Option(help="The vision transformer, as for 'isthmus elastic profile'.")]
    data: Annotated[Path, Option(help="Labelled pictures that the model has not seen, a Parquet file.")]
    pixels: Annotated[str | None, Option(help="cifar10, imagenet or half. Default: the model's.")] = None
    task: Annotated[str, Option(help="A built-in task or a recipe file, answered by the model's own head.")] = "cifar10"
    tasks: Annotated[Path | None, Option(help="Folder with one task's files, in place of --task.")] = None
    merges: Annotated[str, Option(help="Merges per layer, with commas.")] = "16,24"
    choosing: Annotated[int, Option(min=2, help="Pictures that choose the best schedule.")] = 1_000
    tested: Annotated[int, Option(min=2, help="Other pictures, on which all are tested.")] = 1_500
    size: Annotated[int, Option(min=1, help="Pictures per batch, for the throughput.")] = 32
    repeats: Annotated[int, Option(min=0, help="Timed batches per schedule. 0: times as measured before, if any.")] = 0
    merge_order: MergeOrderOption = None
    seeds: Seeds = "0,1,2"
    threads: Annotated[int, Option(min=1, help="Threads of torch.")] = 1


def schedules(asked: SchedulesOptions, *, out: Out) -> None:
    """Compare schedules of merging: accuracy and throughput of each, and how similar tokens are, by layer.

    Needs a vision transformer and labelled pictures. Writes --out; a run that was stopped continues. Time the
    schedules on a quiet machine.
    """
    import torch

    from isthmus.experiments.elastic.schedules import Setup, markdown, run

    torch.set_num_threads(asked.threads)
    setup = Setup(
        asked.model,
        asked.data,
        asked.pixels,
        task=asked.task,
        tasks=asked.tasks,
        gammas=tuple(sorted(-number for number in whole_numbers(asked.merges, "--merges"))),
        choosing=asked.choosing,
        tested=asked.tested,
        size=asked.size,
        repeats=asked.repeats,
    )
    seeds = whole_numbers(asked.seeds, "--seeds")
    result = run(setup, seeds=seeds, out=out, report=_say, merge_order=asked.merge_order)
    typer.echo(markdown(result))
    typer.echo(f"written: {result['task']}.json, {result['task']}.md and a picture in {out}")


def averages(
    asked: WarmupOptions,
    *,
    test: Annotated[Path, Option(help="Labelled pictures to test on, used neither to learn nor to profile.")],
    at: Annotated[str, Option(help="Merges per layer at which averages are tested. Default: those of --numbers.")] = "",
    seeds: Seeds = "0,1,2",
    test_limit: Annotated[int | None, Option(min=2, help="Test on this many pictures. Default: all.")] = None,
) -> None:
    """Average two tuned models by fixed weights, from one alone to the other alone, and test every average.

    Needs a vision transformer, labelled pictures, and two --numbers to tune for. Writes --out; a run that was stopped
    continues. 'isthmus elastic warmup ensemble' chooses weights by the profiling set instead.
    """
    from isthmus.cloud.commands.warming import Asked
    from isthmus.cloud.elastic.prepare.inputs import pictures_of
    from isthmus.data.made_by import made_by
    from isthmus.experiments.elastic.averages import Sweep, markdown, run
    from isthmus.experiments.elastic.kept import merge_order_in

    if asked.reducer != "merging":
        raise typer.BadParameter("averages are of models that merge.", param_hint="'--reducer'")
    made_by(asked.out, _say)  # before anything is learned in that folder
    given = Asked(dataclasses.replace(asked, merge_order=merge_order_in(asked.out, asked.merge_order)))
    subject = given.subject
    judged = given.recipe.apply(pictures_of(test, subject.pixels, test_limit, asked.seed, given.columns))
    sweep = Sweep(subject, judged, given.numbers, whole_numbers(at, "--at") or given.numbers, given.config)
    result = run(sweep, seeds=whole_numbers(seeds, "--seeds"), out=asked.out, report=_say)
    typer.echo(markdown(result))
    typer.echo(f"written: {asked.out / 'result.json'}, {asked.out / 'result.md'} and {asked.out / 'averages.png'}")


def prodigy(
    profile: Annotated[Path, Option(help="A profile that was measured at the numbers of the warmed models.")],
    warmed: Annotated[Path, Option(help="result.json of 'isthmus elastic warmup evaluate'.")],
    trace: Annotated[Path, Option(help="A recorded trace (CSV).")],
    out: Out,
    seeds: Seeds = "0,1,2",
    seconds: Annotated[
        int, Option(min=2, help="Seconds of the synthetic load, and at most of the recorded one.")
    ] = 600,
    window_s: Annotated[float, Option(help="Seconds of the recorded trace replayed per second.")] = 120.0,
) -> None:
    """Simulate the five systems of Prodigy's chapter on its two loads: right answers in time, and latency.

    Needs a measured profile, the result of 'isthmus elastic warmup evaluate', and a recorded trace. Writes --out.
    """
    from isthmus.experiments.elastic.prodigy import Setup, markdown, run

    setup = Setup(profile, warmed, trace, seconds, window_s)
    result = run(setup, seeds=whole_numbers(seeds, "--seeds"), out=out, report=_say)
    typer.echo(markdown(result))
    typer.echo(f"written: {out / 'result.json'}, {out / 'result.md'} and pictures")


def _say(line: str) -> None:
    typer.echo(line, err=True)
