"""PURE: pools the last layer's tokens into the features that a head reads, as timm does, with merged tokens in mind.

A merged token counts as often as the number of input tokens that it represents: by weight in a mean, and by the log of
its size in attention. So pooling at a gamma below 0 agrees with pooling the tokens before they were merged.

Axes: B batch, N tokens, D width.
"""

from typing import Any, Final

from torch import Tensor

from isthmus.cloud.elastic.model.merging import proportional_mask

POOLINGS: Final = ("token", "avg", "map")
"""timm's names: the class token; the mean over tokens; attention of a learned query over tokens."""


def reads_patches(vit: Any) -> bool:
    """Returns True if the pooling of ``vit`` reads other tokens than the protected ones."""
    return bool(vit.global_pool != "token")


def pooled(vit: Any, tokens_BND: Tensor, sizes_BN: Tensor | None) -> Tensor:
    """Returns the features (B, D) from the normalised tokens of the last layer, for "avg" and "map".

    ``tokens_BND`` starts with the protected tokens and holds no prompts. ``sizes_BN`` is the number of input tokens
    that each of them represents (None: one each).
    """
    first = 0 if vit.pool_include_prefix else int(vit.num_prefix_tokens)
    read_BND = tokens_BND[:, first:]
    read_BN = None if sizes_BN is None else sizes_BN[:, first:]
    if vit.attn_pool is not None:
        mask = None if read_BN is None else proportional_mask(read_BN, read_BND.dtype)
        features_BD: Tensor = vit.attn_pool(read_BND, attn_mask=mask)
    elif read_BN is None:
        features_BD = read_BND.mean(dim=1)
    else:
        weights_BN1 = (read_BN / read_BN.sum(dim=1, keepdim=True)).to(read_BND.dtype)[..., None]
        features_BD = (read_BND * weights_BN1).sum(dim=1)
    normed_BD: Tensor = vit.fc_norm(features_BD)
    return normed_BD
