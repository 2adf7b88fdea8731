"""Linear layers in int8 for processors. Weights have one scale per output channel, inputs one scale per token.

Each token has its own scale, so an answer never depends on the rest of the batch. An int8 product takes about half the
time of a float32 product if the processor has vector units for bytes, and less if it has dot products of bytes. The
rest of a block, including attention, stays in float32.
"""

from typing import Final

import torch
from torch import Tensor, nn

LARGEST: Final = 127
"""Weights are from -127 to 127."""
MIDDLE: Final = 64
"""The zero point of inputs, which are from 1 to 127. With inputs of 8 bits, the sum of two products would overflow the
16 bits that processors without dot products of bytes use."""
SMALLEST: Final = 1e-30
"""Largest values below this are treated as 0: the inverse of their scale could not be represented."""


class Int8Linear(nn.Module):
    """An ``nn.Linear`` converted to int8. Inputs and outputs are float32. It is for inference only."""

    weight: Tensor
    scale_C: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight_CK = linear.weight.detach().float()
        scale_C = weight_CK.abs().amax(dim=1).clamp(min=SMALLEST) / LARGEST
        biased = "bias" in dict(linear.named_parameters())
        self.register_buffer("weight", (weight_CK / scale_C[:, None]).round().to(torch.int8))
        self.register_buffer("scale_C", scale_C)
        self.register_buffer("bias", linear.bias.detach().float() if biased else None)
        self._zeros_C = torch.zeros(len(self.weight), dtype=torch.int32)
        self._packed: dict[tuple[int, int], Tensor] = {}

    def forward(self, inputs: Tensor) -> Tensor:
        return self.channels(inputs, 0, len(self.weight))

    def channels(self, inputs: Tensor, first: int, last: int) -> Tensor:
        """Computes only the outputs ``first`` to ``last`` - 1."""
        if (first, last) not in self._packed:
            # The number of rows that weights are packed for affects only speed.
            self._packed[first, last] = torch.ops.onednn.qlinear_prepack(self.weight[first:last], None)
        width = inputs.shape[-1]
        rows = inputs.numel() // width
        if not rows:
            return inputs.new_empty(*inputs.shape[:-1], last - first)
        inputs_NK = inputs.reshape(rows, width)
        largest_N1 = torch.maximum(inputs_NK.amax(dim=1, keepdim=True), -inputs_NK.amin(dim=1, keepdim=True))
        steps_N1 = largest_N1.clamp_(min=SMALLEST).div_(MIDDLE - 1)
        rounded_MK = torch.empty((padded(rows), width), dtype=torch.int8)
        # After adding a half, truncation rounds. All values are positive, so int8 and uint8 have the same bits.
        rounded_MK[:rows] = (inputs_NK * steps_N1.reciprocal()).add_(MIDDLE + 0.5)
        rounded_MK[rows:] = MIDDLE
        outputs_MC: Tensor = torch.ops.onednn.qlinear_pointwise(
            rounded_MK.view(torch.uint8),
            1.0,
            MIDDLE,
            self._packed[first, last],
            self.scale_C[first:last],
            self._zeros_C[first:last],
            None,
            1.0,  # scale and zero point of quantised outputs; these outputs are not quantised
            0,
            torch.float32,
            "none",
            [],
            "",
        )
        outputs_NC = outputs_MC[:rows].mul_(steps_N1)
        if self.bias is not None:
            outputs_NC.add_(self.bias[first:last])
        return outputs_NC.view(*inputs.shape[:-1], last - first)


def padded(rows: int) -> int:
    """Returns the number of rows, rounded up, that a product is computed with.

    oneDNN generates code for every number of rows, which takes longer than the product itself, and caches about a
    thousand of them. Rounding keeps the set of numbers small for all batch sizes and gammas.
    """
    step = next((step for most, step in ((256, 16), (1_024, 32), (2_048, 64)) if rows <= most), 128)
    return -(-rows // step) * step
