"""A tiny ElasticViT with random weights, images for it, and a checkpoint as timm writes it."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from isthmus.cloud.elastic.model.timm_import import create_model
from isthmus.cloud.elastic.model.vit import ElasticViT

NAME = "vit_tiny_patch16_224"


TINY = {"img_size": 48, "patch_size": 8, "depth": 4, "num_classes": 5}


def tiny(seed: int = 0, name: str = NAME, **changes: object) -> ElasticViT:
    """Returns a model of 37 tokens, width 192 and 4 layers. Large weights make attention differ by token."""
    torch.manual_seed(seed)
    made = create_model(name, pretrained=False, **{**TINY, **changes}).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.1)
    return ElasticViT(made)


def images(count: int = 3, px: int = 48) -> Tensor:
    return torch.randn(count, 3, px, px, generator=torch.Generator().manual_seed(9))


def save_vit(vit: Any, path: Path) -> None:
    """Writes the weights, and beside them a config.json with the number of heads, which they do not say."""
    save_file(vit.state_dict(), path)
    heads = {"model_args": {"num_heads": vit.blocks[0].attn.num_heads}}
    (path.parent / "config.json").write_text(json.dumps(heads), encoding="utf-8")
