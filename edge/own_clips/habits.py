"""PURE: how often this device's user is in each state, read from the student's own answers to unlabelled clips.

A student's heads answer as if states came as often as in the clips they were trained on. One user is mostly calm,
another never disgusted; an answer that knows so is right more often. The estimate is made on the device, stays there,
and changes answers alone, those of the cloud as well: no student, no upload and no cloud knows of it.

Axes: N selection clips, C classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from isthmus.data.label_shift import LEAST_SHARE, adapted, class_prior
from isthmus.proto.messages import FloatArray

AT_EVEN_ODDS: Final = 10.0
"""Pseudo-clips for each clip seen of a student that gives its answers even odds."""
LEAST: Final = 0.1
"""Of pseudo-clips for each clip, however sure a student is: no class is ruled out."""


@dataclass(frozen=True)
class Habits:
    """``shares``: how often each class comes to this user, as ``clips`` clips tell; ``trained``: how often to the heads
    of student ``student_id`` when they were trained. Both sum to 1."""

    student_id: str
    clips: int
    shares: tuple[float, ...]
    trained: tuple[float, ...]

    def answer(self, probabilities_C: FloatArray) -> FloatArray:
        """The student's answer (C,), by its heads here or in the cloud, as it reads for this user."""
        answer_C: FloatArray = self.answers(probabilities_C[np.newaxis])[0]
        return answer_C

    def answers(self, probabilities_NC: FloatArray) -> FloatArray:
        """Many of them, (N, C)."""
        return adapted(probabilities_NC, np.array(self.shares), np.array(self.trained))


def pseudo_clips(local_NC: FloatArray) -> float:
    """For each clip seen, how many of those that hold the estimate back: 10 ((1 - p) / p)^2, not below 0.1, where p is
    the mean of the largest probabilities.

    A student that is wrong about a person is wrong in the same way every time, which EM takes for a habit; one that is
    weak on its user says so by being unsure. At p = 0.76 its word counts half, at 0.55 an eighth, at 0.9 nine tenths
    (docs/results/habits-held-back).
    """
    classes: int = local_NC.shape[1]
    sure = max(float(local_NC.astype(np.float64).max(axis=1).mean()), 1 / classes)
    odds_of_error = (1 - sure) / sure
    return max(AT_EVEN_ODDS * odds_of_error * odds_of_error, LEAST)


def learn(student_id: str, local_NC: FloatArray, trained: Sequence[float], *, held_back: float | None = None) -> Habits:
    """From the local head's answers to the selection clips. Raises ValueError where there is none, or no number.

    The prior that makes the answers likeliest, by EM, with ``held_back`` pseudo-clips for each clip (None: by
    ``pseudo_clips``) that follow ``trained``. The teacher's head on the student's features, which prototypes are made
    of, serves worse here: it is the surer and the less right of the two.
    """
    clips = len(local_NC)
    if not clips or not np.isfinite(local_NC).all():
        raise ValueError("no clips, or answers that are no numbers, to learn habits from")
    own_C = np.asarray(trained, np.float64)
    pseudo = clips * (pseudo_clips(local_NC) if held_back is None else held_back)
    shares_C = class_prior(local_NC, np.ones(clips), np.maximum(own_C, LEAST_SHARE), pseudo_clips=pseudo)
    return Habits(student_id, clips, tuple(shares_C.tolist()), tuple(own_C.tolist()))
