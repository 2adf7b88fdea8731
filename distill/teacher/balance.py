"""OGM-GE (Peng et al., CVPR 2022): joint training in which the stronger modality's encoder is slowed down.

Written from the paper's equations 7 to 10; u is a modality, v the other. Axes: B batch, C classes, D feature width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from isthmus.distill.models.teacher import Teacher


def discrepancy(audio_BC: Tensor, visual_BC: Tensor, labels_B: Tensor) -> float:
    """Return rho of sound (Eq. 8): its summed confidence in the right classes over the picture's. The picture's is 1 /
    rho.

    The logits are each branch's own share of the head's, with half of the bias each (Eq. 7).
    """
    right = [
        torch.softmax(logits_BC.detach().float(), dim=1).gather(1, labels_B[:, None]).sum()
        for logits_BC in (audio_BC, visual_BC)
    ]
    return float(right[0] / right[1].clamp_min(1e-12))


def coefficient(rho: float, alpha: float) -> float:
    """Return k (Eq. 9): 1 - tanh(alpha rho) for the modality that is ahead (rho > 1), else 1."""
    return 1.0 - float(torch.tanh(torch.tensor(alpha * rho))) if rho > 1 else 1.0


@torch.no_grad()
def modulate(encoder: nn.Module, k: float, generator: torch.Generator) -> None:
    """Apply Eq. 10 in place: every gradient times k, plus Gaussian noise with that gradient's own standard deviation.

    The deviation over a tensor's elements replaces the covariance of the batch's gradient, which is never formed.
    Tensors of one element have no deviation and get no noise.
    """
    for parameter in encoder.parameters():
        if parameter.grad is None or parameter.grad.numel() < 2:
            continue
        noise = torch.randn(parameter.grad.shape, generator=generator).to(parameter.grad)
        deviation = parameter.grad.std()
        parameter.grad.mul_(k).add_(noise * deviation)


class OgmGe:
    """Loss and gradient hook of one joint training; the hook uses the logits that the loss of the same batch computed.

    Raises ValueError for a fusion that is not linear: its logits are not a sum of the branches' shares.
    """

    def __init__(self, teacher: Teacher, alpha: float, label_smoothing: float, seed: int):
        if teacher.head.linear() is None:
            raise ValueError(f"ogm-ge needs fusion 'concat' or 'sum', not {teacher.head.fusion!r}: use 'unimodal'")
        self._teacher = teacher
        self._alpha = alpha
        self._label_smoothing = label_smoothing
        self._seed = seed
        self._rho = 1.0

    def loss(self, batch: Sequence[Tensor]) -> Tensor:
        """Return the head's cross-entropy on (spectrogram_BFT, frames_BKCHW, labels_B)."""
        spectrogram_BFT, frames_BKCHW, labels_B = batch
        teacher = self._teacher
        audio_BD = teacher.encoders.audio(spectrogram_BFT)
        visual_BD = teacher.encoders.visual(frames_BKCHW).mean(dim=1)
        audio_BC, visual_BC = teacher.head.shares(audio_BD, visual_BD)
        self._rho = discrepancy(audio_BC, visual_BC, labels_B)
        return nn.functional.cross_entropy(audio_BC + visual_BC, labels_B, label_smoothing=self._label_smoothing)

    def on_gradients(self, epoch: int, step: int) -> None:
        """Modulate the gradients; call it between the backward pass and the optimiser's step."""
        generator = torch.Generator().manual_seed((self._seed * 1_000_003 + epoch) * 1_000_003 + step)
        encoders = self._teacher.encoders
        for encoder, rho in (
            (encoders.audio_encoder, self._rho),
            (encoders.visual_encoder, 1 / max(self._rho, 1e-12)),
        ):
            modulate(encoder, coefficient(rho, self._alpha), generator)
