"""Pooling merged tokens equals pooling the tokens before they were merged."""

from typing import Any

import pytest
import torch

from isthmus.cloud.elastic.model.pooling import pooled, reads_patches
from isthmus.cloud.elastic.model.timm_import import VisionTransformer


@pytest.mark.parametrize("pooling", ["avg", "map"])
@pytest.mark.parametrize("whole", [False, True])
def test_a_merged_token_counts_as_often_as_its_inputs(pooling: str, whole: bool) -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"global_pool": pooling, "class_token": False, "reg_tokens": 1}
    vit = VisionTransformer(img_size=16, patch_size=4, embed_dim=32, depth=1, num_heads=2, **options).eval()
    vit.pool_include_prefix = whole
    sizes = torch.tensor([1, 3, 1, 2, 4])  # the first is the register token
    tokens_BND = torch.randn(2, 5, 32)
    apart_BND = tokens_BND.repeat_interleave(sizes, dim=1)
    with torch.inference_mode():
        merged_BD = pooled(vit, tokens_BND, sizes[None].float().expand(2, -1))
        torch.testing.assert_close(merged_BD, pooled(vit, apart_BND, None), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(pooled(vit, apart_BND, None), vit.forward_head(apart_BND, pre_logits=True))
    assert reads_patches(vit)
