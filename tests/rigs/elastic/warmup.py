"""A tiny ViT (17 tokens, 3 layers), pictures that it learns within seconds, and fast settings for tuning it."""

from dataclasses import replace

import numpy as np
import torch

from isthmus.cloud.elastic.model.timm_import import VisionTransformer
from isthmus.cloud.elastic.model.vit import ElasticViT
from isthmus.cloud.elastic.warm.store import ReducerName
from isthmus.cloud.warmup.tuning import TUNE, Subject, Target, TuneConfig
from isthmus.data.images import LabelledImages, PixelSpec

PIXELS = PixelSpec(16, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
CPU = torch.device("cpu")
CLASSES = ("dark", "bright")
NUMBERS = (0, 4, 8)


def tiny_vit(classes: int = 2, seed: int = 0) -> VisionTransformer:
    torch.manual_seed(seed)
    return VisionTransformer(img_size=16, patch_size=4, embed_dim=64, depth=3, num_heads=1, num_classes=classes).eval()


def bright_or_dark(count: int = 16, seed: int = 5) -> LabelledImages:
    labels = np.arange(count, dtype=np.int64) % 2
    ground = np.random.default_rng(seed).integers(0, 100, (count, 16, 16, 3), np.uint8)
    return LabelledImages(ground + (120 * labels).astype(np.uint8)[:, None, None, None], labels)


def subject() -> Subject:
    return Subject(
        "bright-dark", CLASSES, ElasticViT(tiny_vit()), PIXELS, bright_or_dark(16), bright_or_dark(12, 6), CPU
    )


def quick(reducer: ReducerName = "merging", epochs: int = 2, seed: int = 0, target: Target = "labels") -> TuneConfig:
    """Returns settings that learn from labels, since the vanilla model of ``subject`` is untrained."""
    train = replace(TUNE, epochs=epochs, batch_size=8, learning_rate=1e-3)
    return TuneConfig(train, reducer, seed=seed, target=target)
