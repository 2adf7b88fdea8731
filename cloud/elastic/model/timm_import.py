"""Imports timm also if torchvision's compiled extension cannot load (see distill/torchvision_import.py)."""

import isthmus.distill.torchvision_import  # noqa: F401, I001 - must precede timm, which imports torchvision
from timm import create_model
from timm.layers.attention import Attention
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer

__all__ = ["Attention", "Block", "VisionTransformer", "VisionTransformerDistilled", "create_model"]
