"""Linear layers on processors whose weights lie packed beside, and with them the GELU that follows one of them.

The usual product brings its weights into the order that it reads them in at every call, and writes the bias out before
it. With few rows, as merging leaves them, that is much of the time: packed once, a block's products take half of the
usual ones' time at 8 rows of ViT-B in float32, and 0.95 at 256. With more the usual product is as good or better, so
both are kept: the weights of the blocks take twice the memory. In bfloat16, where the product itself is several times
quicker, they take 0.53 to 0.95 of it (docs/results/elastic_vit_xeon-amx-2core_2026-11-29).
"""

from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

ROWS: Final = range(2, 513)
"""Of how many the packed product is the quicker in float32 (768 x 768 to 768 x 3,072, one thread; Intel with AVX-512,
and up to 197 AMD with AVX2)."""
HINT: Final = 256
"""Rows that weights are packed for; others take a few per cent more than weights packed for them."""


class PackedLinear(nn.Linear):
    """An ``nn.Linear`` with the same parameters. Where a gradient could be wanted, code is compiled, or there is no
    packed product for the numbers, it is nothing else."""

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self._packed: dict[tuple[torch.dtype, int, int], Tensor] = {}

    def forward(self, inputs: Tensor) -> Tensor:
        return self.channels(inputs, 0, self.out_features)

    def channels(self, inputs: Tensor, first: int, last: int, gelu: bool = False) -> Tensor:
        """Outputs ``first`` to ``last`` - 1 alone; with ``gelu`` the exact GELU of them, done as they are written."""
        whole: Tensor | None = self.bias
        bias = None if whole is None else whole[first:last]
        if not self._packs(inputs):
            outputs = functional.linear(inputs, self.weight[first:last], bias)
            return functional.gelu(outputs) if gelu else outputs
        key = (self.weight.dtype, first, last)
        if key not in self._packed:
            self._packed[key] = torch.ops.mkldnn._reorder_linear_weight(self.weight[first:last], HINT)
        after, form = ("gelu", "none") if gelu else ("none", "")
        packed: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, self._packed[key], bias, after, [], form)
        return packed

    def with_gelu(self, inputs: Tensor) -> Tensor:
        """The exact GELU of the outputs."""
        return self.channels(inputs, 0, self.out_features, gelu=True)

    def _packs(self, inputs: Tensor) -> bool:
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return False
        rows = inputs.numel() // self.in_features
        if self.weight.dtype == torch.bfloat16:
            return rows >= ROWS[0] and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return self.weight.dtype == torch.float32 and rows in ROWS
