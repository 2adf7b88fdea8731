"""Reads the inputs of the `isthmus elastic` commands: a model, pictures, a folder of tasks, numbers."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from isthmus.cloud.elastic.model.vit import MAX_PROMPTS, ElasticViT
from isthmus.cloud.elastic.model.weights import load_vit, pixel_spec
from isthmus.cloud.elastic.scheduling.merge_order import DEFAULT_ORDER, MergeOrder
from isthmus.cloud.elastic.tasks.files import TaskFiles, load_tasks
from isthmus.cloud.elastic.tasks.recipes import split
from isthmus.data.images import USUAL_COLUMNS, Columns, LabelledImages, PixelSpec, read_images


def opened(
    source: str,
    statistics: str | None,
    found: Mapping[int, tuple[int, ...]] | None = None,
    *,
    random: bool = False,
    merge_order: MergeOrder = DEFAULT_ORDER,
) -> tuple[ElasticViT, PixelSpec]:
    """Returns the model by file or name, and how it reads pictures. Raises ValueError if either is not available."""
    vit = load_vit(source, random=random)
    return ElasticViT(vit, found, merge_order=merge_order), pixel_spec(vit, source, statistics)


def pictures_of(
    data: Path, pixels: PixelSpec, limit: int | None, seed: int, columns: Columns = USUAL_COLUMNS
) -> LabelledImages:
    """Reads all pictures of a data set as the model sees them, or ``limit`` random ones. Raises ImageError."""
    labelled = read_images(data, pixels.size_px, columns=columns, crop=pixels.crop)
    if limit is None or limit >= len(labelled):
        return labelled
    chosen = np.random.default_rng(seed).choice(len(labelled), limit, replace=False)
    return labelled.only(np.sort(chosen))


def split_off(labelled: LabelledImages, held: float, seed: int) -> tuple[LabelledImages, LabelledImages]:
    """Splits into (pictures to learn from, held-out pictures). With a share of 1, both are the whole set."""
    return (labelled, labelled) if held == 1.0 else split(labelled, held_share=held, seed=seed)


def profiling_sets(
    model: ElasticViT,
    pixels: PixelSpec,
    folder: Path,
    data: Path,
    held: float,
    limit: int | None,
    seed: int,
    columns: Columns = USUAL_COLUMNS,
) -> dict[str, tuple[TaskFiles, LabelledImages]]:
    """Returns each task with its held-out pictures: those that 'prompts' held out with the same data, share and seed.

    Raises ValueError for a folder without tasks, or with a task that does not fit the model or the pictures.
    """
    found = load_tasks(folder, model.shape)
    if not found:
        raise ValueError(f"{folder} holds no tasks: make some with 'isthmus elastic prompts'")
    labelled = pictures_of(data, pixels, limit, seed, columns)
    return {one.spec.name: (one, split_off(one.recipe.apply(labelled), held, seed)[1]) for one in found}


def numbers(text: str) -> tuple[int, ...]:
    """Parses comma-separated whole numbers. Returns them ascending, without repetition. Raises ValueError."""
    try:
        return tuple(sorted({int(part) for part in text.split(",") if part.strip()}))
    except ValueError as error:
        raise ValueError(f"{text!r}: must be whole numbers, separated by commas") from error


def fitting(gammas: tuple[int, ...], model: ElasticViT) -> tuple[int, ...]:
    """Returns ``gammas``. Raises ValueError for gammas that the model cannot run, before anything is computed."""
    least = -model.reducer.most
    if any(not least <= gamma <= MAX_PROMPTS for gamma in gammas):
        raise ValueError(f"gammas {gammas}: this model runs from {least} to {MAX_PROMPTS}")
    return gammas
