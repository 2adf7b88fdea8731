"""One function per equation of the paper (chapter 5). Axes: B batch, D feature width, C classes.

``weights_B`` say how much each sample counts (``selection.Selection``; not in the paper). Their mean is 1 over all that
is learned from, so a batch's loss is divided by its size and not by its weights: over an epoch no sample counts more
for the company it is drawn with. Without them the loss is the equation as printed.
"""

from torch import Tensor
from torch.nn import functional


def classification_loss(
    logits_BC: Tensor, labels_B: Tensor, label_smoothing: float = 0.0, weights_B: Tensor | None = None
) -> Tensor:
    """Eq. 5.3 (teacher) and Eq. 5.9 (heads): cross-entropy, mean over the batch. Smoothing is ours, 0 as printed."""
    if weights_B is None:
        return functional.cross_entropy(logits_BC, labels_B, label_smoothing=label_smoothing)
    losses_B = functional.cross_entropy(logits_BC, labels_B, label_smoothing=label_smoothing, reduction="none")
    return (weights_B * losses_B).mean()


def feature_distillation_loss(student_BD: Tensor, teacher_BD: Tensor, weights_B: Tensor | None = None) -> Tensor:
    """Eq. 5.4: mean squared error of one modality's features, mean over batch and width."""
    if weights_B is None:
        return functional.mse_loss(student_BD, teacher_BD)
    return (weights_B * functional.mse_loss(student_BD, teacher_BD, reduction="none").mean(dim=1)).mean()
