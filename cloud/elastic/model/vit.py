"""A vision transformer whose number of tokens changes from layer to layer, by one number per batch: gamma.

Follows OTAS (INFOCOM 2024). A gamma below 0 merges that many tokens at each layer (or prunes: reducer.py). A gamma
above 0 adds that many learned prompts of the task at each layer. At gamma 0 it is timm's model. There are two ways to
prompt, which are equal at the first layer:

- append: the prompts of each layer stay for all later layers, which makes N + gamma * layer tokens. The throughputs in
  the paper imply this.
- replace: the prompts of the previous layer are dropped (VPT-deep, Jia et al., ECCV 2022). Then a prompt has an effect
  only through its key and value at its own layer, and these do not depend on the image. So they are computed once
  (``prompt_keys_values``) and attended to, and no token is added.

If the model pools by its class token, only the protected tokens (class token, registers) are read after the last block.
So only they go through its queries, projection and MLP, which gives the same logits for almost one block less.

The MLPs of some blocks may be experts (experts/layer.py). Then each call needs the routers of its pictures. Merged
tokens are routed after merging, and prompts like tokens.

Axes: B batch, N tokens, D width, H heads, L layers, G prompts per layer, A = 2 (key, value), d width of a head.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from isthmus.cloud.elastic.experts.layer import ExpertsMlp, Routing
from isthmus.cloud.elastic.model.attention import Mixing, attend, project
from isthmus.cloud.elastic.model.packed import PackedLinear
from isthmus.cloud.elastic.model.pooling import POOLINGS, pooled, reads_patches
from isthmus.cloud.elastic.model.pruning import Pruning
from isthmus.cloud.elastic.model.reducer import Merging, Reducer
from isthmus.cloud.elastic.model.timm_import import (
    Attention,
    AttentionPoolLatent,
    Block,
    GluMlp,
    Mlp,
    PatchEmbed,
    VisionTransformer,
    VisionTransformerDistilled,
)
from isthmus.cloud.elastic.scheduling.merge_order import DEFAULT_ORDER, MergeOrder
from isthmus.cloud.elastic.tasks.router import NONE, ExpertsShape
from isthmus.cloud.elastic.tasks.task import ModelShape

MAX_PROMPTS: Final = 256
CACHED_BYTES: Final = 10 << 20
"""On a processor, the MLP computes its hidden layer in parts of at most this size. A larger part would leave the cache
between the two products, and the system would allocate and clear its memory again at every layer."""


class ElasticViT(nn.Module):
    """Wraps a timm ViT of plain blocks that pools by class token, mean or attention (pooling.py). Shares its weights.

    ``schedules[gamma]``, for a gamma below 0, holds the change of the token number at each layer, from -tokens to 0. A
    gamma without a schedule changes the number by gamma at every layer. ``mergeable`` limits how many tokens a layer
    can merge, and ``merge_order`` is the order in which it hands tokens on (merging.py). With ``pruning``, tokens are
    pruned instead of merged, and schedules are not allowed; the model must pool by its class token. Raises ValueError
    for another kind of model and for impossible schedules.

    >>> model = ElasticViT(load_vit("vit_tiny_patch16_224", random=True))
    >>> images_BCHW = torch.zeros(2, 3, 224, 224)
    >>> model(images_BCHW, gamma=-8).shape  # eight tokens fewer after each layer
    torch.Size([2, 1000])
    """

    def __init__(
        self,
        vit: VisionTransformer,
        schedules: Mapping[int, Sequence[int]] | None = None,
        pruning: Pruning | None = None,
        merge_order: MergeOrder = DEFAULT_ORDER,
    ):
        super().__init__()
        _check(vit)
        self.vit = vit
        self.blocks: list[Any] = list(vit.blocks)
        self.depth = len(self.blocks)
        self.width = int(vit.embed_dim)
        self.heads = int(self.blocks[0].attn.num_heads)
        self.classes = int(vit.num_classes)
        self.protected = int(vit.num_prefix_tokens)
        self.tokens = int(vit.patch_embed.num_patches) + self.protected
        self.image_px = int(vit.patch_embed.img_size[0])
        merging = Merging(
            schedules or {},
            tokens=self.tokens,
            depth=self.depth,
            width=self.width,
            heads=self.heads,
            protected=self.protected,
            order=merge_order,
        )
        if pruning is not None and merging.schedules:
            raise ValueError("schedules are for merging, but this model prunes")
        if pruning is not None and reads_patches(vit):
            raise ValueError(f"pruning needs a model that pools by its class token, not by {vit.global_pool!r}")
        self._reads_patches = reads_patches(vit)
        self.schedules = merging.schedules
        self.merge_order = merge_order
        self.reducer: Reducer = merging if pruning is None else pruning
        self.expert_layers: list[ExpertsMlp] = [each.mlp for each in self.blocks if type(each.mlp) is ExpertsMlp]
        self.experts: ExpertsShape = self.expert_layers[0].shape if self.expert_layers else NONE
        self.mixing: Mixing = "fused"
        self.identity: str | None = getattr(vit, "identity", None)
        """The model's identity in a profile, if it is not that of its weights in memory."""

    @property
    def shape(self) -> ModelShape:
        """The dimensions that a task must fit."""
        return ModelShape(self.depth, self.width, self.image_px, self.experts)

    def merged_counts(self, gamma: int) -> tuple[int, ...]:
        """Returns how many tokens are removed at each layer, clamped to what is possible.

        The last layer removes none whatever its count: that would save nothing.
        """
        return self.reducer.counts(gamma)

    def features(
        self,
        images_BCHW: Tensor,
        gamma: int = 0,
        prompts_BLGD: Tensor | None = None,
        prompts_BLAHGd: Tensor | None = None,
        routing: Routing | None = None,
    ) -> Tensor:
        """Returns the features that a task's head reads, (B, D).

        ``images_BCHW`` are standardised. If gamma is above 0, prompts to append (``prompts_BLGD``) or to replace
        (``prompts_BLAHGd``) may be given; their B may be 1 if all images have the same task. Without prompts, a gamma
        above 0 is the same as 0. ``routing`` is needed if the model has experts. Raises ValueError for shapes that do
        not fit.
        """
        tokens_BND, sizes_BN = self._encode(images_BCHW, gamma, prompts_BLGD, prompts_BLAHGd, routing=routing)
        if self._reads_patches:
            return pooled(self.vit, tokens_BND, sizes_BN)
        features_BD: Tensor = self.vit.forward_head(tokens_BND, pre_logits=True)
        return features_BD

    def forward(
        self,
        images_BCHW: Tensor,
        gamma: int = 0,
        prompts_BLGD: Tensor | None = None,
        prompts_BLAHGd: Tensor | None = None,
    ) -> Tensor:
        """Returns the logits (B, C) of the model's own head; at gamma 0 they equal timm's. Raises like ``features``."""
        tokens_BND, sizes_BN = self._encode(images_BCHW, gamma, prompts_BLGD, prompts_BLAHGd)
        logits_BC: Tensor
        if self._reads_patches:
            logits_BC = self.vit.head(pooled(self.vit, tokens_BND, sizes_BN))
        else:
            logits_BC = self.vit.forward_head(tokens_BND)
        return logits_BC

    def layer_keys(self, images_BCHW: Tensor) -> list[Tensor]:
        """Returns what merging compares at gamma 0: the keys of each layer, averaged over heads, (B, N, d)."""
        keys: list[Tensor] = []
        self._encode(images_BCHW, 0, None, None, lambda _tokens_BND, keys_BHNd: keys.append(keys_BHNd.mean(dim=1)))
        return keys

    def layer_tokens(self, images_BCHW: Tensor) -> list[Tensor]:
        """Returns the input of each layer at gamma 0 without the protected tokens, (B, N, D)."""
        tokens: list[Tensor] = []
        self._encode(images_BCHW, 0, None, None, lambda tokens_BND, _: tokens.append(tokens_BND[:, self.protected :]))
        return tokens

    def _encode(
        self,
        images_BCHW: Tensor,
        gamma: int,
        prompts_BLGD: Tensor | None,
        prompts_BLAHGd: Tensor | None,
        on_layer: Callable[[Tensor, Tensor], None] | None = None,
        routing: Routing | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Returns the tokens that pooling reads (B, N, D), normalised, and their sizes (None: one input token each).

        They are the protected tokens or, if pooling reads patches, all tokens without the prompts. ``on_layer`` is
        called with the input tokens of each layer and their keys.
        """
        self._check_input(images_BCHW, gamma, prompts_BLGD, prompts_BLAHGd)
        self._check_routing(routing, len(images_BCHW))
        batch, vit = len(images_BCHW), self.vit
        tokens_BND = vit.norm_pre(vit._pos_embed(vit.patch_embed(images_BCHW)))
        sizes_BN: Tensor | None = None
        for layer, (block, count) in enumerate(zip(self.blocks, self.merged_counts(gamma), strict=True)):
            if prompts_BLGD is not None:
                tokens_BND = torch.cat((tokens_BND, prompts_BLGD[:, layer].expand(batch, -1, -1)), dim=1)
            keys_values = None if prompts_BLAHGd is None else prompts_BLAHGd[:, layer].expand(batch, -1, -1, -1, -1)
            short = layer == self.depth - 1 and not self._reads_patches
            asking = self.protected if short else tokens_BND.shape[1]
            attended_BND, keys_BHNd = attend(
                block.attn, block.norm1(tokens_BND), asking, sizes_BN, keys_values, self.mixing
            )
            if on_layer is not None:
                on_layer(tokens_BND, keys_BHNd)
            tokens_BND = tokens_BND[:, :asking] + block.ls1(attended_BND)
            if count and layer < self.depth - 1:
                tokens_BND, sizes_BN = self.reducer.reduce(layer, tokens_BND, keys_BHNd, sizes_BN, count)
            tokens_BND = tokens_BND + block.ls2(_feed_forward(block.mlp, block.norm2(tokens_BND), routing))
        return vit.norm(tokens_BND[:, : self.tokens]), sizes_BN

    def prompt_keys_values(self, prompts_LGD: Tensor) -> Tensor:
        """Returns the keys and values of prompts in "replace" mode, (L, A, H, G, d). It is differentiable."""
        found = []
        for block, prompts_GD in zip(self.blocks, prompts_LGD, strict=True):
            _, keys_BHGd, values_BHGd = project(block.attn, block.norm1(prompts_GD[None]), asking=0)
            found.append(torch.cat((keys_BHGd, values_BHGd)))
        return torch.stack(found)

    def remake_linears(self, made: Callable[[nn.Linear], nn.Module]) -> None:
        """Replaces each linear layer of the blocks by ``made(linear)``, for example of int8.py or packed.py."""
        for block in self.blocks:
            for part, name in ((block.attn, "qkv"), (block.attn, "proj"), (block.mlp, "fc1"), (block.mlp, "fc2")):
                linear = getattr(part, name, None)
                if isinstance(linear, nn.Linear):
                    setattr(part, name, made(linear))
        for mlp in self.expert_layers:
            mlp.experts.remake(made)

    def place_experts(self, device: torch.device, dtype: torch.dtype) -> None:
        """Holds experts on this device, in this number type; those that are not in memory yet as well."""
        for mlp in self.expert_layers:
            mlp.experts.place(device, dtype)

    def operations(self, gamma: int, prompts: str | None = None, k: int | None = None) -> int:
        """Returns the operations of all matrix products for one image; a multiply and an add count as two.

        ``prompts`` is None, "append" or "replace". A token uses ``k`` experts; None: the usual number.
        """
        vit, width = self.vit, self.width
        embed = vit.patch_embed.proj.weight.numel() * (self.tokens - self.protected)
        counted, tokens = embed, self.tokens
        grows = gamma if prompts == "append" else 0
        attended = gamma if prompts == "replace" else 0
        for layer, (block, count) in enumerate(zip(self.blocks, self.merged_counts(gamma), strict=True)):
            tokens += max(0, grows)
            last = layer == self.depth - 1
            asking = self.protected if last and not self._reads_patches else tokens
            counted += width * width * (asking + 2 * tokens)
            counted += 2 * asking * (tokens + attended) * width
            counted += width * width * asking
            if count and not last:
                counted += self.reducer.operations(layer, tokens, count)
                tokens -= count
            read = min(asking, tokens) if last else tokens
            counted += _operations(block.mlp, k) * read
        return 2 * int(counted)

    def _check_routing(self, routing: Routing | None, batch: int) -> None:
        if not self.expert_layers:
            if routing is not None:
                raise ValueError("routers of experts were given to a model without experts")
            return
        if routing is None:
            raise ValueError(
                "this model has experts, and no router was given: its tasks are made by 'isthmus elastic experts'"
            )
        wanted = (self.experts.layers, self.width, self.experts.experts)
        if tuple(routing.weight_TMDE.shape[1:]) != wanted or routing.bias_TME.shape[1:] != (wanted[0], wanted[2]):
            raise ValueError(f"routers of shape {tuple(routing.weight_TMDE.shape)}; the model needs (T, {wanted})")
        tasks_B = routing.tasks_B
        if tasks_B is not None and tasks_B.shape != (batch,):
            raise ValueError(f"routers for {len(tasks_B)} pictures, and {batch} pictures")
        if not 1 <= routing.k <= self.experts.experts:
            raise ValueError(f"{routing.k} experts per token: this model has {self.experts.experts}")

    def _check_input(
        self, images_BCHW: Tensor, gamma: int, prompts_BLGD: Tensor | None, prompts_BLAHGd: Tensor | None
    ) -> None:
        side = self.image_px
        if images_BCHW.ndim != 4 or tuple(images_BCHW.shape[1:]) != (3, side, side) or not len(images_BCHW):
            raise ValueError(f"images of shape {tuple(images_BCHW.shape)}; the model needs (B, 3, {side}, {side})")
        if not -self.reducer.most <= gamma <= MAX_PROMPTS:
            raise ValueError(f"gamma {gamma}: it must be from {-self.reducer.most} to {MAX_PROMPTS}")
        if prompts_BLGD is not None and prompts_BLAHGd is not None:
            raise ValueError("give prompts either to append or to replace, not both")
        for prompts, rest in (
            (prompts_BLGD, (self.depth, gamma, self.width)),
            (prompts_BLAHGd, (self.depth, 2, self.heads, gamma, self.width // self.heads)),
        ):
            if prompts is not None and (
                gamma <= 0 or len(prompts) not in (1, len(images_BCHW)) or tuple(prompts.shape[1:]) != rest
            ):
                raise ValueError(
                    f"prompts of shape {tuple(prompts.shape)} at gamma {gamma}; the model needs (B, {rest})"
                )


def _operations(mlp: Any, k: int | None) -> int:
    """Returns the multiply-adds of an MLP, or of ``k`` of its experts, for one token."""
    if type(mlp) is ExpertsMlp:
        return mlp.operations(k)
    return int(mlp.fc1.weight.numel() + mlp.fc2.weight.numel())


def _feed_forward(mlp: Any, normed_BND: Tensor, routing: Routing | None) -> Tensor:
    """Computes the MLP, or the experts that ``routing`` chooses.

    On a processor without compiled code, the tokens of an MLP are split into parts that fit the cache. The result does
    not depend on the parts, because the MLP treats each token alone.
    """
    if type(mlp) is ExpertsMlp:
        assert routing is not None, "checked before"
        return mlp(normed_BND, routing)  # type: ignore[no-any-return]
    rows_MD = normed_BND.flatten(0, 1)
    most = max(1, CACHED_BYTES // (mlp.fc2.weight.shape[1] * normed_BND.element_size()))
    parts = -(-len(rows_MD) // most)
    if parts == 1 or normed_BND.device.type != "cpu" or torch.compiler.is_compiling():
        return _hidden_and_back(mlp, normed_BND)
    return torch.cat([_hidden_and_back(mlp, part_MD) for part_MD in rows_MD.tensor_split(parts)]).view(normed_BND.shape)


def _hidden_and_back(mlp: Any, inputs: Tensor) -> Tensor:
    exact = type(mlp) is Mlp and type(mlp.act) is nn.GELU and mlp.act.approximate == "none"
    fused = exact and isinstance(mlp.fc1, PackedLinear)
    outputs: Tensor = mlp.fc2(mlp.norm(mlp.fc1.with_gelu(inputs))) if fused else mlp(inputs)
    return outputs


def _check(vit: Any) -> None:
    """Raises ValueError if the forward pass above would differ from this model's own."""
    reason = _foreign(vit)
    if reason:
        raise ValueError(f"token adaptation needs timm's plain ViT for RGB pictures; this is {reason}")


def _foreign(vit: Any) -> str | None:
    """Returns in what a model differs from those that ElasticViT computes; None: in nothing."""
    if type(vit) not in (VisionTransformer, VisionTransformerDistilled):
        return f"a {type(vit).__name__}"
    if vit.global_pool not in POOLINGS or (vit.attn_pool is not None) != (vit.global_pool == "map"):
        return f"one that pools by {vit.global_pool!r}, not by one of {', '.join(POOLINGS)}"
    if vit.attn_pool is not None and type(vit.attn_pool) is not AttentionPoolLatent:
        return f"one that pools by {type(vit.attn_pool).__name__}"
    if vit.dynamic_img_size or not isinstance(vit.patch_drop, nn.Identity):
        return "one with images of any size or dropped patches"
    if type(vit.patch_embed) is not PatchEmbed:
        return f"one that embeds patches by {type(vit.patch_embed).__name__}"
    channels = int(vit.patch_embed.proj.weight.shape[1])
    if channels != 3:
        return f"one for pictures of {channels} channel{'s' if channels != 1 else ''}"
    height, width = vit.patch_embed.img_size
    if height != width:
        return f"one for pictures of {height} x {width} pixels, which are not square"
    for block in vit.blocks:
        attention, mlp = getattr(block, "attn", None), getattr(block, "mlp", None)
        if type(block) is not Block or type(attention) is not Attention:
            return f"one of {type(block).__name__}s with {type(attention).__name__}"
        if type(mlp) not in (Mlp, GluMlp, ExpertsMlp):
            return f"one whose MLP is a {type(mlp).__name__}"
        if attention.gate is not None:
            return "one with gated Attention"
        if attention.attn_dim != vit.embed_dim:
            return f"one whose attention has width {attention.attn_dim} and its tokens {vit.embed_dim}"
        if any(drop.p for drop in block.modules() if isinstance(drop, nn.Dropout)):
            return "one with dropout"
    return None
