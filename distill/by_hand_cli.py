"""``isthmus distill`` select, compress and export: by hand, step by step, what the cloud does for a device."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from isthmus.command_line import App, Device, Seed, Threads, fail, known, print_table

if TYPE_CHECKING:
    from isthmus.distill.release import Release
    from isthmus.distill.selection import Selection

ReleaseDir = Annotated[Path, typer.Option("--release", help="The release's folder.")]
SelectionFile = Annotated[Path, typer.Option("--selection", help="JSON file that 'isthmus distill select' wrote.")]
StudentFile = Annotated[Path, typer.Option("--student", help="The student: a student.safetensors file.")]


def add_commands(app: App) -> None:
    """Add the commands of this file to the ``isthmus distill`` command."""
    app.command(example="isthmus distill select --release release --prototypes prototypes.json --out selection.json")(
        select
    )
    app.command(
        example="""
        isthmus distill compress --release release --selection selection.json --student new/student.safetensors \\
            --out new/heads.safetensors
        """
    )(compress)
    app.command(
        example="""
        isthmus distill export --release release --student new/student.safetensors --heads new/heads.safetensors \\
            --out new
        """
    )(export)


def select(
    release: ReleaseDir,
    prototypes: Annotated[
        Path,
        typer.Option(
            help="JSON file that 'isthmus edge prototypes --json' printed: 'values' (rows of class probabilities), "
            "'sizes', and perhaps 'features'."
        ),
    ],
    out: Annotated[Path, typer.Option(help="JSON file to write the selection to.")],
    strategy: Annotated[
        str,
        typer.Option(
            help="How clips are chosen: cosine, random, all, round_robin, quota, transport, density_ratio, or a "
            "strategy of an extension."
        ),
    ] = "cosine",
    samples_per_row: Annotated[int, typer.Option(help="Public clips per prototype. 0: as the recipe says.")] = 0,
    seed: Seed = 0,
) -> None:
    """Choose the public clips that resemble a device's prototypes, and the weight of each.

    Needs a release with a trained teacher, and a device's prototypes. Writes the selection to --out, and prints how
    many clips of each class it holds.
    """
    import numpy as np

    from isthmus.data.files import write_atomically
    from isthmus.distill.release import Release
    from isthmus.distill.selection import STRATEGIES, Wanted
    from isthmus.distill.student.personalise import select_round
    from isthmus.extensions import load_extensions

    load_extensions()
    known(strategy, STRATEGIES, "--strategy")
    raw = _object(prototypes, "values", "sizes")
    features = raw.get("features")
    try:
        wanted = Wanted(
            np.asarray(raw["values"], dtype=np.float32),
            np.asarray(raw["sizes"], dtype=np.int32),
            None if features is None else np.asarray(features, dtype=np.float32),
        )
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(
            f"{prototypes}: 'values' and 'features' are rows of numbers of one length, 'sizes' whole numbers, as "
            "'isthmus edge prototypes --json' prints them"
        ) from error
    opened = Release.open(release)
    selected = select_round(
        opened,
        wanted,
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
    print_table(
        ("class", "selected"),
        [(name, str(count)) for name, count in zip(opened.recipe.classes, counts.tolist(), strict=True)],
        title=f"{len(indices_S)} of {len(opened.public.names)} public clips{worth}",
    )


def compress(
    release: ReleaseDir,
    selection: SelectionFile,
    student_file: StudentFile,
    out: Annotated[Path, typer.Option(help="File to write the heads to, such as heads.safetensors.")],
    seed: Seed = 0,
    device: Device = "auto",
    threads: Threads = 0,
) -> None:
    """Train the compressors and heads of every compression ratio on a selection. The student is not changed.

    Needs a release, a selection of 'select' and a student of 'student --selection'. Writes the heads to --out.
    """
    from isthmus.distill.release import Release, load_weights
    from isthmus.distill.student.personalise import train_heads
    from isthmus.distill.training.loop import pick_device, set_threads
    from isthmus.distill.training.progress import EpochBars, bars

    set_threads(threads)
    target = pick_device(device)
    opened = Release.open(release)
    encoders = load_weights(opened.new_student(), student_file, "isthmus distill student")
    selected = read_selection(selection, opened)
    with bars() as progress:
        watch = EpochBars(progress, len(selected))
        bank = train_heads(
            opened, encoders, selected, seed=seed, on_epoch=lambda report: watch("heads", report), device=target
        )
    bank.save(out)
    typer.echo(f"heads for ratios {', '.join(f'{ratio:g}' for ratio in bank.ratios)}: {out}")


def export(
    release: ReleaseDir,
    student_file: StudentFile,
    heads: Annotated[Path, typer.Option(help="The heads: a heads.safetensors file of 'compress'.")],
    out: Annotated[Path, typer.Option(help="Folder to write the ONNX files to.")],
) -> None:
    """Export a student, its heads and its compressors as ONNX files, and compare each file's outputs with torch's.

    Needs a release, a student and its heads. Writes the ONNX files to --out. In a release of int8 students the encoders
    become int8, if they then answer public clips as well.
    """
    from isthmus.distill.models.heads import HeadBank
    from isthmus.distill.release import Release, load_weights
    from isthmus.distill.selection import Selection
    from isthmus.distill.student.export import export_student
    from isthmus.distill.student.int8 import quantise_student

    opened, bank = Release.open(release), HeadBank.load(heads)
    encoders = load_weights(opened.new_student(), student_file, "isthmus distill student")
    files = export_student(opened, encoders, bank, out)
    if opened.recipe.student_precision == "int8":
        made, _ = quantise_student(opened, out, bank, Selection.whole(len(opened.public.names)))
        typer.echo(str(made), err=True)
    for path in files:
        typer.echo(f"{path}  {path.stat().st_size:,} bytes")


def read_selection(path: Path, opened: "Release") -> "Selection":
    """Read what ``select`` wrote. Raises ValueError if it is of another release."""
    import numpy as np

    from isthmus.distill.selection import Selection

    if _object(path, "release")["release"] != opened.outputs_key():
        raise ValueError(f"{path} was selected from another release: run 'isthmus distill select' again")
    raw = _object(path, "indices", "weights")
    return Selection(np.asarray(raw["indices"], dtype=np.int64), np.asarray(raw["weights"], dtype=np.float32))


def _object(path: Path, *fields: str) -> dict[str, Any]:
    """Return the JSON object of a file. Raises ValueError for another file, OSError for one that cannot be read."""
    from isthmus.data.files import read_text

    try:
        raw = json.loads(read_text(path))
    except ValueError as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from error
    missing = [field for field in fields if not isinstance(raw, dict) or field not in raw]
    if missing:
        fail(f"{path} lacks {', '.join(repr(field) for field in missing)}")
    return dict(raw)
