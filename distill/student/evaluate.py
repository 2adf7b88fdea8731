"""A student's accuracy on labelled clips, for each way of answering."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from isthmus.data.cache.read import ClipArrays
from isthmus.distill.models.heads import FusionHead, HeadBank, present
from isthmus.distill.models.trunk import EncoderPair
from isthmus.distill.training.teacher_cache import Encoded, encode_clips, evaluation_mean, head_probabilities
from isthmus.proto.messages import Captured

Float32s = npt.NDArray[np.float32]


@dataclass(frozen=True)
class StudentOutputs:
    """A student's outputs. Axes: N clips, D feature width, C classes. ``probabilities_NC`` is beta_c: teacher head on
    student features.
    """

    audio_ND: Float32s
    visual_ND: Float32s
    probabilities_NC: Float32s

    def only(self, rows_S: npt.NDArray[np.int64]) -> "StudentOutputs":
        """Return the outputs of some of the clips."""
        return StudentOutputs(self.audio_ND[rows_S], self.visual_ND[rows_S], self.probabilities_NC[rows_S])


def student_outputs(
    student: EncoderPair, teacher_head: FusionHead, clips: ClipArrays, device: torch.device
) -> StudentOutputs:
    """Compute what a device computes of its clips.

    >>> student_outputs(release.student(), release.teacher_head, release.public, CPU).probabilities_NC.shape
    (24, 3)
    """
    return outputs_of(encode_clips(student, clips, device), teacher_head, clips)


def outputs_of(encoded: Encoded, teacher_head: FusionHead, clips: ClipArrays) -> StudentOutputs:
    """Return the outputs of clips that are encoded already."""
    audio_ND, visual_NKD = encoded
    visual_ND = evaluation_mean(visual_NKD, clips)
    return StudentOutputs(audio_ND, visual_ND, head_probabilities(teacher_head, audio_ND, visual_ND))


@torch.inference_mode()
def bank_probabilities(
    bank: HeadBank, outputs: StudentOutputs, ratio: float, captured: Captured = Captured.BOTH
) -> Float32s:
    """Return the probabilities (N, C) of one ratio's compressor and head, as if each clip had only ``captured``."""
    audio_ND, visual_ND = torch.from_numpy(outputs.audio_ND), torch.from_numpy(outputs.visual_ND)
    logits_NC = bank[ratio](audio_ND, visual_ND, present(captured, len(audio_ND)))
    probabilities: Float32s = torch.softmax(logits_NC, dim=1).numpy()
    return probabilities


def by_captured(name: str, accuracy_of: Callable[[Captured], float]) -> dict[str, float]:
    """Return the rows of a table: one for both modalities, one for each alone."""
    rows = {Captured.BOTH: name, Captured.SOUND: f"{name}, no picture", Captured.PICTURE: f"{name}, no sound"}
    return {row: accuracy_of(captured) for captured, row in rows.items()}


def accuracy(probabilities_NC: Float32s, labels_N: npt.NDArray[np.int64]) -> float:
    """Return the share of clips classified correctly. Raises ValueError if there are none.

    >>> accuracy(np.array([[0.9, 0.1], [0.4, 0.6]], np.float32), np.array([0, 0]))
    0.5
    """
    if len(labels_N) == 0:
        raise ValueError("no clips to measure on")
    return float((probabilities_NC.argmax(axis=1) == labels_N).mean())
