"""One function per equation of the paper (chapter 5). Axes: B batch, D feature width, C classes.

``weights_B`` is how much each sample counts (``selection.Selection``; not in the paper). The weights have mean 1 over
the whole training set. A batch's loss is therefore divided by its size, not by the sum of its weights, so that over an
epoch no sample counts more because of the batch it is drawn in. Without weights the loss is the equation as printed.
"""

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional

from isthmus.distill.models.heads import present
from isthmus.proto.messages import Captured


def classification_loss(
    logits_BC: Tensor, labels_B: Tensor, label_smoothing: float = 0.0, weights_B: Tensor | None = None
) -> Tensor:
    """Return Eq. 5.3 (teacher) and Eq. 5.9 (heads): cross-entropy, mean over the batch. Label smoothing is ours; it is
    0 in the paper.
    """
    if weights_B is None:
        return functional.cross_entropy(logits_BC, labels_B, label_smoothing=label_smoothing)
    losses_B = functional.cross_entropy(logits_BC, labels_B, label_smoothing=label_smoothing, reduction="none")
    return (weights_B * losses_B).mean()


def masked_loss(
    logits_of: Callable[[Tensor | None], Tensor],
    labels_B: Tensor,
    dropout: float,
    label_smoothing: float = 0.0,
    weights_B: Tensor | None = None,
) -> Tensor:
    """Return the expectation of ``classification_loss`` if the sound is absent with probability ``dropout``, the
    picture with the same probability, and never both.

    All three cases are computed and weighted, so nothing is drawn and the gradient has no noise from the masks.
    ``logits_of`` maps present_B2 (None: all there) to logits_BC.
    """
    both = classification_loss(logits_of(None), labels_B, label_smoothing, weights_B)
    if dropout == 0:
        return both
    alone = [
        classification_loss(
            logits_of(present(captured, len(labels_B)).to(labels_B.device)), labels_B, label_smoothing, weights_B
        )
        for captured in (Captured.SOUND, Captured.PICTURE)
    ]
    return (1 - 2 * dropout) * both + dropout * (alone[0] + alone[1])


def feature_distillation_loss(student_BD: Tensor, teacher_BD: Tensor, weights_B: Tensor | None = None) -> Tensor:
    """Return Eq. 5.4: mean squared error of one modality's features, mean over batch and width."""
    if weights_B is None:
        return functional.mse_loss(student_BD, teacher_BD)
    return (weights_B * functional.mse_loss(student_BD, teacher_BD, reduction="none").mean(dim=1)).mean()
