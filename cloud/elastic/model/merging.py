"""PURE: merges similar tokens between attention and MLP, with attention that accounts for the size of merged tokens.

Bipartite soft matching and proportional attention of Bolya et al., "Token Merging: Your ViT But Faster" (ICLR 2023),
written from the paper. All functions are differentiable in tokens. The shapes of results depend only on the shapes of
arguments, so they compile and can be captured as graphs.

Axes: B batch, N tokens, D width, E tokens that may receive others, O tokens that may be merged into those, R tokens
that are merged, K tokens of O that stay, M tokens that are left in all. The first ``protected`` tokens (class token,
register tokens) take no part.

A layer hands its tokens on in one of two orders. The order decides which tokens can meet at the next layer, because
every second token may receive.

- "published", as in the paper's code: the protected tokens, those that stayed, then those that may receive. Tokens at
  odd positions receive, and the class token is position 0. Where we differ: the paper's code keeps the staying tokens
  in the order of their similarity if there is no class token; here they are always ascending.
- "receiving-first": the protected tokens, those that may receive, then those that stayed.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from isthmus.cloud.elastic.scheduling.merge_order import DEFAULT_ORDER, MergeOrder


@dataclass(frozen=True)
class Matching:
    """Which tokens are merged into which.

    Unprotected tokens alternate: one may receive (E), the next may be merged (O). The first one receives if ``first``
    is 0, and the second one if ``first`` is 1. ``merged_BR`` are positions within O of the merged tokens, most similar
    first. ``into_BR`` are positions within E of the tokens that receive them. ``staying_BK`` are positions within O of
    the tokens that stay, ascending.
    """

    merged_BR: Tensor
    into_BR: Tensor
    staying_BK: Tensor
    protected: int
    first: int = 0
    order: MergeOrder = DEFAULT_ORDER


def mergeable(tokens: int, wanted: int, protected: int = 1) -> int:
    """Returns how many of ``wanted`` tokens one layer can merge: at most half of the unprotected ones, rounded down."""
    return max(0, min(wanted, (tokens - protected) // 2))


def match(keys_BND: Tensor, count: int, protected: int = 1, order: MergeOrder = DEFAULT_ORDER) -> Matching:
    """Matches every second unprotected token to the most similar of the others, and keeps the ``count`` best matches.

    The similarity is the cosine of ``keys_BND``, the attention keys averaged over heads. On both sides the earlier
    token wins a tie. Raises ValueError if fewer than ``count`` tokens can be merged (see ``mergeable``) or ``count`` is
    not positive.
    """
    tokens = keys_BND.shape[1]
    if not 0 < count <= mergeable(tokens, count, protected):
        raise ValueError(f"{count} of {tokens} tokens cannot be merged; at most {mergeable(tokens, tokens, protected)}")
    first = (protected + 1) % 2 if order == "published" else 0
    directions_BND = functional.normalize(keys_BND[:, protected:], dim=-1)
    similarity_BOE = directions_BND[:, 1 - first :: 2] @ directions_BND[:, first::2].mT
    best_BO, nearest_BO = similarity_BOE.max(dim=-1)
    if count == best_BO.shape[1]:  # all are merged, so there is nothing to rank
        merged_BR = torch.arange(count, device=keys_BND.device).expand_as(nearest_BO)
        return Matching(merged_BR, nearest_BO, merged_BR[:, :0], protected, first, order)
    ranked_BO = best_BO.argsort(dim=-1, descending=True, stable=True)
    merged_BR = ranked_BO[:, :count]
    staying_BK = ranked_BO[:, count:].sort(dim=-1).values
    return Matching(merged_BR, nearest_BO.gather(1, merged_BR), staying_BK, protected, first, order)


def merge(tokens_BND: Tensor, sizes_BN: Tensor | None, matching: Matching) -> tuple[Tensor, Tensor]:
    """Averages merged tokens weighted by their sizes. Returns tokens (B, N - R, D) and their sizes, float32 (B, N - R).

    The size of a token is the number of input tokens that it represents (``sizes_BN`` None: one each). The result is in
    the order of ``matching``. Merging conserves the sum of sizes and the sum of tokens times sizes.

    The paper's code scatters. Here a small matrix product adds to the receiving tokens: it is faster on processors,
    gives the same sums on every run, and fuses if compiled.
    """
    protected, count = matching.protected, matching.merged_BR.shape[1]
    first_receiving, first_other = protected + matching.first, protected + 1 - matching.first
    batch, tokens, _ = tokens_BND.shape
    if sizes_BN is None:
        sizes_BN = tokens_BND.new_ones((batch, tokens), dtype=torch.float32)
    all_N = torch.arange(tokens, device=tokens_BND.device)
    receiving_BE = all_N[first_receiving::2].expand(batch, -1)
    unmerged_BK = 2 * matching.staying_BK + first_other
    first, then = (receiving_BE, unmerged_BK) if matching.order == "receiving-first" else (unmerged_BK, receiving_BE)
    kept_BM = torch.cat((all_N[:protected].expand(batch, -1), first, then), dim=1)
    start = protected if first is receiving_BE else protected + unmerged_BK.shape[1]
    receiving = slice(start, start + receiving_BE.shape[1])

    merged_BR = 2 * matching.merged_BR + first_other
    kept_BMD, merged_BRD = rows(tokens_BND, kept_BM), rows(tokens_BND, merged_BR)
    sizes_BM, gained_BR = sizes_BN.gather(1, kept_BM), sizes_BN.gather(1, merged_BR)
    own_BE = sizes_BM[:, receiving]
    total_BE = own_BE.scatter_add(1, matching.into_BR, gained_BR)
    gained_share_BR = (gained_BR / total_BE.gather(1, matching.into_BR)).to(tokens_BND.dtype)
    share_BER = tokens_BND.new_zeros((batch, own_BE.shape[1], count)).scatter(
        1, matching.into_BR[:, None], gained_share_BR[:, None]
    )
    # The receiving tokens change in place: a third less is written than by joining parts.
    kept_BMD[:, receiving].mul_((own_BE / total_BE)[..., None].to(tokens_BND.dtype)).baddbmm_(share_BER, merged_BRD)
    sizes_BM[:, receiving] = total_BE
    return kept_BMD, sizes_BM


def rows(tokens_BND: Tensor, positions_BM: Tensor) -> Tensor:
    """Returns each sample's tokens at ``positions_BM``, (B, M, D). It is several times as fast as indexing twice."""
    batch, tokens, width = tokens_BND.shape
    firsts_B1 = torch.arange(batch, device=tokens_BND.device)[:, None] * tokens
    chosen_MD = tokens_BND.reshape(batch * tokens, width).index_select(0, (positions_BM + firsts_B1).flatten())
    return chosen_MD.view(batch, -1, width)


def proportional_mask(sizes_BN: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns log sizes (B, 1, 1, N), an additive mask for the attention logits of all heads and queries.

    With it, attention counts a merged token exactly once per input token that it represents. It works with any fused
    attention that accepts a mask.
    """
    return sizes_BN.log().to(dtype)[:, None, None, :]
