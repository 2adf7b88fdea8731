"""PURE: merges similar tokens between attention and MLP, with attention that accounts for the size of merged tokens.

Bipartite soft matching and proportional attention of Bolya et al., "Token Merging: Your ViT But Faster" (ICLR 2023),
written from the paper. All functions are differentiable in tokens. The shapes of results depend only on the shapes of
arguments, so they compile and can be captured as graphs.

Axes: B batch, N tokens, D width, E tokens that may receive others, O tokens that may be merged into those, R tokens
that are merged, K tokens of O that stay. The first ``protected`` tokens (class token, register tokens) take no part.

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

from isthmus.cloud.elastic.scheduling.profile import DEFAULT_ORDER, MergeOrder


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
    protected = matching.protected
    receiving, others = protected + matching.first, protected + 1 - matching.first
    batch = len(tokens_BND)
    if sizes_BN is None:
        sizes_BN = tokens_BND.new_ones(tokens_BND.shape[:2], dtype=torch.float32)
    samples_B1 = torch.arange(batch, device=tokens_BND.device)[:, None]
    count = matching.merged_BR.shape[1]
    moved_BO = torch.cat((matching.merged_BR, matching.staying_BK), dim=1)

    receiving_BED, others_BOD = tokens_BND[:, receiving::2], tokens_BND[:, others::2][samples_B1, moved_BO]
    receiving_BE, others_BO = sizes_BN[:, receiving::2], sizes_BN[:, others::2].gather(1, moved_BO)

    slots_E1 = torch.arange(receiving_BE.shape[1], device=tokens_BND.device)[:, None]
    gained_BER = (matching.into_BR[:, None] == slots_E1) * others_BO[:, None, :count]
    total_BE = receiving_BE + gained_BER.sum(dim=-1)
    own_share_BE1 = (receiving_BE / total_BE)[..., None].to(tokens_BND.dtype)
    share_BER = (gained_BER / total_BE[..., None]).to(tokens_BND.dtype)
    merged_BED = torch.baddbmm(receiving_BED * own_share_BE1, share_BER, others_BOD[:, :count])
    tokens = (merged_BED, others_BOD[:, count:])
    sizes = (total_BE, others_BO[:, count:])
    if matching.order == "published":
        tokens, sizes = tokens[::-1], sizes[::-1]
    return (
        torch.cat((tokens_BND[:, :protected], *tokens), dim=1),
        torch.cat((sizes_BN[:, :protected], *sizes), dim=1),
    )


def proportional_mask(sizes_BN: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns log sizes (B, 1, 1, N), an additive mask for the attention logits of all heads and queries.

    With it, attention counts a merged token exactly once per input token that it represents. It works with any fused
    attention that accepts a mask.
    """
    return sizes_BN.log().to(dtype)[:, None, None, :]
