"""A tiny model with experts, routers for it, and its folder."""

from pathlib import Path

import numpy as np
import torch

from isthmus.cloud.elastic.experts.layer import Routing
from isthmus.cloud.elastic.model.vit import ElasticViT
from isthmus.cloud.elastic.prepare.upcycling import save, with_experts
from isthmus.cloud.elastic.tasks.router import ExpertsShape, TaskRouter
from isthmus.cloud.elastic.tasks.task import TaskWeights
from isthmus.data.images import PixelSpec
from tests.rigs.elastic.vit import save_vit, tiny

PIXELS = PixelSpec(48, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
SHAPE = ExpertsShape(layers=2, experts=8, k=3)
WIDTH, UNITS = 192, 768


def dense(seed: int = 0) -> ElasticViT:
    return tiny(seed)


def model(seed: int = 0, experts: int = 8, k: int = 3, ratio: float = 1.0) -> ElasticViT:
    """Returns a model of 4 blocks, two of them with experts. Each expert is changed, so that no two are alike."""
    made = with_experts(dense(seed), experts=experts, k=k, ratio=ratio)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for mlp in made.expert_layers:
            for parameter in mlp.experts.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=rng))
    return made


def router(seed: int = 0, shape: ExpertsShape = SHAPE, window: tuple[int, int] | None = None) -> TaskRouter:
    rng = np.random.default_rng(seed)
    first, count = (0, shape.experts) if window is None else window
    weight_MDE = 0.2 * rng.standard_normal((shape.layers, WIDTH, shape.experts), np.float32)
    return TaskRouter(weight_MDE, rng.standard_normal((shape.layers, shape.experts), np.float32), first, count)


def weights(seed: int = 0, classes: int = 3, window: tuple[int, int] | None = None) -> TaskWeights:
    rng = np.random.default_rng(seed)
    head_CD, bias_C = rng.standard_normal((classes, WIDTH), np.float32), rng.standard_normal(classes, np.float32)
    return TaskWeights(head_CD, bias_C, {}, router(seed, window=window))


def uniform(shape: ExpertsShape, k: int) -> Routing:
    """Returns routers that treat all experts alike."""
    blank = torch.zeros(1, shape.layers, WIDTH, shape.experts)
    return Routing(blank, torch.zeros(1, shape.layers, shape.experts), k)


def pictures(count: int = 6, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 48, 48, 3), np.uint8)


def folder_of(path: Path, made: ElasticViT | None = None) -> Path:
    """Writes a model's folder."""
    source = path / "dense" / "vit.safetensors"
    source.parent.mkdir(parents=True)
    save_vit(dense().vit, source)
    save(model() if made is None else made, path / "model", source=source, pixels=PIXELS, units=UNITS)
    return path / "model"
