"""PURE: what is said of answers: accuracy, recall over classes, calibration, and how many answers changed."""

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from isthmus.proto.messages import FloatArray

Integers = npt.NDArray[np.int64]

_BINS: Final = 10


@dataclass(frozen=True)
class Scores:
    """``accuracy``: share of answers that are right. ``recall``: unweighted average recall over the classes that occur.

    ``calibration``: expected calibration error, over ten bins of equal width. ``changed``: share of answers that differ
    from the base student's. All are 0 to 1.
    """

    accuracy: float
    recall: float
    calibration: float
    changed: float


def scores(answers_NC: FloatArray, base_NC: FloatArray, labels_N: Integers) -> Scores:
    """Return the scores of probabilities (N, C) for clips with these labels. Raises ValueError for no clip."""
    if not len(labels_N):
        raise ValueError("no clips to score")
    told_N = answers_NC.argmax(axis=1)
    right_N = told_N == labels_N
    return Scores(
        float(right_N.mean()),
        float(np.mean([right_N[labels_N == label].mean() for label in np.unique(labels_N)])),
        calibration_error(answers_NC, labels_N),
        float((told_N != base_NC.argmax(axis=1)).mean()),
    )


def calibration_error(answers_NC: FloatArray, labels_N: Integers) -> float:
    """Return the expected calibration error (Naeini et al., AAAI 2015): the mean over clips of |confidence - accuracy|
    of the clip's bin of confidence.
    """
    confidence_N = answers_NC.max(axis=1)
    right_N = answers_NC.argmax(axis=1) == labels_N
    bin_N = np.minimum((confidence_N * _BINS).astype(int), _BINS - 1)
    gaps = [
        (bin_N == each).mean() * abs(confidence_N[bin_N == each].mean() - right_N[bin_N == each].mean())
        for each in np.unique(bin_N)
    ]
    return float(np.sum(gaps))


def agreement(sound_NC: FloatArray, picture_NC: FloatArray) -> float:
    """Return the mean over clips of sum_c p_sound p_picture: the probability that two draws agree."""
    return float((sound_NC * picture_NC).sum(axis=1).mean())
