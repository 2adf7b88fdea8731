"""``isthmus distill``: from a data set to a release the cloud can serve, step by step."""

import json
import logging
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from isthmus.data.cache.build import CacheFull
from isthmus.data.files import write_atomically
from isthmus.distill import release as releases
from isthmus.distill.models.heads import HeadBank
from isthmus.distill.prepare import begin_release, choose_split, decode, read_data, recipe_for, release_split
from isthmus.distill.recipes import PRESETS
from isthmus.distill.release import Release, ReleaseError, load_weights, save_weights
from isthmus.distill.selection import STRATEGIES, Selection, Wanted
from isthmus.distill.student.base import make_base, make_student
from isthmus.distill.student.evaluate import StudentOutputs, accuracy, bank_probabilities, by_captured, student_outputs
from isthmus.distill.student.export import ExportError, export_student
from isthmus.distill.student.personalise import distil_round, select_round, train_heads
from isthmus.distill.teacher.teach import cache_teacher_outputs, teacher_accuracy, train_teacher
from isthmus.distill.training.checkpoint import CheckpointError
from isthmus.distill.training.loop import EpochReport, TrainingDiverged, pick_device
from isthmus.distill.training.progress import EpochBars, bars, save_loss_curves
from isthmus.proto.messages import Captured

app = typer.Typer(
    no_args_is_help=True,
    help="Train the teacher, distil students, export and evaluate them.\n\n"
    "A release is one folder. 'teacher' begins it, 'student' finishes it; then 'isthmus cloud serve --release' "
    "personalises students from what devices send. 'select', 'student --selection', 'compress' and 'export' do by "
    "hand, step by step, what the cloud does for a device. Every training can be stopped and run again: it goes on "
    "where it stood.",
)

ReleaseDir = Annotated[Path, typer.Option("--release", help="The release's folder.")]
DataDir = Annotated[Path, typer.Option("--data", help="A data set in CREMA-D's or AVE's published layout.")]
Seed = Annotated[int, typer.Option(help="Seed of every random choice.")]
Device = Annotated[str, typer.Option(help="'auto' takes a GPU where there is one; or 'cpu', 'cuda'.")]
Threads = Annotated[int, typer.Option(help="CPU threads of torch; 0 leaves torch's own choice.")]
Weights = Annotated[
    Path | None,
    typer.Option(help="ImageNet weights of the trunk: safetensors in torchvision's names. Default: random."),
]
SelectionFile = Annotated[Path, typer.Option("--selection", help="What 'isthmus distill select' wrote.")]

EXPECTED = (ReleaseError, CheckpointError, TrainingDiverged, ExportError, CacheFull, ValueError, KeyError, OSError)


def _told(command: Callable[..., None]) -> Callable[..., None]:
    """Turns the errors a user can act on into one line and exit code 1."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        try:
            command(*args, **kwargs)
        except EXPECTED as error:
            typer.echo(f"isthmus distill: {error.args[0] if error.args else error}", err=True)
            raise typer.Exit(1) from error

    return run


def _compute(device: str, threads: int) -> torch.device:
    if threads:
        torch.set_num_threads(threads)
    return pick_device(device)


@app.command()
@_told
def teacher(
    data: DataDir,
    release: ReleaseDir,
    preset: Annotated[str, typer.Option(help=f"Sizes and schedules: {', '.join(PRESETS)}.")] = "small",
    layout: Annotated[str, typer.Option(help="'auto', 'crema-d' or 'ave'.")] = "auto",
    private_actors: Annotated[
        str, typer.Option(help="Comma-separated actors kept private, one client each (split by person).")
    ] = "",
    private_list: Annotated[
        Path | None,
        typer.Option(help="Published list of private clips: AVE's testSet.txt, or a CSV of clip and label."),
    ] = None,
    held_out: Annotated[
        float | None,
        typer.Option(help="Share of the public clips kept for weighing the two branches; default: the preset's."),
    ] = None,
    balance: Annotated[
        str | None,
        typer.Option(help="'unimodal' (each branch alone) or 'ogm-ge' (at once, balanced); default: the preset's."),
    ] = None,
    seed: Seed = 0,
    device: Device = "auto",
    threads: Threads = 0,
    weights: Weights = None,
) -> None:
    """Begin a release: split and decode the data, train the teacher, and run it once over the public clips.

    Without private actors or a list, a tenth of the clips is drawn as private, class by class, and two clients share
    the classes between them, as in the paper.
    """
    target = _compute(device, threads)
    listing = read_data(data, layout)
    actors = [actor.strip() for actor in private_actors.split(",") if actor.strip()]
    if listing.incomplete:
        typer.echo(f"{len(listing.incomplete)} clips have sound or picture alone: training leaves them out", err=True)
    split = choose_split(listing, private_actors=actors, private_list=private_list, seed=seed)
    begun = begin_release(release, listing, recipe_for(listing, preset, held_out, balance), split)
    typer.echo(f"{len(begun.public.names)} public clips, {len(begun.public.skipped)} skipped", err=True)
    with bars() as progress:
        watch = EpochBars(progress, len(begun.public.names))
        losses = train_teacher(begun, seed=seed, device=target, weights=weights, watch=watch, bars=progress)
        save_loss_curves(begun.teacher_path.parent, losses, "teacher")
        cache_teacher_outputs(begun, target, progress)
    typer.echo(f"teacher: {begun.teacher_path}")


@app.command()
@_told
def student(
    release: ReleaseDir,
    selection: Annotated[
        Path | None, typer.Option(help="Distil on this selection (from 'select') instead of on all public clips.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the student; needed with --selection.")] = None,
    seed: Seed = 0,
    device: Device = "auto",
    threads: Threads = 0,
    weights: Weights = None,
) -> None:
    """Distil a student: AllDistill over all public clips, or a personal one on a selection.

    Without --selection and with seed 0 this finishes the release: the base student, its heads for every compression
    ratio, and the ONNX files that devices fetch.
    """
    target = _compute(device, threads)
    opened = Release.open(release)
    with bars() as progress:
        watch = EpochBars(progress, len(opened.public.names))
        losses: list[float] = []

        def on_epoch(stage: str, report: EpochReport) -> None:
            losses.append(report.loss)
            watch(stage, report)

        if selection is None:
            make_student(opened, seed, target, lambda report: on_epoch("AllDistill", report), weights)
            folder = opened.student_path(seed).parent / f"{seed}-loss"
            if seed == 0:
                make_base(opened, target, lambda report: watch("heads", report))
                typer.echo(f"base student: {opened.base_dir}")
            else:
                typer.echo(f"student: {opened.student_path(seed)}")
        else:
            if out is None:
                raise ValueError("--selection needs --out, the folder of the new student")
            out.mkdir(parents=True, exist_ok=True)
            personal = distil_round(
                opened,
                _read_selection(selection, opened),
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


@app.command()
@_told
def select(
    release: ReleaseDir,
    prototypes: Annotated[
        Path, typer.Option(help="JSON with 'values' (rows of class probabilities), 'sizes' and perhaps 'features'.")
    ],
    out: Annotated[Path, typer.Option(help="Where to write the selection, as JSON.")],
    strategy: Annotated[str, typer.Option(help=f"One of {', '.join(STRATEGIES)}.")] = "cosine",
    samples_per_row: Annotated[int, typer.Option(help="Public clips per prototype; 0: the recipe's.")] = 0,
    seed: Seed = 0,
) -> None:
    """Choose the public clips that resemble a device's prototypes, and say how much each counts."""
    opened = Release.open(release)
    raw = json.loads(prototypes.read_text())
    features = raw.get("features")
    selected = select_round(
        opened,
        Wanted(
            np.asarray(raw["values"], dtype=np.float32),
            np.asarray(raw["sizes"], dtype=np.int32),
            None if features is None else np.asarray(features, dtype=np.float32),
        ),
        round=0,
        seed=seed,
        strategy=strategy,
        samples_per_row=samples_per_row or None,
    )
    for note in selected.notes:
        typer.echo(note, err=True)
    indices_S = selected.indices_S
    labels_S = opened.labels()[indices_S]
    counts = np.bincount(labels_S[labels_S >= 0], minlength=len(opened.recipe.classes))
    document = {
        "release": opened.outputs_key(),
        "indices": indices_S.tolist(),
        "weights": selected.weights_S.tolist(),
        "effective_size": selected.effective_size,
        "clips": [opened.public.names[index] for index in indices_S],
        "per_class": dict(zip(opened.recipe.classes, counts.tolist(), strict=True)),
    }
    write_atomically(out, json.dumps(document, indent=1))
    worth = f", worth {selected.effective_size:.0f} of equal weight" if selected.weighted else ""
    table = Table(title=f"{len(indices_S)} of {len(opened.public.names)} public clips{worth}")
    for name in ("class", "selected"):
        table.add_column(name)
    for name, count in zip(opened.recipe.classes, counts.tolist(), strict=True):
        table.add_row(name, str(count))
    Console().print(table)


@app.command()
@_told
def compress(
    release: ReleaseDir,
    selection: SelectionFile,
    student_file: Annotated[Path, typer.Option("--student", help="student.safetensors.")],
    out: Annotated[Path, typer.Option(help="Where to write heads.safetensors.")],
    seed: Seed = 0,
    device: Device = "auto",
    threads: Threads = 0,
) -> None:
    """Train the compressors and heads of every ratio on a selection, the student frozen."""
    target = _compute(device, threads)
    opened = Release.open(release)
    encoders = load_weights(opened.new_student(), student_file, "isthmus distill student")
    selected = _read_selection(selection, opened)
    with bars() as progress:
        watch = EpochBars(progress, len(selected))
        bank = train_heads(
            opened, encoders, selected, seed=seed, on_epoch=lambda report: watch("heads", report), device=target
        )
    bank.save(out)
    typer.echo(f"heads for ratios {', '.join(f'{ratio:g}' for ratio in bank.ratios)}: {out}")


@app.command()
@_told
def export(
    release: ReleaseDir,
    student_file: Annotated[Path, typer.Option("--student", help="student.safetensors.")],
    heads: Annotated[Path, typer.Option(help="heads.safetensors.")],
    out: Annotated[Path, typer.Option(help="Folder of the ONNX files.")],
) -> None:
    """Write student, heads and compressors as ONNX, each compared with torch."""
    opened = Release.open(release)
    encoders = load_weights(opened.new_student(), student_file, "isthmus distill student")
    for path in export_student(opened, encoders, HeadBank.load(heads), out):
        typer.echo(f"{path}  {path.stat().st_size:,} bytes")


@app.command()
@_told
def evaluate(
    release: ReleaseDir,
    data: DataDir,
    layout: Annotated[str, typer.Option(help="'auto', 'crema-d' or 'ave'.")] = "auto",
    student_file: Annotated[
        Path | None, typer.Option("--student", help="student.safetensors; default: the base student.")
    ] = None,
    heads: Annotated[Path | None, typer.Option(help="heads.safetensors; default: the base student's.")] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the figures here, as JSON.")] = None,
    device: Device = "auto",
    threads: Threads = 0,
) -> None:
    """Measure teacher and student on every client's clips: each way of answering, and with sound or picture absent."""
    target = _compute(device, threads)
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
            told = partial(_told_right, bank, outputs, ratio, labels_N)
            figures[client] |= by_captured(f"student, ratio {ratio:g}", told)
    table = Table(title="accuracy, %")
    table.add_column("")
    for client in figures:
        table.add_column(client, justify="right")
    for row in next(iter(figures.values())):
        scale = 1 if row == "clips" else 100
        table.add_row(row, *(f"{scale * figures[client][row]:.{0 if row == 'clips' else 1}f}" for client in figures))
    Console().print(table)
    if out is not None:
        write_atomically(
            out, json.dumps({"release": releases.Release.open(release).recipe.name, **figures}, indent=1).encode()
        )


def _told_right(
    bank: HeadBank,
    outputs: StudentOutputs,
    ratio: float,
    labels_N: np.ndarray[tuple[int], np.dtype[np.int64]],
    captured: Captured,
) -> float:
    return accuracy(bank_probabilities(bank, outputs, ratio, captured), labels_N)


def _read_selection(path: Path, opened: Release) -> Selection:
    raw = json.loads(path.read_text())
    if raw.get("release") != opened.outputs_key():
        raise ValueError(f"{path} was selected from another release: run 'isthmus distill select' again")
    return Selection(np.asarray(raw["indices"], dtype=np.int64), np.asarray(raw["weights"], dtype=np.float32))
