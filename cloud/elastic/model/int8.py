"""Linear layers in int8 on processors: weights scaled by output channel, inputs by token at every call.

A token's scale is its own, so an answer never hangs on what else is in the batch. An int8 product takes about half of a
float32 one's time where the processor has vector units for bytes, and less where it has dot products of them. All else
of a block, attention included, stays in float32.
"""

from typing import Final

import torch
from torch import Tensor, nn

LARGEST: Final = 127
"""Weights go from its negative to it."""
MIDDLE: Final = 64
"""What stands for 0 in an input, which goes from 1 to 127: with 8 bits, sums of two products overflow the 16 bits that
processors without dot products of bytes keep them in."""
SMALLEST: Final = 1e-30
"""What is smaller is as good as 0, and has no scale whose inverse could be written."""


class Int8Linear(nn.Module):
    """An ``nn.Linear`` made int8. Takes and gives float32, for inference only."""

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
        """Outputs ``first`` to ``last`` - 1 alone."""
        if (first, last) not in self._packed:
            # The packed form hangs on the rows of the input in speed alone.
            self._packed[first, last] = torch.ops.onednn.qlinear_prepack(self.weight[first:last], None)
        width = inputs.shape[-1]
        rows = inputs.numel() // width
        if not rows:
            return inputs.new_empty(*inputs.shape[:-1], last - first)
        inputs_NK = inputs.reshape(rows, width)
        largest_N1 = torch.maximum(inputs_NK.amax(dim=1, keepdim=True), -inputs_NK.amin(dim=1, keepdim=True))
        steps_N1 = largest_N1.clamp_(min=SMALLEST).div_(MIDDLE - 1)
        rounded_MK = torch.empty((padded(rows), width), dtype=torch.int8)
        # Cutting off the fraction rounds, after the half; and all is positive, so its bits mean the same without sign.
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
            1.0,  # scale and zero of outputs that are rounded too, which these are not
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
    """The rows that a product is computed with. oneDNN makes code for every number of rows, which takes longer than the
    product, and keeps some thousand of them: few numbers have to do for all batch sizes and gammas."""
    step = next((step for most, step in ((256, 16), (1_024, 32), (2_048, 64)) if rows <= most), 128)
    return -(-rows // step) * step
