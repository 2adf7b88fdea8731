"""Token pruning: a small predictor at three layers says which tokens stay; a gamma of -P prunes P per cent at each.

DynamicViT (Rao et al., NeurIPS 2021), written from its formulas: of each token a local feature, beside the mean of a
global feature over all tokens still there; an MLP on both gives the probabilities to drop and to keep. The tokens of
highest probability to keep stay, a share (1 - P / 100) of what the stage before left. The class token and its like are
never asked about. Training is in warmup/pruning_training.py.

Where we differ: a predictor sits between attention and MLP of its block, where merging sits too, and not before it.

Axes: B batch, N tokens, D width, S stages, two last: log-probability to drop, to keep.
"""

import math
from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from isthmus.cloud.elastic.model.timm_import import VisionTransformer

MAX_PERCENT: Final = 70
"""The most that is pruned at a stage: with three stages, 3 of 100 tokens are left then."""
KEEP: Final = 1


class Predictor(nn.Module):
    """Which tokens matter, from each alone and from all together."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.read = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())
        self.judge = nn.Sequential(
            nn.Linear(width, half), nn.GELU(), nn.Linear(half, half // 2), nn.GELU(), nn.Linear(half // 2, 2)
        )

    def forward(self, tokens_BND: Tensor, staying_BN: Tensor | None = None) -> Tensor:
        """Log-probabilities (B, N, 2). ``staying_BN``, 1 or 0: which tokens are still there; None: all."""
        local_BND, shared_BND = self.read(tokens_BND).chunk(2, dim=-1)
        if staying_BN is None:
            global_B1D = shared_BND.mean(dim=1, keepdim=True)
        else:
            weights_BN1 = staying_BN[..., None]
            global_B1D = (shared_BND * weights_BN1).sum(dim=1, keepdim=True) / weights_BN1.sum(
                dim=1, keepdim=True
            ).clamp_min(1e-6)
        both_BND = torch.cat((local_BND, global_B1D.expand_as(local_BND)), dim=-1)
        return functional.log_softmax(self.judge(both_BND), dim=-1)


class Pruning(nn.Module):
    """A reducer (see reducer.py) whose weights belong to the model: predictors at a quarter, a half and three quarters
    of its depth.

    Raises ValueError for a model too shallow for any stage, or of odd width.
    """

    most = MAX_PERCENT

    def __init__(self, vit: VisionTransformer) -> None:
        super().__init__()
        self._depth = len(vit.blocks)
        self._protected = int(vit.num_prefix_tokens)
        self._free = int(vit.patch_embed.num_patches)
        self._width = int(vit.embed_dim)
        self.stages = tuple(sorted({self._depth * quarter // 4 for quarter in (1, 2, 3)} - {self._depth - 1}))
        if not self.stages or self._width % 4:
            raise ValueError(f"pruning needs at least two blocks and a width divisible by 4, not {self._depth} blocks")
        self.predictors = nn.ModuleList(Predictor(self._width) for _ in self.stages)

    def staying(self, gamma: int) -> tuple[int, ...]:
        """How many unprotected tokens are left after each stage; at least one."""
        share = 1 - min(max(-gamma, 0), MAX_PERCENT) / 100
        return tuple(max(1, math.ceil(self._free * share ** (stage + 1) - 1e-9)) for stage in range(len(self.stages)))

    def counts(self, gamma: int) -> tuple[int, ...]:
        before = (self._free, *self.staying(gamma))
        gone = {layer: before[stage] - before[stage + 1] for stage, layer in enumerate(self.stages)}
        return tuple(gone.get(layer, 0) for layer in range(self._depth))

    def reduce(
        self, layer: int, tokens_BND: Tensor, keys_BHNd: Tensor, sizes_BN: Tensor | None, count: int
    ) -> tuple[Tensor, Tensor | None]:
        free_BND = tokens_BND[:, self._protected :]
        kept_BN = self.predictors[self.stages.index(layer)](free_BND)[..., KEEP]
        staying_BK = kept_BN.topk(free_BND.shape[1] - count, dim=1).indices.sort(dim=1).values
        samples_B1 = torch.arange(len(free_BND), device=free_BND.device)[:, None]
        return torch.cat((tokens_BND[:, : self._protected], free_BND[samples_B1, staying_BK]), dim=1), None

    def operations(self, layer: int, tokens: int, count: int) -> int:
        weights = sum(linear.weight.numel() for linear in self.predictors[0].modules() if isinstance(linear, nn.Linear))
        return weights * (tokens - self._protected)


def pruning_of(vit: VisionTransformer, tensors: Mapping[str, Tensor]) -> Pruning | None:
    """The reducer whose weights are among a model's (``reducer.*``); None where there are none."""
    return Pruning(vit) if any(name.startswith("reducer.") for name in tensors) else None
