"""Accuracy by reduction number on labelled pictures, and what has to hold of the pictures and the numbers first."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from isthmus.cloud.elastic.model.pruning import MAX_PERCENT, Pruning
from isthmus.cloud.elastic.model.runner import ElasticRunner
from isthmus.cloud.elastic.model.vit import ElasticViT
from isthmus.cloud.elastic.prepare.profiler import accuracy
from isthmus.data.images import LabelledImages, PixelSpec

OnNumber = Callable[[int, float], None]
"""A number, and the accuracy at it."""


def largest_number(model: ElasticViT) -> int:
    """The largest reduction number of a model: merging can take half of the free tokens at once, pruning 70 per cent at
    a stage."""
    return MAX_PERCENT if isinstance(model.reducer, Pruning) else (model.tokens - model.protected) // 2


def check_numbers(numbers: Sequence[int], model: ElasticViT) -> tuple[int, ...]:
    """``numbers`` ascending, each once. Raises ValueError for those that the model's tokens do not allow."""
    most = largest_number(model)
    beyond = sorted({number for number in numbers if not 0 <= number <= most})
    if beyond or not numbers:
        kind = "pruned per cent" if isinstance(model.reducer, Pruning) else "merges a layer"
        raise ValueError(
            f"numbers {', '.join(map(str, beyond)) or 'none'}: with {model.tokens} tokens, of which {model.protected} "
            f"must stay, {kind} go from 0 to {most}"
        )
    return tuple(sorted(set(numbers)))


def check_pictures(what: str, labelled: LabelledImages, classes: Sequence[str], model: ElasticViT) -> None:
    """Raises ValueError for pictures of another size, labels beyond ``classes``, and a class without a picture: its
    accuracy could not be told, and a planner that is blind to a class would trade it away."""
    side = model.image_px
    if labelled.pictures_NHWC.shape[1:] != (side, side, 3):
        raise ValueError(f"{what}: pictures of {labelled.pictures_NHWC.shape[1:]}; the model reads {(side, side, 3)}")
    counts = np.bincount(labelled.labels_N, minlength=len(classes))
    if len(counts) > len(classes):
        raise ValueError(f"{what}: label {len(counts) - 1} for {len(classes)} classes")
    missing = [name for name, count in zip(classes, counts, strict=True) if not count]
    if missing:
        raise ValueError(
            f"{what} holds no picture of {', '.join(missing)}; take more pictures, or a larger share of them"
        )


def accuracies(
    model: ElasticViT,
    pixels: PixelSpec,
    labelled: LabelledImages,
    numbers: Sequence[int],
    *,
    device: torch.device,
    known: Mapping[int, float] | None = None,
    on_number: OnNumber = lambda _number, _accuracy: None,
) -> dict[int, float]:
    """Share of ``labelled`` that the model's own head gets right, by number; those in ``known`` are not run again."""
    runner = ElasticRunner(model, pixels, device=str(device), graphs=False)
    task = runner.own_task()
    found = dict(known or {})
    for number in numbers:
        if number not in found:
            found[number] = accuracy(runner, task, labelled, -number)
            on_number(number, found[number])
    return {number: found[number] for number in numbers}
