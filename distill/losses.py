"""One function per equation of the paper (chapter 5). Axes: B batch, D feature width, C classes."""

from torch import Tensor
from torch.nn import functional


def classification_loss(logits_BC: Tensor, labels_B: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Eq. 5.3 (teacher) and Eq. 5.9 (heads): cross-entropy, mean over the batch. Smoothing is ours, 0 as printed."""
    return functional.cross_entropy(logits_BC, labels_B, label_smoothing=label_smoothing)


def feature_distillation_loss(student_BD: Tensor, teacher_BD: Tensor) -> Tensor:
    """Eq. 5.4: mean squared error of one modality's features, mean over batch and width."""
    return functional.mse_loss(student_BD, teacher_BD)
