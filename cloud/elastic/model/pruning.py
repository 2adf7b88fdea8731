"""Token pruning: a small predictor at three layers decides which tokens stay. A gamma of -P prunes P per cent at each.

DynamicViT (Rao et al., NeurIPS 2021), written from its formulas. Each token has a local feature, and the remaining
tokens share the mean of a global feature. An MLP on both gives the probabilities to drop and to keep. The tokens with
the highest probability to keep stay: a share (1 - P / 100) of the tokens after the previous stage. Protected tokens
(class token, registers) always stay. Training is in warmup/pruning_training.py.

Where we differ: the predictor is between attention and MLP of its block, like merging, and not before the block.

Axes: B batch, N tokens, D width, S stages, 2: log-probability to drop, to keep.
"""

import math
from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from isthmus.cloud.elastic.model.merging import rows
from isthmus.cloud.elastic.model.timm_import import VisionTransformer

MAX_PERCENT: Final = 70
"""Most tokens pruned per stage, in per cent. After three such stages 3 of 100 tokens are left."""
KEEP: Final = 1


class Predictor(nn.Module):
    """Predicts which tokens matter, from each token alone and from all tokens together."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.read = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())
        self.judge = nn.Sequential(
            nn.Linear(width, half), nn.GELU(), nn.Linear(half, half // 2), nn.GELU(), nn.Linear(half // 2, 2)
        )

    def forward(self, tokens_BND: Tensor, staying_BN: Tensor | None = None) -> Tensor:
        """Returns log-probabilities (B, N, 2). ``staying_BN`` is 1 for tokens that remain, else 0; None: all remain."""
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
    """A reducer (see reducer.py) with weights of its own: predictors at 1/4, 1/2 and 3/4 of the depth.

    Raises ValueError for a model that is too shallow for any stage, or whose width is not divisible by 4.
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
        """Returns how many unprotected tokens are left after each stage; at least one."""
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
        return torch.cat((tokens_BND[:, : self._protected], rows(free_BND, staying_BK)), dim=1), None

    def operations(self, layer: int, tokens: int, count: int) -> int:
        weights = sum(linear.weight.numel() for linear in self.predictors[0].modules() if isinstance(linear, nn.Linear))
        return weights * (tokens - self._protected)


def pruning_of(vit: VisionTransformer, tensors: Mapping[str, Tensor]) -> Pruning | None:
    """Returns an untrained pruning reducer if ``tensors`` holds weights of one (``reducer.*``), else None."""
    return Pruning(vit) if any(name.startswith("reducer.") for name in tensors) else None
