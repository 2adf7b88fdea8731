"""Measures accuracy by reduction number on labelled pictures, and checks pictures and numbers beforehand."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from isthmus.cloud.elastic.model.pruning import MAX_PERCENT, Pruning
from isthmus.cloud.elastic.model.runner import ElasticRunner
from isthmus.cloud.elastic.model.vit import ElasticViT
from isthmus.cloud.elastic.prepare.profiler import accuracy
from isthmus.data.images import LabelledImages, PixelSpec

OnNumber = Callable[[int, float], None]
"""Called with a reduction number and the accuracy at it."""


def largest_number(model: ElasticViT) -> int:
    """Returns the largest reduction number of a model.

    Merging can remove half of the unprotected tokens per layer, and pruning 70 per cent per stage.
    """
    return MAX_PERCENT if isinstance(model.reducer, Pruning) else (model.tokens - model.protected) // 2


def check_numbers(numbers: Sequence[int], model: ElasticViT) -> tuple[int, ...]:
    """Returns ``numbers`` ascending, each once. Raises ValueError for numbers beyond the model's tokens, or none."""
    most = largest_number(model)
    beyond = sorted({number for number in numbers if not 0 <= number <= most})
    if beyond or not numbers:
        kind = "pruned per cent" if isinstance(model.reducer, Pruning) else "merges per layer"
        raise ValueError(
            f"numbers {', '.join(map(str, beyond)) or 'none'}: with {model.tokens} tokens, of which {model.protected} "
            f"must stay, {kind} must be from 0 to {most}"
        )
    return tuple(sorted(set(numbers)))


def check_pictures(what: str, labelled: LabelledImages, classes: Sequence[str], model: ElasticViT) -> None:
    """Raises ValueError for pictures of another size, labels beyond ``classes``, and a class without a picture.

    The accuracy of a class without pictures is unknown, and a planner would sacrifice a class that it does not see.
    """
    side = model.image_px
    if labelled.pictures_NHWC.shape[1:] != (side, side, 3):
        raise ValueError(
            f"{what}: pictures have shape {labelled.pictures_NHWC.shape[1:]}; the model reads {(side, side, 3)}"
        )
    counts = np.bincount(labelled.labels_N, minlength=len(classes))
    if len(counts) > len(classes):
        raise ValueError(f"{what}: there is a label {len(counts) - 1}, but only {len(classes)} classes")
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
    """Returns the accuracy of the model's own head on ``labelled``, by number. Those in ``known`` are not measured."""
    runner = ElasticRunner(model, pixels, device=str(device), graphs=False)
    task = runner.own_task()
    found = dict(known or {})
    for number in numbers:
        if number not in found:
            found[number] = accuracy(runner, task, labelled, -number)
            on_number(number, found[number])
    return {number: found[number] for number in numbers}
