"""A model for the runner, pictures, and tasks of different shapes."""

import numpy as np
import torch

from isthmus.cloud.elastic.model.runner import ElasticRunner, ServedTask
from isthmus.cloud.elastic.model.timm_import import create_model
from isthmus.cloud.elastic.model.vit import ElasticViT
from isthmus.cloud.elastic.tasks.task import PromptMode, TaskWeights
from isthmus.data.images import PixelSpec

SHAPE = {"img_size": 16, "patch_size": 4, "depth": 3, "num_classes": 4}


PIXELS = PixelSpec(16, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))


PICTURES_BHWC = np.random.default_rng(1).integers(0, 256, (6, 16, 16, 3), np.uint8)


def model(name: str = "vit_tiny_patch16_224", **changes: object) -> ElasticViT:
    torch.manual_seed(0)
    return ElasticViT(create_model(name, pretrained=False, **{**SHAPE, **changes}).eval())


def weights(seed: int, classes: int, gammas: tuple[int, ...] = (2,)) -> TaskWeights:
    rng = np.random.default_rng(seed)
    return TaskWeights(
        rng.standard_normal((classes, 192), np.float32),
        rng.standard_normal(classes, np.float32),
        {gamma: rng.standard_normal((3, gamma, 192), np.float32) for gamma in gammas},
    )


def some_tasks(runner: ElasticRunner) -> list[ServedTask]:
    """Returns two tasks that append, one that replaces, and one without prompts at gamma 2, in mixed order."""
    given: list[tuple[TaskWeights, PromptMode]] = [
        (weights(1, 3), "append"),
        (weights(2, 5, (2, 4)), "append"),
        (weights(3, 2), "replace"),
        (weights(4, 3, ()), "append"),
    ]
    a, b, c, d = (runner.prepare(each, mode) for each, mode in given)
    return [a, c, b, a, d, c]
