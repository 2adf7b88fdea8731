"""Speed of warm-up: tuning with merged tokens, averaging weights, and switching between models in memory.

Tuning: images per second with merging, relative to those without, beside the ratio of operations. Averaging: the floor
is to read every model's weights once and write the average once, at the rate of a plain copy. Switching: the time to
acquire another model, and batches of one image that alternate between two models or stay with one. Weights are random.
"""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor

from isthmus.cloud.elastic.model.runner import ElasticRunner
from isthmus.cloud.elastic.model.vit import ElasticViT
from isthmus.cloud.elastic.model.weights import load_vit
from isthmus.cloud.elastic.warm.models import WarmModels
from isthmus.cloud.elastic.warm.store import Common, WarmStore
from isthmus.cloud.warmup import soup
from isthmus.cloud.warmup.tuning import TUNE, Subject, TuneConfig, one_step, start, tensors_of_model, with_head
from isthmus.data.images import LabelledImages, PixelSpec
from tests.bench import THREADS
from tests.bench.harness import Report, interleaved, shown

CLASSES = ("a", "b")


def main(
    model: Annotated[
        str, typer.Option(help="The model to tune: a timm name (random weights) or a safetensors file.")
    ] = "vit_tiny_patch16_224",
    numbers: Annotated[
        str, typer.Option(help="Merged tokens per layer, separated by commas; 0 is added first.")
    ] = "8,13,20",
    batch: int = 16,
    averaged: Annotated[str, typer.Option(help="timm's name of the model whose weights are averaged.")] = (
        "vit_small_patch16_224"
    ),
    members: Annotated[str, typer.Option(help="Models per average, separated by commas.")] = "2,4",
    switches: Annotated[int, typer.Option(min=1, help="Switches per measured run.")] = 200,
    repeats: int = 5,
    out: Annotated[Path | None, typer.Option(help="Write the results to this JSON file.")] = None,
) -> None:
    """Time tuning with and without merging, averages against a plain copy, and switching models."""
    torch.set_num_threads(THREADS)
    asked = [0, *(int(part) for part in numbers.split(","))]
    counts = [int(part) for part in members.split(",")]
    config = {"model": Path(model).name, "numbers": asked, "batch": batch, "averaged": averaged, "members": counts}
    report = Report("warmup", {**config, "switches": switches, "repeats": repeats}, ("torch", "timm"))
    _tuning(report, model, asked, batch, repeats)
    _averaging(report, averaged, counts, repeats)
    _switching(report, model, switches, repeats)
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "what": lambda row: str(row["what"]),
        "CPU ms, median (quartiles)": lambda row: shown(row["cpu_s"], 1e3),
        "found": lambda row: str(row["found"]),
    }
    report.finish(columns, out)


def _tuning(report: Report, source: str, numbers: list[int], batch: int, repeats: int) -> None:
    elastic = with_head(ElasticViT(load_vit(source, random=True)), len(CLASSES), 0)
    side = elastic.image_px
    rng = np.random.default_rng(0)
    labels_N = np.arange(2 * batch, dtype=np.int64) % 2
    pictures = LabelledImages(rng.integers(0, 256, (2 * batch, side, side, 3), np.uint8), labels_N)
    pixels = PixelSpec(side, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    subject = Subject("bench", CLASSES, elastic, pixels, pictures, pictures, torch.device("cpu"))
    config = TuneConfig(replace(TUNE, batch_size=batch), target="labels")
    timings = interleaved({str(number): one_step(subject, number, config) for number in numbers}, repeats=repeats)
    counted = start(subject, config)
    off_s = timings["0"].cpu_s.median
    for number in numbers:
        timing = timings[str(number)]
        gain = off_s / timing.cpu_s.median
        promised = counted.operations(0) / counted.operations(-number)
        report.rows.append(
            {
                "what": f"tuning step at {number}, batch {batch}",
                **timing.to_json(),
                "images_per_cpu_s": batch / timing.cpu_s.median,
                "gain": gain,
                "promised": promised,
                "of_promised": gain / promised,
                "found": f"{batch / timing.cpu_s.median:.4g} images/CPU s, gain {gain:.3f} of {promised:.3f} promised: "
                f"{gain / promised:.3f}",
            }
        )


def _averaging(report: Report, source: str, counts: list[int], repeats: int) -> None:
    plain = load_vit(source, random=True).state_dict()
    states: dict[str, dict[str, Tensor]] = {
        str(member): {name: torch.randn_like(tensor) for name, tensor in plain.items()} for member in range(max(counts))
    }
    size = sum(tensor.numel() * tensor.element_size() for tensor in plain.values())
    whole, copy = torch.randn(size // 4), torch.empty(size // 4)
    runs: dict[str, Callable[[], object]] = {"copy": lambda: copy.copy_(whole)}
    for count in counts:
        shares = {str(member): 1 / count for member in range(count)}
        into = soup.average(states, shares)
        runs[str(count)] = lambda shares=shares, into=into: soup.average(states, shares, into=into)
        runs[f"{count} fresh"] = lambda shares=shares: soup.average(states, shares)
    timings = interleaved(runs, repeats=repeats)
    bytes_per_s = 2 * size / timings["copy"].cpu_s.median
    report.floors["copied, read and written, bytes/s"] = bytes_per_s
    for count, fresh in ((count, fresh) for count in counts for fresh in ("", " fresh")):
        timing = timings[f"{count}{fresh}"]
        floor_s = (count + 1) * size / bytes_per_s
        report.rows.append(
            {
                "what": f"average of {count} models of {size / 1e6:.0f} MB" + (", into fresh memory" if fresh else ""),
                **timing.to_json(),
                "floor_s": floor_s,
                "times_floor": timing.cpu_s.median / floor_s,
                "found": f"{timing.cpu_s.median / floor_s:.2f} times the floor",
            }
        )


def _switching(report: Report, source: str, switches: int, repeats: int) -> None:
    elastic = with_head(ElasticViT(load_vit(source, random=True)), len(CLASSES), 0)
    side = elastic.image_px
    with tempfile.TemporaryDirectory() as folder:
        store = WarmStore.create(Path(folder) / "models", Common("bench", CLASSES))
        for number in (0, 1):
            tensors: Mapping[str, Tensor] = {
                name: tensor + number if "blocks" in name else tensor
                for name, tensor in tensors_of_model(elastic).items()
            }
            accuracy = {0: 1.0 - number, 1: float(number)}
            store.save(f"m{number}", tensors, kind="tuned", number=number, heads=elastic.heads, accuracy=accuracy)
        runner = ElasticRunner(elastic, PixelSpec(side, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)))
        warm = WarmModels(store.path, runner)
        warm.announce_near(0, (-1, 0))
        warm.wait()
        picture = np.zeros((1, side, side, 3), np.uint8)

        def hold() -> None:
            for turn in range(switches):
                with warm.residency.using(f"m{turn % 2}") as held:
                    assert held is not None

        def batches(step: int) -> Callable[[], object]:
            """Time switching. No tokens are merged, so that only switching differs."""
            ready = []
            for name in ("m0", "m1"):
                with warm.residency.using(name) as held:
                    assert held is not None
                    ready.append(held)

            def run() -> None:
                for turn in range(10):
                    held = ready[turn * step % 2]
                    held.runner.answer(picture, 0, [held.task])

            return run

        timings = interleaved({"hold": hold, "stay": batches(0), "alternate": batches(1)}, repeats=repeats)
        each_ms = 1e3 * timings["hold"].cpu_s.median / switches
        report.rows.append(
            {
                "what": f"{switches} times taking hold of the other model",
                **timings["hold"].to_json(),
                "each_ms": each_ms,
                "found": f"{each_ms:.5f} ms a switch",
            }
        )
        more_ms = 1e3 * (timings["alternate"].cpu_s.median - timings["stay"].cpu_s.median) / 10
        report.rows.append(
            {
                "what": "10 batches of 1, alternating between two models",
                **timings["alternate"].to_json(),
                "stay": timings["stay"].to_json(),
                "more_ms": more_ms,
                "found": f"{more_ms:+.3f} ms a batch over staying",
            }
        )
        warm.close()


if __name__ == "__main__":
    typer.run(main)
