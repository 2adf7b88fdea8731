"""Linear layers in int8 on processors: weights scaled by output channel, inputs by token at every call.

A token's scale is its own, so an answer never hangs on what else is in the batch. An int8 product takes about half of a
float32 one's time where the processor has vector units for bytes, and less where it has dot products of them. All else
of a block, attention included, stays in float32.
"""

from typing import Final

import torch
from torch import Tensor, nn

from isthmus.cloud.elastic.vit import ElasticViT

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
        self._packed: dict[tuple[int, int], Tensor] = {}

    def forward(self, inputs: Tensor) -> Tensor:
        return self.channels(inputs, 0, len(self.weight))

    def channels(self, inputs: Tensor, first: int, last: int) -> Tensor:
        """Outputs ``first`` to ``last`` - 1 alone."""
        if (first, last) not in self._packed:
            # The packed form hangs on the rows of the input in speed alone.
            self._packed[first, last] = torch.ops.onednn.qlinear_prepack(self.weight[first:last], None)
        if not inputs.numel():
            return inputs.new_empty(*inputs.shape[:-1], last - first)
        largest = torch.maximum(inputs.amax(dim=-1, keepdim=True), -inputs.amin(dim=-1, keepdim=True))
        steps = largest.clamp_(min=SMALLEST).div_(MIDDLE - 1)
        # Cutting off the fraction rounds, after the half; and all is positive, so its bits mean the same without sign.
        rounded = (inputs * steps.reciprocal()).add_(MIDDLE + 0.5).to(torch.int8).view(torch.uint8)
        outputs: Tensor = torch.ops.onednn.qlinear_pointwise(
            rounded,
            1.0,
            MIDDLE,
            self._packed[first, last],
            self.scale_C[first:last],
            torch.zeros(last - first, dtype=torch.int32),
            None,
            1.0,  # scale and zero of outputs that are rounded too, which these are not
            0,
            torch.float32,
            "none",
            [],
            "",
        )
        outputs = outputs.mul_(steps)
        return outputs if self.bias is None else outputs.add_(self.bias[first:last])


def to_int8(model: ElasticViT) -> None:
    """Makes the linear layers of all blocks int8, in place; what is so already stays."""
    for block in model.blocks:
        for part, name in ((block.attn, "qkv"), (block.attn, "proj"), (block.mlp, "fc1"), (block.mlp, "fc2")):
            linear = getattr(part, name)
            if isinstance(linear, nn.Linear):
                setattr(part, name, Int8Linear(linear))
