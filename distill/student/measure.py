"""How good a student alone is on public clips, and from which confidence on: what a device's guard goes by."""

import numpy as np
import numpy.typing as npt
import torch

from isthmus.distill.models.heads import HeadBank
from isthmus.distill.models.trunk import EncoderPair
from isthmus.distill.release import Release
from isthmus.distill.selection import Selection
from isthmus.distill.student.evaluate import bank_probabilities, student_outputs
from isthmus.distill.student.personalise import clips_of_heads
from isthmus.proto.messages import PublicMeasure

FEWEST_CLIPS = 50
"""Fewer clips that the student did not learn from say less than all of them, those included."""
MOST_CLIPS = 512
"""More would say little more, and every personalisation waits for it."""


def atc_threshold(confidence_N: npt.NDArray[np.floating], right_N: npt.NDArray[np.bool_]) -> float:
    """The confidence t with share(confidence >= t) = share(right): Garg et al. (ICLR 2022), eq. 1, with the largest
    probability as the score. Confidences that are equal to t all count as above it. Raises ValueError for no clips.
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
    """Which public clips to measure on, rising: labelled ones outside the selection, evenly spaced where there are more
    than ``at_most``; all labelled ones where fewer than ``FEWEST_CLIPS`` are outside."""
    labelled = np.flatnonzero(labels_N >= 0)
    outside = np.setdiff1d(labelled, selected_S)
    rows = outside if len(outside) >= FEWEST_CLIPS else labelled
    return rows if len(rows) <= at_most else rows[np.linspace(0, len(rows) - 1, at_most).astype(np.int64)]


def head_shares(release: Release, selection: Selection) -> tuple[float, ...]:
    """Share of each class among the clips that heads were trained on, where those are all public clips, each counting
    alike; else empty: a few epochs on a selection do not teach a head how rare it made a class, so that who corrects
    for it spoils the answers (docs/log.md)."""
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
) -> PublicMeasure:
    """Accuracy and ATC threshold of the student's local head (the least compressed of ``heads``) on public clips, and
    its ``head_shares``, given what the student was distilled on.

    Raises ValueError where no public clip has a label.
    """
    labels_N = release.labels()
    rows = measured_rows(labels_N, selection.indices_S)
    outputs = student_outputs(student, release.teacher_head.to(device), release.public.subset(rows), device)
    probabilities_NC = bank_probabilities(heads, outputs, heads.local_ratio)
    right_N = probabilities_NC.argmax(axis=1) == labels_N[rows]
    threshold = atc_threshold(probabilities_NC.max(axis=1), right_N)
    return PublicMeasure(
        clips=len(rows),
        accuracy=float(right_N.mean()),
        atc_threshold=threshold,
        class_shares=head_shares(release, selection),
    )
