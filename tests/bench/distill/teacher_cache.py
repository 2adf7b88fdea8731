"""Speed of ``encode_clips``, which fills the teacher's cache, against the forward pass of the same encoders alone.

The forward pass gets prepared batches, so the difference is the cost of reading and normalising. Weights and clips are
random; speed depends on neither.
"""

import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from isthmus.data.cache.read import FORMAT, FRAMES, INDEX, SPECTROGRAMS, ClipArrays, frames_shape, spectrogram_shape
from isthmus.data.transforms import InputSpec
from isthmus.distill.models.trunk import EncoderPair
from isthmus.distill.recipes import PRESETS
from isthmus.distill.training.teacher_cache import BATCH_CLIPS, encode_clips, prepared_batch
from tests.bench import THREADS
from tests.bench.harness import Report, interleaved, shown
from tests.bench.untrained import CLASSES


def random_clips(folder: Path, spec: InputSpec, count: int) -> ClipArrays:
    """Write random clips to disk in the layout of the decoded cache."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    rng.standard_normal((count, *spectrogram_shape(spec)), np.float32).tofile(folder / SPECTROGRAMS)
    rng.integers(0, 256, (count, *frames_shape(spec)), np.uint8).tofile(folder / FRAMES)
    clips = [{"name": f"clip{i:03}", "label": i % len(CLASSES), "actor": "", "key": f"{i:064x}"} for i in range(count)]
    index = {"format": FORMAT, "spec": asdict(spec), "classes": CLASSES, "clips": clips, "skipped": []}
    (folder / INDEX).write_text(json.dumps(index))
    return ClipArrays.open(folder)


def main(
    presets: Annotated[str, typer.Option(help="Separated by commas.")] = "smoke,small",
    clips: Annotated[
        int, typer.Option(help="Clips per run; enough for several batches, so that work can overlap.")
    ] = 48,
    repeats: int = 5,
    out: Annotated[Path | None, typer.Option(help="Write the results to this JSON file.")] = None,
) -> None:
    """Measure the cache's throughput as a share of the forward pass's."""
    torch.set_num_threads(THREADS)
    config = {"presets": presets.split(","), "clips": clips, "repeats": repeats, "batch": BATCH_CLIPS}
    report = Report("teacher_cache", config, ("torch", "numpy", "opencv-python-headless"))
    with tempfile.TemporaryDirectory() as folder:
        for preset in presets.split(","):
            measure_preset(report, Path(folder) / preset, preset, clips, repeats)
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "preset": lambda row: str(row["preset"]),
        "what": lambda row: str(row["what"]),
        "wall s": lambda row: shown(row["wall_s"]),
        "CPU s": lambda row: shown(row["cpu_s"]),
        "clips/s": lambda row: f"{row['clips_s']:.1f}",
        "share of the bare forward (wall)": lambda row: f"{row['share_of_bare']:.3f}",
        "(CPU)": lambda row: f"{row['share_of_bare_cpu']:.3f}",
    }
    report.finish(columns, out)


def measure_preset(report: Report, folder: Path, preset: str, count: int, repeats: int) -> None:
    recipe = PRESETS[preset]("crema-d", CLASSES)
    torch.manual_seed(0)
    encoders = EncoderPair(recipe.teacher_trunk, recipe.feature_width, neck=True).eval()
    clips = random_clips(folder, recipe.input, count)
    device = torch.device("cpu")
    ready = [
        prepared_batch(clips, range(first, min(first + BATCH_CLIPS, count))) for first in range(0, count, BATCH_CLIPS)
    ]

    @torch.inference_mode()
    def bare() -> None:
        for spectrograms_BFT, frames_BKCHW in ready:
            encoders.audio(spectrograms_BFT)
            encoders.visual(frames_BKCHW)

    timings = interleaved(
        {"bare forward": bare, "cache": lambda: encode_clips(encoders, clips, device)}, repeats=repeats
    )
    floor = timings["bare forward"]
    for what, timing in timings.items():
        report.rows.append(
            {
                "preset": preset,
                "what": what,
                **timing.to_json(),
                "clips_s": count / timing.wall_s.median,
                "share_of_bare": floor.wall_s.median / timing.wall_s.median,
                "share_of_bare_cpu": floor.cpu_s.median / timing.cpu_s.median,
            }
        )


if __name__ == "__main__":
    typer.run(main)
