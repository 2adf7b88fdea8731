"""A model, labelled pictures, and a configuration that learns prompts within seconds."""

from dataclasses import replace

import numpy as np
import torch

from isthmus.cloud.elastic.model.timm_import import create_model
from isthmus.cloud.elastic.model.vit import ElasticViT
from isthmus.cloud.elastic.prepare.prompts import HEAD, PROMPTS, PromptConfig
from isthmus.cloud.elastic.tasks.task import PromptMode
from isthmus.data.images import LabelledImages, PixelSpec

PIXELS = PixelSpec(16, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


CPU = torch.device("cpu")


def model() -> ElasticViT:
    torch.manual_seed(0)
    shape = {"img_size": 16, "patch_size": 8, "depth": 2, "num_classes": 4}
    return ElasticViT(create_model("vit_tiny_patch16_224", pretrained=False, **shape).eval())


def bright_or_dark(count: int = 24) -> LabelledImages:
    rng = np.random.default_rng(5)
    labels = np.arange(count, dtype=np.int64) % 2
    pictures = rng.integers(0, 100, (count, 16, 16, 3), np.uint8) + (120 * labels).astype(np.uint8)[:, None, None, None]
    return LabelledImages(pictures, labels)


def config(mode: PromptMode = "append") -> PromptConfig:
    prompts = replace(PROMPTS, epochs=2, batch_size=8, learning_rate=0.01)
    return PromptConfig((1, 2), mode, replace(HEAD, epochs=6, batch_size=8), prompts)
