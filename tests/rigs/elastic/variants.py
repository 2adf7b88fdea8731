"""Tiny models of three sizes for two tasks, as files, and a folder of variants made of them."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from isthmus.cloud.elastic.model.timm_import import VisionTransformer
from isthmus.cloud.elastic.policies.infaas import SIZE_NAMES
from isthmus.cloud.elastic.tasks.recipes import TaskRecipe
from isthmus.cloud.elastic.variants.adding import add_task
from isthmus.cloud.elastic.variants.folder import Variants
from isthmus.data.images import LabelledImages, PixelSpec
from tests.rigs.elastic.vit import save_vit

SIDE = 16
WIDTHS: Mapping[int, int] = {-1: 32, 0: 64, 1: 128}
TASKS = {
    "ten": TaskRecipe("ten", tuple(f"ten-{index}" for index in range(10)), tuple(range(10))),
    "pair": TaskRecipe("pair", ("low", "high"), (0,) * 5 + (1,) * 5),
}


def pictures(pixels: PixelSpec) -> LabelledImages:
    """Returns 20 random pictures of ten labels."""
    rng = np.random.default_rng(0)
    side = pixels.size_px
    return LabelledImages(rng.integers(0, 256, (20, side, side, 3), np.uint8), np.arange(20) % 10)


def saved(folder: Path, task: str, level: int, *, side: int = SIDE, classes: int | None = None) -> str:
    """Writes a model of random weights, and returns its file."""
    torch.manual_seed(sum(map(ord, task)) + level)
    count = len(TASKS[task].classes) if classes is None else classes
    vit = VisionTransformer(
        img_size=side, patch_size=4, embed_dim=WIDTHS[level], depth=2, num_heads=2, num_classes=count
    )
    path = folder / f"{task}-{SIZE_NAMES[level]}-{side}-{count}" / "model.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_vit(vit, path)
    return str(path)


def made(folder: Path, tasks: Sequence[str] = ("ten", "pair"), levels: Sequence[int] = (-1, 0, 1)) -> Variants:
    """Makes the folder of variants ``folder / "variants"``."""
    torch.set_num_threads(1)
    variants = None
    for task in tasks:
        variants = add_task(
            folder / "variants",
            TASKS[task],
            {level: saved(folder, task, level) for level in levels},
            pictures,
            pixels="cifar10",
            device="cpu",
            number_type="float32",
            batches=(1, 8),
            repeats=1,
        )
    assert variants is not None
    return variants
