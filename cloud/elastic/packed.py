"""Linear layers in float32 on processors, whose weights lie packed beside for products of few rows.

Where tokens are merged, the last layers of one image have a few dozen rows. The usual product then spends its time on
bringing the weights into the order that it reads them in, and does so at every call. Packed once, 2 to 128 rows take
two thirds to nine tenths of the time (docs/results/elastic_vit, 2026-11-22); with more the usual product is as good or
better, so both are kept: the weights of the blocks take twice the memory.
"""

from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

ROWS: Final = range(2, 129)
"""Of how many the packed product is the quicker (768 x 768 to 768 x 3,072, one thread of an AMD EPYC with AVX2)."""


class PackedLinear(nn.Linear):
    """An ``nn.Linear`` with the same parameters. Where a gradient could be wanted, code is compiled, or numbers are not
    float32, it is nothing else."""

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self._packed: dict[tuple[int, int], Tensor] = {}

    def forward(self, inputs: Tensor) -> Tensor:
        return self.channels(inputs, 0, self.out_features)

    def channels(self, inputs: Tensor, first: int, last: int) -> Tensor:
        """Outputs ``first`` to ``last`` - 1 alone."""
        whole: Tensor | None = self.bias
        bias = None if whole is None else whole[first:last]
        if not self._packs(inputs):
            return functional.linear(inputs, self.weight[first:last], bias)
        if (first, last) not in self._packed:
            self._packed[first, last] = torch.ops.mkldnn._reorder_linear_weight(self.weight[first:last], ROWS[-1])
        outputs: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, self._packed[first, last], bias, "none", [], "")
        return outputs

    def _packs(self, inputs: Tensor) -> bool:
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or self.weight.dtype != torch.float32:
            return False
        return inputs.numel() // self.in_features in ROWS
