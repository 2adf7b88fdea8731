"""Trains the predictors of token pruning together with the model (DynamicViT; see model/pruning.py).

During training no token is removed, because the pictures of a batch would then have different numbers of tokens. A
pruned token is masked out of attention instead. Decisions are sampled by straight-through Gumbel-softmax: 0 or 1 in the
forward pass, the gradient of the soft sample in the backward pass. The losses are the paper's: cross entropy; the
distance to the answers and to the remaining tokens of the unpruned model as teacher; and the squared distance of each
stage's share of kept tokens from the requested share.

Axes: B batch, N unprotected tokens, T all tokens, S stages, H heads, d width of a head.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from isthmus.cloud.elastic.model.attention import project
from isthmus.cloud.elastic.model.pruning import KEEP, Pruning
from isthmus.cloud.elastic.model.vit import ElasticViT
from isthmus.cloud.elastic.prepare.prompts import Pictures
from isthmus.distill.recipes import TrainConfig
from isthmus.distill.training.loop import SeededDataset

ANSWERS_WEIGHT: Final = 0.5
TOKENS_WEIGHT: Final = 0.5
RATIO_WEIGHT: Final = 2.0
"""The paper's weights of the three losses that are added to cross entropy."""
EPSILON: Final = 1e-6


class PrunedPictures(SeededDataset[Sequence[Tensor]]):
    """Pictures, labels and the Gumbel noise of every decision (S, N, 2).

    The noise is part of the data, so a run that resumes after a kill decides like an uninterrupted run.
    """

    def __init__(self, pictures: Pictures, pruning: Pruning, seed: int):
        super().__init__(len(pictures), seed)
        self._pictures = pictures
        self._shape = (len(pruning.stages), pruning.staying(0)[0], 2)

    def sample(self, index: int, rng: np.random.Generator) -> Sequence[Tensor]:
        picture_CHW, label = self._pictures.sample(index, rng)
        return picture_CHW, label, torch.from_numpy(rng.gumbel(size=self._shape).astype(np.float32))


@dataclass(frozen=True, eq=False)
class Masked:
    """The result of a masked forward pass.

    ``tokens_BND`` are the normalised tokens of the last layer. ``staying_SBN`` is 1 for tokens that remain after a
    stage, else 0.
    """

    logits_BC: Tensor
    tokens_BND: Tensor
    staying_SBN: Tensor


def masked_forward(model: ElasticViT, images_BCHW: Tensor, noise_BSN2: Tensor) -> Masked:
    """Runs the model with tokens masked by sampled decisions. Raises ValueError for a model that does not prune."""
    pruning, vit = model.reducer, model.vit
    if not isinstance(pruning, Pruning):
        raise ValueError("this model merges tokens; this training is for pruning models")
    tokens_BTD = vit.norm_pre(vit._pos_embed(vit.patch_embed(images_BCHW)))
    free = tokens_BTD.shape[1] - model.protected
    staying_BN = tokens_BTD.new_ones((len(tokens_BTD), free))
    after_stages: list[Tensor] = []
    for layer, block in enumerate(model.blocks):
        attended_BTD = masked_attention(block.attn, block.norm1(tokens_BTD), staying_BN, model.protected)
        tokens_BTD = tokens_BTD + block.ls1(attended_BTD)
        if layer in pruning.stages:
            stage = pruning.stages.index(layer)
            log_BN2 = pruning.predictors[stage](tokens_BTD[:, model.protected :], staying_BN)
            soft_BN2 = (log_BN2 + noise_BSN2[:, stage]).softmax(dim=-1)
            hard_BN = (soft_BN2[..., KEEP] >= 0.5).to(soft_BN2.dtype)
            kept_BN = hard_BN - soft_BN2[..., KEEP].detach() + soft_BN2[..., KEEP]
            staying_BN = staying_BN * kept_BN
            after_stages.append(staying_BN)
        tokens_BTD = tokens_BTD + block.ls2(block.mlp(block.norm2(tokens_BTD)))
    tokens_BTD = vit.norm(tokens_BTD)
    return Masked(vit.forward_head(tokens_BTD), tokens_BTD[:, model.protected :], torch.stack(after_stages))


def masked_attention(attention: Any, normed_BTD: Tensor, staying_BN: Tensor, protected: int) -> Tensor:
    """Computes attention in which only a pruned token itself attends to it. It is differentiable in ``staying_BN``.

    weight_ij = exp(l_ij) g_ij / sum_k exp(l_ik) g_ik, where g_ij is 1 if i = j or token j stays, else 0.
    """
    batch, tokens, _ = normed_BTD.shape
    queries, keys, values = project(attention, normed_BTD, tokens)
    logits_BHTT = queries @ keys.transpose(-2, -1) * queries.shape[-1] ** -0.5
    staying_BT = torch.cat((staying_BN.new_ones((batch, protected)), staying_BN), dim=1)
    itself_TT = torch.eye(tokens, device=normed_BTD.device, dtype=staying_BN.dtype)
    seen_B1TT = (staying_BT[:, None, :] * (1 - itself_TT) + itself_TT)[:, None]
    powers_BHTT = (logits_BHTT - logits_BHTT.amax(dim=-1, keepdim=True).detach()).exp() * seen_B1TT
    weights_BHTT = (powers_BHTT + EPSILON / tokens) / (powers_BHTT.sum(dim=-1, keepdim=True) + EPSILON)
    mixed_BTD = (weights_BHTT @ values).transpose(1, 2).flatten(2)
    attended_BTD: Tensor = attention.proj(attention.norm(mixed_BTD))
    return attended_BTD


class PruningLoss:
    """Computes the loss of a batch (pictures, labels, noise) for pruning ``number`` per cent at each stage."""

    def __init__(self, model: ElasticViT, teacher: ElasticViT, number: int, config: TrainConfig) -> None:
        self._model, self._teacher, self._smoothing = model, teacher, config.label_smoothing
        stages = len(model.reducer.stages) if isinstance(model.reducer, Pruning) else 0
        self._wanted_S = [(1 - number / 100) ** (stage + 1) for stage in range(stages)]

    def __call__(self, batch: Sequence[Tensor]) -> Tensor:
        images_BCHW, labels_B, noise_BSN2 = batch
        masked = masked_forward(self._model, images_BCHW, noise_BSN2)
        vit = self._teacher.vit
        with torch.no_grad():
            teacher_BTD = vit.forward_features(images_BCHW)
            teacher_BC = vit.forward_head(teacher_BTD)
        loss = functional.cross_entropy(masked.logits_BC, labels_B, label_smoothing=self._smoothing)
        answers = functional.kl_div(
            masked.logits_BC.log_softmax(dim=-1), teacher_BC.log_softmax(dim=-1), reduction="batchmean", log_target=True
        )
        staying_BN = masked.staying_SBN[-1].detach()
        apart_BN = (masked.tokens_BND - teacher_BTD[:, self._teacher.protected :]).square().mean(dim=-1)
        tokens = (apart_BN * staying_BN).sum() / staying_BN.sum().clamp_min(1)
        shares_SB = masked.staying_SBN.mean(dim=-1)
        wanted_S1 = shares_SB.new_tensor(self._wanted_S)[:, None]
        ratio = (shares_SB - wanted_S1).square().mean()
        return loss + ANSWERS_WEIGHT * answers + TOKENS_WEIGHT * tokens + RATIO_WEIGHT * ratio
