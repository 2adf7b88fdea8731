"""The costs of INFaaS: seconds to load a ViT of each size from a file, and seconds per image, beside the base model's.

The files are in the page cache, so these are the shortest load times. Weights are random; no figure depends on them.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import safetensors.torch
import torch
import typer

from isthmus.cloud.elastic.model.vit import ElasticViT
from isthmus.cloud.elastic.model.weights import load_vit
from tests.bench import THREADS
from tests.bench.harness import Report, interleaved, shown

MODELS = "vit_small_patch16_224,vit_base_patch16_224,vit_large_patch16_224"


def main(
    models: Annotated[str, typer.Option(help="timm's names, separated by commas; the second is the base.")] = MODELS,
    batch: int = 4,
    repeats: int = 5,
    out: Annotated[Path | None, typer.Option(help="Write the results to this JSON file.")] = None,
) -> None:
    """Time loading and running a ViT in the sizes between which INFaaS chooses."""
    torch.set_num_threads(THREADS)
    names = models.split(",")
    report = Report("model_sizes", {"models": names, "batch": batch, "repeats": repeats}, ("torch", "timm"))
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        files = {name: Path(folder) / f"{name}.safetensors" for name in names}
        runs: dict[str, Callable[[], object]] = {}
        for name, file in files.items():
            vit = load_vit(name, random=True)
            safetensors.torch.save_file(vit.state_dict(), file)
            model = ElasticViT(vit)
            images_BCHW = torch.randn(batch, 3, model.image_px, model.image_px)
            runs[f"load {name}"] = lambda source=f"{name}={file}": load_vit(source)
            runs[f"run {name}"] = lambda model=model, images_BCHW=images_BCHW: model(images_BCHW)
        timings = interleaved(runs, repeats=repeats, warmups=1)
        base_s = timings[f"run {names[1]}"].cpu_s.median
        for name, file in files.items():
            load, run = timings[f"load {name}"], timings[f"run {name}"]
            report.rows.append(
                {
                    "model": name,
                    "file_bytes": file.stat().st_size,
                    "load": load.to_json(),
                    "load_bytes_per_s": file.stat().st_size / load.wall_s.median,
                    "run": run.to_json(),
                    "cost": run.cpu_s.median / base_s,
                }
            )
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "model": lambda row: str(row["model"]),
        "MB": lambda row: f"{row['file_bytes'] / 1e6:.0f}",
        "load, wall ms": lambda row: shown(row["load"]["wall_s"], 1e3),
        "MB/s": lambda row: f"{row['load_bytes_per_s'] / 1e6:.0f}",
        f"run batch {batch}, CPU ms": lambda row: shown(row["run"]["cpu_s"], 1e3),
        "cost, base = 1": lambda row: f"{row['cost']:.2f}",
    }
    report.finish(columns, out)


if __name__ == "__main__":
    typer.run(main)
