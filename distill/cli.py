"""``isthmus distill``: from a data set to a release the cloud can serve, step by step."""

import json
import logging
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from isthmus.command_line import App, Device, Layout, Seed, Threads, listed, print_table
from isthmus.distill.by_hand_cli import ReleaseDir, add_commands, read_selection

if TYPE_CHECKING:
    from isthmus.distill.training.loop import EpochReport

app = App(
    "isthmus distill",
    help="Train the teacher; distil, export and evaluate students.\n\n"
    "A release is one folder. 'teacher' begins it and 'student' finishes it. Then 'isthmus cloud serve --release' "
    "personalises students from what devices send. 'select', 'student --selection', 'compress' and 'export' do by "
    "hand, step by step, what the cloud does for a device. A training that was stopped continues when it is run again.",
    extra="train",
    log_level=logging.INFO,
)

DataDir = Annotated[Path, typer.Option("--data", help="A data set in the published layout of CREMA-D or AVE.")]
Weights = Annotated[
    Path | None,
    typer.Option(
        help="ImageNet weights of the trunk: torchvision's .pth, safetensors with its names, or a folder with a file "
        "per trunk. Default: random weights."
    ),
]
_SHOWN_DAMAGE = 20


@app.command(
    resumes=True, example="isthmus distill teacher --data clips/CREMA-D --release release --private-actors 1001,1002"
)
def teacher(
    data: DataDir,
    release: ReleaseDir,
    preset: Annotated[
        Literal["thesis", "small", "smoke", "demo", "tiny"],
        typer.Option(help="Sizes and schedules: smoke takes minutes, tiny seconds (to try the commands)."),
    ] = "small",
    layout: Layout = "auto",
    private_actors: Annotated[
        str, typer.Option(help="Actors that are kept private, with commas. Each becomes one client.")
    ] = "",
    private_list: Annotated[
        Path | None,
        typer.Option(help="Published list of private clips: AVE's testSet.txt, or a CSV file of clip and label."),
    ] = None,
    split: Annotated[Path | None, typer.Option(help="A split that 'isthmus data split' wrote.")] = None,
    held_out: Annotated[
        float | None,
        typer.Option(help="Share of the public clips held out to weigh the two branches. Default: the preset's."),
    ] = None,
    balance: Annotated[
        Literal["unimodal", "ogm-ge", "joint"] | None,
        typer.Option(
            help="Train each branch alone; both at once and balanced; or both and the head at once by plain "
            "cross-entropy, as the paper has it. Default: the preset's."
        ),
    ] = None,
    sound_trunk: Annotated[
        str | None,
        typer.Option(help="Pretrained trunk for sound: 'speech-lstm' if its package is installed, or its file."),
    ] = None,
    picture_trunk: Annotated[
        str | None,
        typer.Option(help="The same for pictures: 'efficientnet-lite0', or its file. Both are given, or neither."),
    ] = None,
    student_trunk: Annotated[
        Literal["resnet18", "resnet18-quarter"] | None,
        typer.Option(
            help="With pretrained trunks: the network of a student that is distilled from them. Default: the student "
            "shares the trunks."
        ),
    ] = None,
    student_precision: Annotated[
        Literal["fp32", "int8"] | None,
        typer.Option(
            help="Number type of the encoders that devices get. int8: a quarter of the memory and the bytes. Each "
            "student is compared with float32 on public clips, and stays float32 if int8 loses over 1 point of "
            "accuracy or changes over 5 % of the answers. Default: int8; if the release was begun before, what it "
            "was begun with."
        ),
    ] = None,
    modality_dropout: Annotated[
        float | None,
        typer.Option(
            help="Probability that a head in training gets no sound; the same for the picture. Default: the preset's."
        ),
    ] = None,
    seed: Seed = 0,
    device: Device = "auto",
    threads: Threads = 0,
    weights: Weights = None,
) -> None:
    """Begin a release: split and decode the data, train the teacher, and run it once over the public clips.

    Needs a data set. Writes the release's folder: the recipe, the split, decoded clips, the teacher and its outputs.
    Without private actors or a list, a tenth of the clips is drawn as private, class by class, and two clients share
    the classes between them, as in the paper.
    """
    from isthmus.distill.models.trunk import weights_file
    from isthmus.distill.prepare import (
        begin_release,
        begun_precision,
        choose_split,
        find_trunks,
        read_data,
        recipe_for,
    )
    from isthmus.distill.teacher.teach import cache_teacher_outputs, train_teacher
    from isthmus.distill.training.loop import pick_device, set_threads
    from isthmus.distill.training.progress import EpochBars, bars, save_loss_curves

    set_threads(threads)
    target = pick_device(device)
    listing = read_data(data, layout)
    if listing.incomplete:
        typer.echo(f"{len(listing.incomplete)} clips have sound or picture alone: training leaves them out", err=True)
    chosen = choose_split(
        listing, private_actors=listed(private_actors), private_list=private_list, split_file=split, seed=seed
    )
    trunks, trunk_files = find_trunks(sound_trunk, picture_trunk) or (None, None)
    precision = student_precision or begun_precision(release) or "int8"
    recipe = recipe_for(listing, preset, held_out, balance, trunks, modality_dropout, student_trunk, precision)
    begun = begin_release(release, listing, recipe, chosen)
    typer.echo(f"{len(begun.public.names)} public clips, {len(begun.public.skipped)} skipped", err=True)
    for damage in begun.public.skipped[:_SHOWN_DAMAGE]:
        typer.echo(f"skipped: {damage.name}: {damage.reason}", err=True)
    if len(begun.public.skipped) > _SHOWN_DAMAGE:
        typer.echo(f"... and {len(begun.public.skipped) - _SHOWN_DAMAGE} more; see 'isthmus data check'", err=True)
    with bars() as progress:
        watch = EpochBars(progress, len(begun.public.names))
        losses = train_teacher(
            begun,
            seed=seed,
            device=target,
            weights=weights_file(weights, recipe.teacher_trunk),
            trunks=trunk_files,
            watch=watch,
            bars=progress,
        )
        if losses:
            save_loss_curves(begun.teacher_path.parent, losses, "teacher")
        cache_teacher_outputs(begun, target, progress)
    typer.echo(f"teacher: {begun.teacher_path}")


@app.command(resumes=True, example="isthmus distill student --release release")
def student(
    release: ReleaseDir,
    selection: Annotated[
        Path | None,
        typer.Option(help="Distil on this selection (of 'select') in place of all public clips. Needs --out."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write the personal student to.")] = None,
    seed: Seed = 0,
    device: Device = "auto",
    threads: Threads = 0,
    weights: Weights = None,
) -> None:
    """Distil a student: on all public clips (AllDistill), or a personal one on a selection.

    Needs a release with a trained teacher. Without --selection and with seed 0 it finishes the release: it writes the
    base student, its heads for every compression ratio, and the ONNX files that devices fetch. With --selection it
    writes student.safetensors to --out.
    """
    from isthmus.distill.models.trunk import weights_file
    from isthmus.distill.release import Release, save_weights
    from isthmus.distill.student.base import make_base, make_student
    from isthmus.distill.student.int8 import read_measure
    from isthmus.distill.student.personalise import distil_round
    from isthmus.distill.training.loop import pick_device, set_threads
    from isthmus.distill.training.progress import EpochBars, bars, save_loss_curves

    if selection is not None and out is None:
        raise typer.BadParameter("it needs --out, the folder of the new student", param_hint="'--selection'")
    set_threads(threads)
    target = pick_device(device)
    opened = Release.open(release)
    with bars() as progress:
        watch = EpochBars(progress, len(opened.public.names))
        losses: list[float] = []

        def on_epoch(stage: str, report: "EpochReport") -> None:
            losses.append(report.loss)
            watch(stage, report)

        if selection is None or out is None:
            file = None if opened.recipe.shares_encoders else weights_file(weights, opened.recipe.student_trunk)
            make_student(opened, seed, target, lambda report: on_epoch("AllDistill", report), file)
            folder = opened.student_path(seed).parent / f"{seed}-loss"
            if seed == 0:
                make_base(opened, target, lambda report: watch("heads", report))
                typer.echo(f"base student: {opened.base_dir}")
                if (in_int8 := read_measure(opened.base_dir)) is not None:
                    typer.echo(str(in_int8))
            else:
                typer.echo(f"student: {opened.student_path(seed)}")
        else:
            out.mkdir(parents=True, exist_ok=True)
            personal = distil_round(
                opened,
                read_selection(selection, opened),
                round=0,
                rounds=1,
                seed=seed,
                checkpoint=out / "checkpoint.safetensors",
                on_epoch=lambda report: on_epoch("personalise", report),
                device=target,
            )
            save_weights(personal, out / "student.safetensors")
            folder = out
            typer.echo(f"student: {out / 'student.safetensors'}")
    if losses:
        save_loss_curves(folder, {"distillation": losses}, "student")


@app.command(example="isthmus distill evaluate --release release --data clips/CREMA-D --out accuracy.json")
def evaluate(
    release: ReleaseDir,
    data: DataDir,
    layout: Layout = "auto",
    student_file: Annotated[
        Path | None,
        typer.Option("--student", help="The student: a student.safetensors file. Default: the base student."),
    ] = None,
    heads: Annotated[
        Path | None, typer.Option(help="Its heads: a heads.safetensors file. Default: the base student's.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file to write the accuracies to as well.")] = None,
    device: Device = "auto",
    threads: Threads = 0,
) -> None:
    """Measure the accuracy of teacher and student on every client's private clips.

    Needs a finished release and its data set. Prints each way of answering, and the accuracy without sound or without
    picture. Writes --out if it is given.
    """
    import numpy as np

    from isthmus.data.files import write_atomically
    from isthmus.distill.models.heads import HeadBank
    from isthmus.distill.prepare import decode, read_data, release_split
    from isthmus.distill.release import Release, load_weights
    from isthmus.distill.student.evaluate import accuracy, bank_probabilities, by_captured, student_outputs
    from isthmus.distill.teacher.teach import teacher_accuracy
    from isthmus.distill.training.loop import pick_device, set_threads

    set_threads(threads)
    target = pick_device(device)
    opened = Release.open(release)
    listing = read_data(data, layout)
    encoders = opened.student(0)
    if student_file is not None:
        encoders = load_weights(opened.new_student(), student_file, "isthmus distill student")
    bank = HeadBank.load(heads or opened.base_dir / "heads.safetensors")
    figures: dict[str, dict[str, float]] = {}
    for client, names in release_split(opened).clients.items():
        clips = decode(listing, names, opened.recipe, release / "private")
        labels_N = np.asarray(clips.labels_N)
        taught = teacher_accuracy(opened.teacher, clips, target)
        outputs = student_outputs(encoders, opened.teacher_head, clips, target)
        figures[client] = {
            "clips": taught.clips,
            "teacher": taught.joint,
            "teacher, no picture": taught.no_visual,
            "teacher, no sound": taught.no_audio,
            "teacher, sound branch": taught.audio,
            "teacher, picture branch": taught.visual,
            "student, teacher head": accuracy(outputs.probabilities_NC, labels_N),
        }
        for ratio in bank.ratios:

            def share_right(captured: Any, ratio: float, outputs: Any = outputs, labels_N: Any = labels_N) -> float:
                return accuracy(bank_probabilities(bank, outputs, ratio, captured), labels_N)

            figures[client] |= by_captured(f"student, ratio {ratio:g}", partial(share_right, ratio=ratio))
    rows = []
    for row in next(iter(figures.values())):
        scale, digits = (1, 0) if row == "clips" else (100, 1)
        rows.append((row, *(f"{scale * figures[client][row]:.{digits}f}" for client in figures)))
    print_table(("", *figures), rows, title="Accuracy, %", right=True)
    if out is not None:
        write_atomically(out, json.dumps({"release": opened.recipe.name, **figures}, indent=1))


add_commands(app)
