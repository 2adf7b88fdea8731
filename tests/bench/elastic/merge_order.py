"""Accuracy by gamma of the two orders in which merging hands tokens on (merging.py), on the same test pictures.

The task "cifar10" uses the model's own head. The others get a head that is learned on training pictures at gamma 0, so
neither order has an advantage. All tasks read the same features. The difference is paired: its standard error counts
the pictures that one order answers correctly and the other does not.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from isthmus.cloud.elastic.model.vit import ElasticViT
from isthmus.cloud.elastic.model.weights import load_vit, pixel_spec
from isthmus.cloud.elastic.prepare.inputs import pictures_of
from isthmus.cloud.elastic.prepare.prompts import PromptConfig, learn_task
from isthmus.cloud.elastic.scheduling.merge_order import DEFAULT_ORDER, MERGE_ORDERS
from isthmus.cloud.elastic.tasks.recipes import RECIPES
from tests.bench.harness import Report

BATCH = 50


def main(
    model: Annotated[str, typer.Option(help="Weights of the CIFAR-10 ViT.")],
    data: Annotated[Path, typer.Option(help="CIFAR-10's test pictures (parquet).")],
    train: Annotated[Path, typer.Option(help="CIFAR-10's training pictures (parquet), for the heads.")],
    work: Annotated[Path, typer.Option(help="Folder for the heads while they are learned.")] = Path("runs/merge-order"),
    gammas: Annotated[str, typer.Option(help="Gammas below 0.")] = "-4,-8,-12,-16,-24,-32",
    limit: Annotated[int, typer.Option(help="Test pictures.")] = 10_000,
    learned: Annotated[int, typer.Option(help="Training pictures for each head.")] = 10_000,
    out: Annotated[Path | None, typer.Option(help="Write the results to this JSON file.")] = None,
) -> None:
    """Compare the orders of merging on a trained model."""
    torch.set_num_threads(1)
    vit = load_vit(model)
    pixels = pixel_spec(vit, model, "cifar10")
    models = {order: ElasticViT(vit, merge_order=order).eval().requires_grad_(False) for order in MERGE_ORDERS}
    heads = {"cifar10": (vit.head.weight, vit.head.bias)}
    training = pictures_of(train, pixels, learned, 0)
    for name in ("animals-vehicles",):
        recipe = RECIPES[name]
        weights = learn_task(
            models[DEFAULT_ORDER],
            pixels,
            recipe.apply(training),
            len(recipe.classes),
            PromptConfig(gammas=()),
            folder=work / name,
            device=torch.device("cpu"),
        )
        heads[name] = (torch.from_numpy(weights.head_weight_CD), torch.from_numpy(weights.head_bias_C))
    pictures = pictures_of(data, pixels, limit, 0)
    labels = {name: np.array(RECIPES[name].class_of_label)[pictures.labels_N] for name in heads}
    report = Report("merge_order", {"pictures": len(pictures), "learned": learned, "heads": sorted(heads)}, ("torch",))
    for gamma in (0, *map(int, gammas.split(","))):
        rights: dict[str, dict[str, Any]] = {name: {} for name in heads}
        for order, elastic in models.items():
            for name, right_N in _answered(elastic, pixels, pictures.pictures_NHWC, gamma, heads, labels).items():
                rights[name][order] = right_N
        for name, by_order in rights.items():
            known_N = labels[name] >= 0
            first_N, second_N = (by_order[order][known_N] for order in MERGE_ORDERS)
            gained_N = first_N.astype(float) - second_N.astype(float)
            report.rows.append(
                {
                    "task": name,
                    "gamma": gamma,
                    "pictures": int(known_N.sum()),
                    **{order: round(100 * float(by_order[order][known_N].mean()), 2) for order in MERGE_ORDERS},
                    "gain": round(100 * float(gained_N.mean()), 2),
                    "error": round(100 * float(gained_N.std() / np.sqrt(len(gained_N))), 2),
                }
            )

    def shown(order: str) -> Callable[[dict[str, Any]], str]:
        return lambda row: f"{row[order]:.2f}"

    report.finish(
        {
            "task": lambda row: str(row["task"]),
            "gamma": lambda row: str(row["gamma"]),
            **{order: shown(order) for order in MERGE_ORDERS},
            "published less receiving-first": lambda row: f"{row['gain']:+.2f} ± {row['error']:.2f}",
        },
        out,
    )


@torch.inference_mode()
def _answered(
    model: ElasticViT, pixels: Any, pictures_NHWC: Any, gamma: int, heads: Any, labels: Any
) -> dict[str, Any]:
    """Return, by task, whether each picture was answered correctly."""
    features_ND = torch.cat(
        [
            model.features(torch.from_numpy(pixels.standardise(pictures_NHWC[first : first + BATCH])), gamma)
            for first in range(0, len(pictures_NHWC), BATCH)
        ]
    )
    return {
        name: (features_ND @ weight_CD.T + bias_C).argmax(dim=1).numpy() == labels[name]
        for name, (weight_CD, bias_C) in heads.items()
    }


if __name__ == "__main__":
    typer.run(main)
