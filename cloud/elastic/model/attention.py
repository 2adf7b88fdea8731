"""Attention of a block: queries, keys and values, and the way in which they are mixed.

There are two ways to mix, which differ by rounding alone:

- "fused": torch's fused attention.
- "products": two batched matrix products with a softmax between them. The logits are rounded to the number type.

In bfloat16 on AMD Zen 4, torch's fused kernel takes longer than the products
(docs/results/elastic_vit_epyc-zen4-2core_2026-11-30.md). Other processors differ, so ``fastest_mixing`` measures both.

Axes: B batch, N tokens, D width, H heads, Q asking tokens, G prompts, A = 2 (key, value), d width of a head.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from isthmus.cloud.elastic.model.merging import proportional_mask

Mixing = Literal["fused", "products"]
LOGITS_BYTES: Final = 10 << 20
"""The products compute as many samples at a time as have logits of at most this size, which fits the cache."""
FEW_TOKENS: Final = 32
"""With fewer tokens the fused kernel is as fast, and one call instead of three."""


def attend(
    attention: Any,
    normed_BND: Tensor,
    asking: int,
    sizes_BN: Tensor | None,
    prompts_BAHGd: Tensor | None,
    mixing: Mixing = "fused",
) -> tuple[Tensor, Tensor]:
    """Returns the output for the first ``asking`` tokens (B, Q, D), and the keys of all tokens (B, H, N, d).

    The keys of the prompts are not included.
    """
    queries, keys, values = project(attention, normed_BND, asking)
    mask = None if sizes_BN is None else proportional_mask(sizes_BN, queries.dtype)
    seen_keys = keys
    if prompts_BAHGd is not None:
        seen_keys = torch.cat((keys, prompts_BAHGd[:, 0]), dim=2)
        values = torch.cat((values, prompts_BAHGd[:, 1]), dim=2)
    mixed_BQD = mixed(queries, seen_keys, values, mask, mixing)
    attended_BQD: Tensor = attention.proj(attention.norm(mixed_BQD))
    return attended_BQD, keys


def project(attention: Any, normed_BND: Tensor, asking: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the queries of the first ``asking`` tokens, and the keys and values of all tokens: each (B, H, N, d)."""
    batch, tokens, width = normed_BND.shape
    heads = attention.num_heads
    if asking == tokens:
        qkv = attention.qkv(normed_BND).view(batch, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4)
        queries, keys, values = qkv.unbind(0)
    else:
        keys_values = _channels(attention.qkv, normed_BND, width, 3 * width).view(batch, tokens, 2, heads, -1)
        keys, values = keys_values.permute(2, 0, 3, 1, 4).unbind(0)
        queries = _channels(attention.qkv, normed_BND[:, :asking], 0, width)
        queries = queries.view(batch, asking, heads, width // heads).transpose(1, 2)
    return attention.q_norm(queries), attention.k_norm(keys), values


def mixed(
    queries_BHQd: Tensor, keys_BHNd: Tensor, values_BHNd: Tensor, mask_B11N: Tensor | None, mixing: Mixing
) -> Tensor:
    """Returns the attended values of all heads (B, Q, D). ``mask_B11N`` is added to the logits."""
    if mixing == "products" and keys_BHNd.shape[2] >= FEW_TOKENS and not torch.is_grad_enabled():
        return _by_products(queries_BHQd, keys_BHNd, values_BHNd, mask_B11N)
    mixed_BHQd = functional.scaled_dot_product_attention(queries_BHQd, keys_BHNd, values_BHNd, attn_mask=mask_B11N)
    return mixed_BHQd.transpose(1, 2).flatten(2)


def fastest_mixing(
    heads: int,
    head_width: int,
    tokens: int,
    dtype: torch.dtype,
    *,
    batch: int = 8,
    repeats: int = 5,
    clock: Callable[[], float] = time.perf_counter,
) -> Mixing:
    """Measures both ways on this processor with random numbers, in turn, and returns the one of the smaller median.

    It takes ``2 * (repeats + 1)`` times the attention of one block. Without bfloat16 products in oneDNN the answer is
    "fused" at once.
    """
    if dtype != torch.bfloat16 or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "fused"
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn((batch, tokens, 3, heads, head_width), generator=generator).to(dtype).permute(2, 0, 3, 1, 4)
    queries, keys, values = qkv.unbind(0)
    mask = torch.zeros((batch, 1, 1, tokens), dtype=dtype)
    ways: tuple[Mixing, ...] = ("fused", "products")
    took_s: dict[Mixing, list[float]] = {way: [] for way in ways}
    with torch.inference_mode():
        for repeat in range(repeats + 1):
            for way in ways:
                began_s = clock()
                mixed(queries, keys, values, mask, way)
                if repeat:
                    took_s[way].append(clock() - began_s)
    return min(ways, key=lambda way: statistics.median(took_s[way]))


def _by_products(queries_BHQd: Tensor, keys_BHNd: Tensor, values_BHNd: Tensor, mask_B11N: Tensor | None) -> Tensor:
    batch, heads, asking, width = queries_BHQd.shape
    tokens = keys_BHNd.shape[2]
    mixed_BQD = queries_BHQd.new_empty((batch, asking, heads * width))
    samples = max(1, LOGITS_BYTES // (heads * asking * tokens * queries_BHQd.element_size()))
    for first in range(0, batch, samples):
        part = slice(first, first + samples)
        queries, keys, values = (each[part].flatten(0, 1) for each in (queries_BHQd, keys_BHNd, values_BHNd))
        if mask_B11N is None:
            added, beta = queries.new_zeros(()), 0
        else:
            added, beta = mask_B11N[part].expand(-1, heads, -1, -1).flatten(0, 1), 1
        logits = torch.baddbmm(added, queries, keys.mT, beta=beta, alpha=width**-0.5)
        answered = torch.bmm(torch.softmax(logits, dim=-1), values).view(-1, heads, asking, width)
        mixed_BQD[part].view(-1, asking, heads, width).copy_(answered.transpose(1, 2))
    return mixed_BQD


def _channels(linear: Any, inputs: Tensor, first: int, last: int) -> Tensor:
    """Computes only the outputs ``first`` to ``last`` - 1 of a linear layer."""
    if type(linear) is nn.Linear:
        bias: Tensor | None = linear.bias
        return functional.linear(inputs, linear.weight[first:last], bias if bias is None else bias[first:last])
    some: Tensor = linear.channels(inputs, first, last)
    return some
