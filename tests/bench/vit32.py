"""The ViT for measurements of serving: 32 x 32 images, 65 tokens, 6 layers of width 192, random weights."""

import io
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from PIL import Image

from isthmus.cloud.elastic.model.timm_import import VisionTransformer
from isthmus.cloud.elastic.scheduling.profile import MachineKey, Profile
from isthmus.cloud.elastic.tasks.task import TaskWeights

SIDE, WIDTH, DEPTH, CLASSES = 32, 192, 6, 10
GAMMAS = (-16, -8, 0)


def save_vit(path: Path) -> None:
    torch.manual_seed(0)
    vit = VisionTransformer(
        img_size=SIDE, patch_size=4, embed_dim=WIDTH, depth=DEPTH, num_heads=WIDTH // 64, num_classes=CLASSES
    )
    safetensors.torch.save_file(vit.state_dict(), path)


def head_only() -> TaskWeights:
    rng = np.random.default_rng(0)
    return TaskWeights(rng.standard_normal((CLASSES, WIDTH), np.float32), rng.standard_normal(CLASSES, np.float32), {})


def profile_of_nothing() -> Profile:
    """Return a profile with invented times. With one query in flight, plans do not depend on them."""
    latency_s = dict.fromkeys(GAMMAS, (0.003, 0.1))
    return Profile(MachineKey("none", "cpu", 1, "float32", "none"), GAMMAS, (1, 64), {}, latency_s)


def picture() -> bytes:
    """Return a random picture as a JPEG file."""
    pixels_HWC = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels_HWC).save(file, "JPEG")
    return file.getvalue()
