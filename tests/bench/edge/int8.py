"""Students in int8 against float32, of trained releases: accuracy, agreement, size, time per clip, resident memory.

    python -m tests.bench.edge.int8 runs/demo/release-* --out int8.json

For each release the base student is exported twice. On public clips the accuracy is the mean over the heads, as the
export measures it; on all clips of the release's private people, whom no training has seen, it is the local head's.
Times are of both encoders on one clip, candidates in turns. Memory is that of a new process of the device's environment
after ten clips. ``--presets`` adds untrained networks of a preset's size: those have no accuracy. For these the cloud's
work is timed too, once each: quantising a student and comparing it with float32 on random clips.
"""

import json
import shutil
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import typer

from isthmus.data.cache.read import ClipArrays
from isthmus.distill.models.heads import HeadBank
from isthmus.distill.release import Release
from isthmus.distill.selection import Selection
from isthmus.distill.student.evaluate import StudentOutputs, accuracy, bank_probabilities
from isthmus.distill.student.export import AUDIO_ENCODER, ENCODERS, VISUAL_ENCODER, encoder_inputs, export_student
from isthmus.distill.student.int8 import encoded_by, quantise_encoder, quantise_student
from isthmus.distill.student.measure import MOST_CLIPS
from isthmus.edge.student.encoder import StudentEncoder
from tests.bench import machine
from tests.bench.edge.encoder import CALIBRATION_BATCHES, one_clip
from tests.bench.edge.footprint import ON_THE_DEVICE, printed_json
from tests.bench.harness import Report, interleaved, shown
from tests.bench.untrained import CLASSES, encoders_release, export_base
from tests.rigs.data.random_cache import write_clips


def private_clips(release: Release) -> list[ClipArrays]:
    """Return the decoded clips of the release's private people; an empty list if there are none."""
    folders = sorted(path.parent for path in (release.root / "private").glob("*/clips.json"))
    return [ClipArrays.open(folder) for folder in folders]


def main(
    releases: Annotated[list[Path] | None, typer.Argument(help="Trained releases with a base student.")] = None,
    presets: Annotated[str, typer.Option(help="Sizes of untrained students, separated by commas.")] = "small",
    repeats: int = 60,
    edge_python: Annotated[Path, typer.Option(help="Python of the device's environment.")] = machine.ROOT
    / ".venv-edge/bin/python",
    out: Annotated[Path | None, typer.Option(help="Write the results to this JSON file.")] = None,
) -> None:
    """Measure what int8 costs and saves."""
    roots = releases or []
    report = Report("int8", {"releases": [path.name for path in roots], "repeats": repeats}, ("onnxruntime", "onnx"))
    for root in roots:
        with tempfile.TemporaryDirectory() as name:
            measure(report, Release.open(root), root.parent.name, Path(name), repeats, edge_python)
    for preset in filter(None, presets.split(",")):
        with tempfile.TemporaryDirectory() as name:
            measure_untrained(report, preset, Path(name) / "encoders", repeats, edge_python)
            report.notes.append(cloud_cost(preset, Path(name) / "cloud"))
    report.finish(
        {
            "release": lambda row: str(row["release"]),
            "encoders": lambda row: str(row["encoders"]),
            "public clips": lambda row: _share(row, "public"),
            "private people": lambda row: _share(row, "private"),
            "same class": lambda row: _share(row, "agreement"),
            "MB": lambda row: f"{row['bytes'] / 1e6:.2f}",
            "CPU ms": lambda row: shown(row["cpu_s"], 1e3),
            "MB resident": lambda row: f"{row['resident'] / 1e6:.0f}",
        },
        out,
    )


def measure(report: Report, release: Release, name: str, folder: Path, repeats: int, edge_python: Path) -> None:
    """Export the base student in both number types and append a row for each."""
    whole = Selection.whole(len(release.public.names))
    heads = HeadBank.load(release.heads_path(0))
    exact, small = folder / "fp32", folder / "int8"
    export_student(release, release.student(0), heads, exact)
    shutil.copytree(exact, small)
    made, _ = quantise_student(release, small, heads, whole)
    if not made.used:
        report.notes.append(f"{name}: {made}")
        return
    private = private_clips(release)
    labels_N = np.concatenate([np.asarray(clips.labels_N) for clips in private]) if private else np.zeros(0)
    first = release.public.subset(np.arange(1))
    (spectrogram_BFT,), (frames_BKCHW,) = (list(encoder_inputs(each, first, 1)) for each in ENCODERS)
    costs = costs_of(release, {"fp32": exact, "int8": small}, (spectrogram_BFT, frames_BKCHW), repeats, edge_python)
    for kind, files in (("fp32", exact), ("int8", small)):
        outputs: list[StudentOutputs] = [
            encoded_by(files / AUDIO_ENCODER, files / VISUAL_ENCODER, release, clips) for clips in private
        ]
        right = [bank_probabilities(heads, each, heads.local_ratio) for each in outputs]
        row: dict[str, Any] = {
            "release": name,
            "encoders": kind,
            "public_clips": made.clips,
            "public": made.fp32_accuracy if kind == "fp32" else made.int8_accuracy,
            "private": accuracy(np.concatenate(right), labels_N) if right else None,
            "private_clips": len(labels_N),
            "agreement": 1.0 if kind == "fp32" else made.agreement,
            **costs[kind],
        }
        report.rows.append(row)


def measure_untrained(report: Report, preset: str, folder: Path, repeats: int, edge_python: Path) -> None:
    """Append a row for each number type of untrained encoders of a preset's size."""
    release = encoders_release(folder, preset)
    exact, small = export_base(release), folder / "int8"
    shutil.copytree(exact, small)
    rng, spec = np.random.default_rng(0), release.recipe.input
    for name in ENCODERS:
        batches = (one_clip(name, spec, rng) for _ in range(CALIBRATION_BATCHES))
        quantise_encoder(exact / name, small / name, batches)
    clip = one_clip(AUDIO_ENCODER, spec, rng), one_clip(VISUAL_ENCODER, spec, rng)
    costs = costs_of(release, {"fp32": exact, "int8": small}, clip, repeats, edge_python)
    report.rows += [{"release": f"untrained, {preset}", "encoders": kind, **cost} for kind, cost in costs.items()]


def cloud_cost(preset: str, folder: Path) -> str:
    """Return what one untrained student of a preset's size costs the cloud in processor time, in words."""
    release = encoders_release(folder, preset)
    write_clips(release.public_dir / "clips", release.recipe.input, CLASSES, MOST_CLIPS)
    (release.root / "public.json").write_text(json.dumps({"folder": "clips"}))
    heads = HeadBank(release.recipe.feature_width, len(CLASSES), release.recipe.ratios)
    export_student(release, release.student(0), heads, folder / "made")
    began_s = time.process_time()
    made, _ = quantise_student(release, folder / "made", heads, Selection.whole(MOST_CLIPS))
    took_s = time.process_time() - began_s
    return f"untrained, {preset}: the cloud quantises and compares a student in {took_s:.1f} s ({made.clips} clips)"


def costs_of(
    release: Release,
    folders: dict[str, Path],
    clip: tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]],
    repeats: int,
    edge_python: Path,
) -> dict[str, dict[str, Any]]:
    """Return bytes, times and resident memory by number type."""
    encoders = {kind: StudentEncoder(folder) for kind, folder in folders.items()}
    timed = interleaved(
        {kind: partial(one.features, clip[0][0], clip[1][0]) for kind, one in encoders.items()},
        repeats=repeats,
        warmups=5,
    )
    spec, ratio = release.recipe.input.to_json(), str(max(release.recipe.ratios))
    return {
        kind: {
            "bytes": sum((folder / name).stat().st_size for name in ENCODERS),
            "resident": printed_json(edge_python, ON_THE_DEVICE, str(folder), spec, ratio)["encoding"],
            **timed[kind].to_json(),
        }
        for kind, folder in folders.items()
    }


def _share(row: dict[str, Any], name: str) -> str:
    return f"{row[name]:.1%}" if row.get(name) is not None else ""


if __name__ == "__main__":
    typer.run(main)
