"""The forward of a Llama-shaped model over the tokens of one step: chunks of prompts and single tokens, side by side.

The tokens of all requests of a step stand in one row, without padding. Everything but attention is computed for all of
them at once; attention is the KV cache's work (``kv.py``), because its layout decides what is fast.

Axes: T tokens of the step, N tokens whose logits are wanted, W width, H query heads, K key-value heads, D values per
head, V vocabulary.

Sources: RMSNorm (Zhang and Sennrich 2019), rotary embedding (Su et al. 2021), grouped queries (Ainslie et al. 2023),
SiLU-gated MLP (Shazeer 2020).
"""

from collections.abc import Iterable
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from isthmus.cloud.elastic.model.packed import PackedLinear
from isthmus.cloud.generation.model.configuration import LlamaConfig
from isthmus.cloud.generation.model.kv import KVCache

MOST_SUMMED: Final = 768
"""Inputs of a product whose packed sum stays near enough to the exact one in float32: all logits of SmolLM2-135M are
then within 1e-4 of those in float64, where whole sums of 1,536 are up to 1.5e-4 away, for 3 % of a step's time."""
_FUSED = {"q_proj": 0, "k_proj": 1, "v_proj": 2, "gate_proj": 0, "up_proj": 1}


def _linear(columns: int, rows: int, bias: bool) -> PackedLinear:
    return PackedLinear(nn.Linear(columns, rows, bias=bias), most_summed=MOST_SUMMED)


class Block(nn.Module):
    """One layer. Queries, keys and values are one product, and so are gate and up."""

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        self.epsilon = config.norm_epsilon
        queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.parts = {
            "qkv": (queries, keys, keys),
            "gate_up": (config.mlp_width, config.mlp_width),
        }
        self.attention_norm = nn.Parameter(torch.empty(config.width))
        self.qkv = _linear(config.width, queries + 2 * keys, config.qkv_bias)
        self.output = _linear(queries, config.width, config.output_bias)
        self.mlp_norm = nn.Parameter(torch.empty(config.width))
        self.gate_up = _linear(config.width, 2 * config.mlp_width, config.mlp_bias)
        self.down = _linear(config.mlp_width, config.width, config.mlp_bias)

    def forward(self, inputs_TW: Tensor, cosines_TD: Tensor, sines_TD: Tensor, cache: KVCache) -> Tensor:
        normed_TW = functional.rms_norm(inputs_TW, self.attention_norm.shape, self.attention_norm, self.epsilon)
        heads_TXD = self.qkv(normed_TW).view(len(inputs_TW), -1, self.head_dim)
        turned_TXD = rotated(heads_TXD[:, : self.heads + self.kv_heads], cosines_TD, sines_TD)
        attended_THD = cache.attend(
            self.layer, turned_TXD[:, : self.heads], turned_TXD[:, self.heads :], heads_TXD[:, -self.kv_heads :]
        )
        inputs_TW = inputs_TW + self.output(attended_THD.reshape(len(inputs_TW), -1))
        normed_TW = functional.rms_norm(inputs_TW, self.mlp_norm.shape, self.mlp_norm, self.epsilon)
        gate_TM, up_TM = self.gate_up(normed_TW).chunk(2, dim=-1)
        out_TW: Tensor = inputs_TW + self.down(functional.silu(gate_TM) * up_TM)
        return out_TW


def rotated(heads_TXD: Tensor, cosines_TD: Tensor, sines_TD: Tensor) -> Tensor:
    """Turns each pair (d, d + D/2) of every head by its position's angle."""
    first_TXE, second_TXE = heads_TXD.chunk(2, dim=-1)
    swapped_TXD = torch.cat((-second_TXE, first_TXE), dim=-1)
    return heads_TXD * cosines_TD[:, None] + swapped_TXD * sines_TD[:, None]


class Llama(nn.Module):
    """A model whose weights ``take`` fills. Made on the meta device, it has shapes alone."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Parameter(torch.empty(config.vocabulary, config.width))
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = nn.Parameter(torch.empty(config.width))
        self.head = _linear(config.width, config.vocabulary, bias=False)
        self._angles: tuple[Tensor, Tensor] | None = None

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    @torch.inference_mode()
    def forward(self, ids_T: Tensor, positions_T: Tensor, wanted_N: Tensor, cache: KVCache) -> Tensor:
        """Returns the logits of the tokens with the indices ``wanted_N``, float32 (N, V).

        ``cache.begin`` was called for this step. The cache then holds the keys and values of the step's tokens too.
        """
        cosines_TD, sines_TD = self._turns(positions_T)
        states_TW = functional.embedding(ids_T, self.embedding)
        for block in self.blocks:
            states_TW = block(states_TW, cosines_TD, sines_TD, cache)
        normed_NW = functional.rms_norm(states_TW[wanted_N], self.norm.shape, self.norm, self.config.norm_epsilon)
        logits_NV: Tensor = self.head(normed_NW)
        return logits_NV.float()

    def _turns(self, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        """Returns cosine and sine of every angle, (T, D) each, from a table that grows with the positions."""
        last = int(positions_T.max())
        if self._angles is None or len(self._angles[0]) <= last:
            reach = min(max(1_024, 2 * (last + 1)), max(self.config.context, last + 1))
            # In float32 from the start, as models are trained: rounding differs by up to 1e-5 of an angle otherwise.
            exponents_E = torch.arange(0, self.config.head_dim, 2, dtype=torch.float32) / self.config.head_dim
            plain_E = 1.0 / self.config.rope.theta**exponents_E
            frequencies_E = torch.tensor(self.config.rope.scaled(plain_E.tolist()), dtype=torch.float32)
            angles_PE = torch.arange(reach, dtype=torch.float32)[:, None] * frequencies_E
            angles_PD = torch.cat((angles_PE, angles_PE), dim=-1).to(self.device)
            self._angles = (angles_PD.cos().to(self.dtype), angles_PD.sin().to(self.dtype))
        return self._angles[0][positions_T], self._angles[1][positions_T]

    def take(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Copies tensors with Hugging Face's names to their places. A tied head is the embedding itself."""
        with torch.no_grad():
            for name, tensor in tensors:
                self._place(name, tensor)
        if self.config.tied:
            self.head.weight = self.embedding

    def _place(self, name: str, tensor: Tensor) -> None:
        whole = {
            "model.embed_tokens.weight": self.embedding,
            "model.norm.weight": self.norm,
            "lm_head.weight": self.head.weight,
        }
        if name in whole:
            whole[name].copy_(tensor)
            return
        _, _, layer, *inner, part, kind = name.split(".")
        block = self.blocks[int(layer)]
        assert isinstance(block, Block)
        if part in ("input_layernorm", "post_attention_layernorm"):
            (block.attention_norm if part == "input_layernorm" else block.mlp_norm).copy_(tensor)
            return
        if part in ("o_proj", "down_proj"):
            linear, first = (block.output if part == "o_proj" else block.down), 0
        else:
            fused = "qkv" if inner == ["self_attn"] else "gate_up"
            linear = block.qkv if fused == "qkv" else block.gate_up
            first = sum(block.parts[fused][: _FUSED[part]])
        target = linear.weight if kind == "weight" else linear.bias
        target[first : first + len(tensor)].copy_(tensor)
