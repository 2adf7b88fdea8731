"""PURE: how often this device's user is in each state, estimated from the student's answers to unlabelled clips.

A student's heads assume that states are as frequent as in the clips they were trained on. One user is mostly calm,
another never disgusted; an answer that uses this is correct more often. The estimate is made on the device and stays
there. It changes only how answers are read, also those of the cloud: no student, upload or cloud contains it.

Axes: N selection clips, C classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from isthmus.data.label_shift import LEAST_SHARE, adapted, class_prior
from isthmus.proto.messages import Features, FloatArray

AT_EVEN_ODDS: Final = 10.0
"""Pseudo-clips per seen clip for a student whose answers have even odds."""
LEAST: Final = 0.1
"""The smallest number of pseudo-clips per seen clip, so that no class is ruled out."""


@dataclass(frozen=True)
class Habits:
    """``shares``: how often each class occurs for this user, from ``clips`` clips. ``trained``: how often it occurred
    in the training of student ``student_id``'s heads. Both sum to 1."""

    student_id: str
    clips: int
    shares: tuple[float, ...]
    trained: tuple[float, ...]

    def answer(self, probabilities_C: FloatArray) -> FloatArray:
        """Return the student's answer (C,), from its heads here or in the cloud, adapted to this user."""
        answer_C: FloatArray = self.answers(probabilities_C[np.newaxis])[0]
        return answer_C

    def local(self, probabilities_C: FloatArray, features: Features) -> FloatArray:
        """Return the answer as ``Reading`` asks for it: habits need no features."""
        return self.answer(probabilities_C)

    def cloud(self, probabilities_C: FloatArray, features: Features) -> FloatArray:
        return self.answer(probabilities_C)

    def answers(self, probabilities_NC: FloatArray) -> FloatArray:
        """Adapt many answers, (N, C)."""
        return adapted(probabilities_NC, np.array(self.shares), np.array(self.trained))


def pseudo_clips(local_NC: FloatArray) -> float:
    """Return the pseudo-clips per seen clip that hold the estimate back: max(0.1, 10 ((1 - p) / p)^2).

    p is the mean of the largest probabilities. A student that is wrong about a person is wrong in the same way every
    time, and EM mistakes that for a habit; a student that is weak on its user is less confident. At p = 0.76 its
    estimate counts one half, at 0.55 one eighth, at 0.9 nine tenths (docs/results/habits-held-back).
    """
    classes: int = local_NC.shape[1]
    sure = max(float(local_NC.astype(np.float64).max(axis=1).mean()), 1 / classes)
    odds_of_error = (1 - sure) / sure
    return max(AT_EVEN_ODDS * odds_of_error * odds_of_error, LEAST)


def learn(student_id: str, local_NC: FloatArray, trained: Sequence[float], *, held_back: float | None = None) -> Habits:
    """Estimate the habits from the local head's answers to the selection clips.

    EM finds the prior that makes the answers likeliest, with ``held_back`` pseudo-clips per clip (None: from
    ``pseudo_clips``) distributed like ``trained``. The teacher's head on the student's features works worse here: it
    is more confident and less accurate. Raises ValueError for no answers, NaN or infinity.
    """
    clips = len(local_NC)
    if not clips or not np.isfinite(local_NC).all():
        raise ValueError("no clips to learn habits from, or answers that are not finite")
    own_C = np.asarray(trained, np.float64)
    pseudo = clips * (pseudo_clips(local_NC) if held_back is None else held_back)
    shares_C = class_prior(local_NC, np.ones(clips), np.maximum(own_C, LEAST_SHARE), pseudo_clips=pseudo)
    return Habits(student_id, clips, tuple(shares_C.tolist()), tuple(own_C.tolist()))
