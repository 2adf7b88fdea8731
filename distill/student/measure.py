"""A student's own accuracy on public clips, and the confidence threshold that a device's guard uses."""

import numpy as np
import numpy.typing as npt
import torch

from isthmus.distill.models.heads import HeadBank
from isthmus.distill.models.trunk import EncoderPair
from isthmus.distill.release import Release
from isthmus.distill.selection import Selection
from isthmus.distill.student.evaluate import StudentOutputs, accuracy, bank_probabilities, outputs_of, student_outputs
from isthmus.distill.student.personalise import clips_of_heads
from isthmus.distill.training.teacher_cache import Encoded
from isthmus.proto.messages import PublicMeasure

FEWEST_CLIPS = 50
"""With fewer clips outside the selection, measuring on all labelled clips is more accurate."""
MOST_CLIPS = 512
"""More clips would hardly change the result, and every personalisation waits for it."""


def atc_threshold(confidence_N: npt.NDArray[np.floating], right_N: npt.NDArray[np.bool_]) -> float:
    """Return the confidence t with share(confidence >= t) = share(right): Garg et al. (ICLR 2022), eq. 1, with the
    largest probability as the score. Confidences equal to t all count as above it. Raises ValueError for no clips.
    """
    if len(confidence_N) == 0:
        raise ValueError("no clips to measure on")
    wrong = int(len(right_N) - np.count_nonzero(right_N))
    rising_N = np.sort(confidence_N.astype(np.float64))
    above_all = min(1.0, float(np.nextafter(rising_N[-1], 2.0)))
    return above_all if wrong == len(rising_N) else float(min(1.0, rising_N[wrong]))


def measured_rows(
    labels_N: npt.NDArray[np.int64], selected_S: npt.NDArray[np.int64], *, at_most: int = MOST_CLIPS
) -> npt.NDArray[np.int64]:
    """Return the public clips to measure on, in ascending order: labelled clips outside the selection, evenly spaced if
    there are more than ``at_most``; all labelled clips if fewer than ``FEWEST_CLIPS`` are outside.
    """
    labelled = np.flatnonzero(labels_N >= 0)
    outside = np.setdiff1d(labelled, selected_S)
    rows = outside if len(outside) >= FEWEST_CLIPS else labelled
    return rows if len(rows) <= at_most else rows[np.linspace(0, len(rows) - 1, at_most).astype(np.int64)]


def head_shares(release: Release, selection: Selection) -> tuple[float, ...]:
    """Return the share of each class among the clips that heads were trained on, if those are all public clips with
    equal weights; else return an empty tuple.

    A few epochs on a selection do not teach a head how rare it made a class, so correcting for that spoils the answers
    (docs/log.md).
    """
    learned = clips_of_heads(release, selection)
    if learned.weighted or len(learned) < len(release.public.names):
        return ()
    labels_N = release.labels()
    counts_C = np.bincount(labels_N[labels_N >= 0], minlength=len(release.recipe.classes))
    return tuple((counts_C / counts_C.sum()).tolist())


def measure_public(
    release: Release,
    student: EncoderPair,
    heads: HeadBank,
    selection: Selection,
    device: torch.device,
    encoded: Encoded | None = None,
) -> PublicMeasure:
    """Return accuracy and ATC threshold of the student's local head (the smallest ratio of ``heads``) on public clips,
    the accuracy of every head, and the local one's ``head_shares`` for the selection that the student was distilled on.
    ``encoded``: the features of all public clips, if they are known.

    Raises ValueError if no public clip has a label.
    """
    labels_N = release.labels()
    rows = measured_rows(labels_N, selection.indices_S)
    teacher_head, clips = release.teacher_head.to(device), release.public.subset(rows)
    if encoded is None:
        outputs = student_outputs(student, teacher_head, clips, device)
    else:
        outputs = outputs_of((encoded[0][rows], encoded[1][rows]), teacher_head, clips)
    return measure_outputs(release, heads, selection, rows, outputs)


def measure_outputs(
    release: Release, heads: HeadBank, selection: Selection, rows: npt.NDArray[np.int64], outputs: StudentOutputs
) -> PublicMeasure:
    """Return what ``measure_public`` does, from a student's outputs on the public clips ``rows``."""
    labels_N = release.labels()
    of_ratio = {ratio: bank_probabilities(heads, outputs, ratio) for ratio in heads.ratios}
    probabilities_NC = of_ratio[heads.local_ratio]
    right_N = probabilities_NC.argmax(axis=1) == labels_N[rows]
    threshold = atc_threshold(probabilities_NC.max(axis=1), right_N)
    return PublicMeasure(
        clips=len(rows),
        accuracy=float(right_N.mean()),
        atc_threshold=threshold,
        class_shares=head_shares(release, selection),
        ratio_accuracies=tuple(accuracy(each_NC, labels_N[rows]) for each_NC in of_ratio.values()),
    )
