"""PURE: merges similar tokens between attention and MLP, with attention that accounts for the size of merged tokens.

Bipartite soft matching and proportional attention of Bolya et al., "Token Merging: Your ViT But Faster" (ICLR 2023),
written from the paper. All functions are differentiable in tokens. The shapes of results depend only on the shapes of
arguments, so they compile and can be captured as graphs.

Axes: B batch, N tokens, D width, E tokens that may receive others, O tokens that may be merged into those, R tokens
that are merged, K tokens of O that stay. The first ``protected`` tokens (class token, register tokens) take no part.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Matching:
    """Which tokens are merged into which.

    Unprotected tokens alternate: the 1st, 3rd, ... may receive (E), and the 2nd, 4th, ... may be merged (O).
    ``merged_BR`` are positions within O of the merged tokens, most similar first. ``into_BR`` are positions within E
    of the tokens that receive them. ``staying_BK`` are positions within O of the tokens that stay, ascending.
    """

    merged_BR: Tensor
    into_BR: Tensor
    staying_BK: Tensor
    protected: int


def mergeable(tokens: int, wanted: int, protected: int = 1) -> int:
    """Returns how many of ``wanted`` tokens one layer can merge: at most half of the unprotected ones, rounded down."""
    return max(0, min(wanted, (tokens - protected) // 2))


def match(keys_BND: Tensor, count: int, protected: int = 1) -> Matching:
    """Matches every second unprotected token to the most similar of the others, and keeps the ``count`` best matches.

    The similarity is the cosine of ``keys_BND``, the attention keys averaged over heads. On both sides the earlier
    token wins a tie. Raises ValueError if fewer than ``count`` tokens can be merged (see ``mergeable``) or ``count`` is
    not positive.
    """
    tokens = keys_BND.shape[1]
    if not 0 < count <= mergeable(tokens, count, protected):
        raise ValueError(f"{count} of {tokens} tokens cannot be merged; at most {mergeable(tokens, tokens, protected)}")
    directions_BND = functional.normalize(keys_BND[:, protected:], dim=-1)
    similarity_BOE = directions_BND[:, 1::2] @ directions_BND[:, 0::2].mT
    best_BO, nearest_BO = similarity_BOE.max(dim=-1)
    if count == best_BO.shape[1]:  # all are merged, so there is nothing to rank
        merged_BR = torch.arange(count, device=keys_BND.device).expand_as(nearest_BO)
        return Matching(merged_BR, nearest_BO, merged_BR[:, :0], protected)
    order_BO = best_BO.argsort(dim=-1, descending=True, stable=True)
    merged_BR = order_BO[:, :count]
    return Matching(merged_BR, nearest_BO.gather(1, merged_BR), order_BO[:, count:].sort(dim=-1).values, protected)


def merge(tokens_BND: Tensor, sizes_BN: Tensor | None, matching: Matching) -> tuple[Tensor, Tensor]:
    """Averages merged tokens weighted by their sizes. Returns tokens (B, N - R, D) and their sizes, float32 (B, N - R).

    The size of a token is the number of input tokens that it represents (``sizes_BN`` None: one each). The result holds
    the protected, then the receiving, then the staying tokens. Merging conserves the sum of sizes and the sum of tokens
    times sizes.

    The paper's code scatters. Here a small matrix product adds to the receiving tokens: it is faster on processors,
    gives the same sums on every run, and fuses if compiled.
    """
    protected = matching.protected
    batch, tokens, _ = tokens_BND.shape
    if sizes_BN is None:
        sizes_BN = tokens_BND.new_ones((batch, tokens), dtype=torch.float32)
    samples_B1 = torch.arange(batch, device=tokens_BND.device)[:, None]
    count = matching.merged_BR.shape[1]
    moved_BO = torch.cat((matching.merged_BR, matching.staying_BK), dim=1)

    receiving_BED, others_BOD = tokens_BND[:, protected::2], tokens_BND[:, protected + 1 :: 2][samples_B1, moved_BO]
    receiving_BE, others_BO = sizes_BN[:, protected::2], sizes_BN[:, protected + 1 :: 2].gather(1, moved_BO)

    slots_E1 = torch.arange(receiving_BE.shape[1], device=tokens_BND.device)[:, None]
    gained_BER = (matching.into_BR[:, None] == slots_E1) * others_BO[:, None, :count]
    total_BE = receiving_BE + gained_BER.sum(dim=-1)
    own_share_BE1 = (receiving_BE / total_BE)[..., None].to(tokens_BND.dtype)
    share_BER = (gained_BER / total_BE[..., None]).to(tokens_BND.dtype)
    merged_BED = torch.baddbmm(receiving_BED * own_share_BE1, share_BER, others_BOD[:, :count])
    return (
        torch.cat((tokens_BND[:, :protected], merged_BED, others_BOD[:, count:]), dim=1),
        torch.cat((sizes_BN[:, :protected], total_BE, others_BO[:, count:]), dim=1),
    )


def proportional_mask(sizes_BN: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns log sizes (B, 1, 1, N), an additive mask for the attention logits of all heads and queries.

    With it, attention counts a merged token exactly once per input token that it represents. It works with any fused
    attention that accepts a mask.
    """
    return sizes_BN.log().to(dtype)[:, None, None, :]
