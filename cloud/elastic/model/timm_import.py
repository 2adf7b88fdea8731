"""Imports timm also if torchvision's compiled extension cannot load (see distill/torchvision_import.py)."""

import isthmus.distill.torchvision_import  # noqa: F401, I001 - must precede timm, which imports torchvision
from timm import create_model, is_model
from timm.layers.attention import Attention
from timm.layers.attention_pool import AttentionPoolLatent
from timm.layers.mlp import GluMlp, Mlp
from timm.layers.patch_embed import PatchEmbed
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer

__all__ = [
    "Attention",
    "AttentionPoolLatent",
    "Block",
    "GluMlp",
    "Mlp",
    "PatchEmbed",
    "VisionTransformer",
    "VisionTransformerDistilled",
    "create_model",
    "is_model",
]
