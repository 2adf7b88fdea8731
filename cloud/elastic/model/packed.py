"""Linear layers for processors with prepacked weights, optionally fused with the exact GELU that follows.

The usual product reorders its weights at every call, and writes the bias before the product. With few rows, as after
merging, this is a large part of the time. With weights packed once, the products of a block of ViT-B in float32 take
half of the usual time at 8 rows. With hundreds of rows and more they take 0.93 to 1 of it on Intel with AVX-512, and
less on AMD, where all of ViT-B takes 0.91 of its time at batch 8. In bfloat16 they take 0.53 to 0.95 of the usual time
(docs/results/elastic_vit_epyc-zen4-2core_2026-11-30.md, docs/results/elastic_vit_xeon-amx-2core_2026-11-29.md). The
packed weights are a second copy, so the weights of the blocks take twice the memory.
"""

from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

FEWEST_ROWS: Final = 2
"""In float32 a single row is multiplied with the weights as they are."""
HINT: Final = 256
"""Number of rows that weights are packed for. With other numbers the product takes a few per cent longer than with
weights packed for them."""


class PackedLinear(nn.Linear):
    """An ``nn.Linear`` with the same parameters, which uses packed weights if it can.

    It computes the usual product if gradients are enabled, if code is being compiled, or if there is no packed product
    for the number type and the number of rows.

    A packed product adds up all inputs in one go, so its rounding error grows with their number. With ``most_summed``,
    sums of more inputs are added up of pieces in float32. In bfloat16 they are not: each piece would be rounded.
    """

    def __init__(self, linear: nn.Linear, most_summed: int | None = None) -> None:
        nn.Module.__init__(self)
        self._most_summed = linear.in_features if most_summed is None else most_summed
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self._packed: dict[tuple[torch.dtype, int, int, int, int], Tensor] = {}

    def forward(self, inputs: Tensor) -> Tensor:
        return self.channels(inputs, 0, self.out_features)

    def channels(self, inputs: Tensor, first: int, last: int, gelu: bool = False) -> Tensor:
        """Computes only the outputs ``first`` to ``last`` - 1; with ``gelu`` their exact GELU, in the same pass."""
        whole: Tensor | None = self.bias
        bias = None if whole is None else whole[first:last]
        if not self._packs(inputs):
            outputs = functional.linear(inputs, self.weight[first:last], bias)
            return functional.gelu(outputs) if gelu else outputs
        if self.in_features > self._most_summed and self.weight.dtype == torch.float32 and not gelu:
            outputs = self._product(inputs, first, last, bias, 0, self._most_summed)
            for start in range(self._most_summed, self.in_features, self._most_summed):
                stop = min(start + self._most_summed, self.in_features)
                outputs += self._product(inputs, first, last, None, start, stop)
            return outputs
        return self._product(inputs, first, last, bias, 0, self.in_features, gelu=gelu)

    def _product(
        self, inputs: Tensor, first: int, last: int, bias: Tensor | None, start: int, stop: int, *, gelu: bool = False
    ) -> Tensor:
        """Computes the packed product of the inputs ``start`` to ``stop`` - 1 alone."""
        key = (self.weight.dtype, first, last, start, stop)
        if key not in self._packed:
            part = self.weight[first:last, start:stop].contiguous()
            self._packed[key] = torch.ops.mkldnn._reorder_linear_weight(part, HINT)
        after, form = ("gelu", "none") if gelu else ("none", "")
        part = inputs[..., start:stop] if stop - start < self.in_features else inputs
        packed: Tensor = torch.ops.mkldnn._linear_pointwise(part, self._packed[key], bias, after, [], form)
        return packed

    def with_gelu(self, inputs: Tensor) -> Tensor:
        """Computes the exact GELU of all outputs."""
        return self.channels(inputs, 0, self.out_features, gelu=True)

    def _packs(self, inputs: Tensor) -> bool:
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return False
        rows = inputs.numel() // self.in_features
        if self.weight.dtype == torch.bfloat16:
            # One row too: the usual product of one row reads the weights at half of the packed one's speed.
            return rows > 0 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
        return self.weight.dtype == torch.float32 and rows >= FEWEST_ROWS
