"""Accuracy, on fresh pictures, of the warmed model that a server picks at each number of merged tokens.

This is an experiment on a store of `isthmus elastic warmup` and no part of ``make bench``. Fresh pictures are those
that neither chose nor evaluated the models.
"""

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from isthmus.cloud.elastic.model.vit import ElasticViT
from isthmus.cloud.elastic.model.weights import load_vit, pixel_spec
from isthmus.cloud.elastic.prepare.inputs import pictures_of
from isthmus.cloud.elastic.scheduling.merge_order import order_for
from isthmus.cloud.elastic.warm.models import model_of
from isthmus.cloud.elastic.warm.profiled import Profiled
from isthmus.cloud.elastic.warm.store import WarmStore
from isthmus.cloud.warmup.profiling import accuracies
from tests.bench import THREADS
from tests.bench.harness import Report


def main(
    store: Annotated[Path, typer.Option(help="Warmed models: OUT/models, or those of an evaluation's soups folder.")],
    model: Annotated[str, typer.Option(help="The vanilla model's safetensors file.")],
    data: Annotated[Path, typer.Option(help="Labelled pictures, Parquet.")],
    numbers: Annotated[
        str, typer.Option(help="Numbers of merged tokens, separated by commas; 0 (all tokens) is always added.")
    ],
    profiled: Annotated[int, typer.Option(help="Pictures that profiled the models; 0: the store's own number.")] = 0,
    soups: Annotated[bool, typer.Option(help="Also allow averages to be picked.")] = False,
    pixels: Annotated[str | None, typer.Option(help="cifar10, imagenet or half; default: the model's own.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the results to this JSON file.")] = None,
) -> None:
    """Measure accuracy of the vanilla and the picked model, and the recovered share of the vanilla model's loss."""
    torch.set_num_threads(THREADS)
    device, opened = torch.device("cpu"), WarmStore(store)
    vanilla = ElasticViT(load_vit(model), merge_order=order_for(None, {str(store): opened.merge_order()}))
    spec = pixel_spec(vanilla.vit, model, pixels)
    labelled = pictures_of(data, spec, None, 0)
    wanted = sorted({0, *map(int, numbers.split(","))})
    before = accuracies(vanilla, spec, labelled, wanted, device=device)
    stored = opened.profiled()
    profiled = profiled or stored.pictures
    some = {name: shares for name, shares in stored.accuracy.items() if soups or not name.startswith("soup-")}
    models = Profiled(some, profiled)
    report = Report("warm_picks", {"numbers": wanted, "profiled": profiled, "soups": soups, "pictures": len(labelled)})
    for number in wanted:
        name = models.ranked(number)[0]
        picked = model_of(opened.card(name), opened.load(name), vanilla)
        share = accuracies(picked, spec, labelled, [number], device=device)[number]
        lost = before[0] - before[number]
        back = (share - before[number]) / lost if lost > 0 else None
        report.rows.append(
            {"number": number, "vanilla": before[number], "model": name, "picked": share, "won_back": back}
        )

    def back_of(row: dict[str, Any]) -> str:
        return "" if row["won_back"] is None else f"{row['won_back']:.3f}"

    columns = {
        "number": lambda row: str(row["number"]),
        "vanilla": lambda row: f"{row['vanilla']:.2%}",
        "picked": lambda row: f"{row['picked']:.2%} ({row['model']})",
        "won back": back_of,
    }
    report.finish(columns, out)


if __name__ == "__main__":
    typer.run(main)
