"""PURE: whether a new student is good enough, judged without labels on the device's own clips before it is used.

Axes: N selection clips, C classes. Each estimate of a student's accuracy is the mean of a score over the clips. Both
students see the same clips, so what is equal in both cancels out of the difference:

    confidence   max_c p_local[c]                   (Hendrycks and Gimpel, ICLR 2017, as an average)
    atc          1[max_c p_local[c] >= t]           average thresholded confidence (Garg et al., ICLR 2022); the cloud
                                                    measured t for that student on public clips
    agreement    1[argmax p_local = argmax p_teacher]   (after Jiang et al., ICLR 2022: two heads on the same features)
    teacher      p_teacher[argmax p_local]          expected accuracy if the teacher's head is calibrated
    joint        (p_teacher + p_teacher') / 2 [argmax p_local]
    cross        p_teacher'[argmax p_local]
    present      p_present[argmax p_local]

p_teacher is the teacher's head on this student's features, p_teacher' on the other student's, and p_present is the
local head of the student in use. The last three are ours. A student whose features have collapsed is confident, and so
is the teacher's head on its features; ``joint`` therefore scores both students by one judge, and ``cross`` scores none
by itself. ``present`` trusts the student in use: it never rates a new student better, only closer or farther. It needs
a tolerance, and a student that is confident and wrong could never be replaced under it. It is the default because it
was the only one that detected harmful updates reliably over many updates (docs/results/personalisation).

If the person has said what at least four of the clips are, these labels decide in place of any estimate.
"""

from dataclasses import dataclass, replace
from enum import Enum
from typing import Final

import numpy as np
import numpy.typing as npt

from isthmus.proto.messages import FloatArray


class Estimator(Enum):
    CONFIDENCE = "confidence"
    ATC = "atc"
    AGREEMENT = "agreement"
    TEACHER = "teacher"
    JOINT = "joint"
    CROSS = "cross"
    PRESENT = "present"


DEFAULT_ESTIMATOR: Final = Estimator.PRESENT
"""The estimator of a device by default."""

DEFAULT_MARGIN: Final = -0.02
"""The accepted change of estimated accuracy (share of clips); it belongs to the default estimator."""


FEWEST_CORRECTIONS: Final = 4
"""So many corrected clips decide in place of an estimate."""

CORRECTIONS: Final = "corrections"

Reals = npt.NDArray[np.floating]


@dataclass(frozen=True)
class Outputs:
    """One student's outputs on the selection clips: its local head and the teacher's head. Rows sum to 1.

    ``atc_threshold`` is from the student's manifest; None if the cloud measured none.
    """

    local_NC: FloatArray
    teacher_NC: FloatArray
    atc_threshold: float | None = None


@dataclass(frozen=True)
class Rule:
    """Accept the new student if its estimate is at least that of the old one plus ``margin`` (share of clips)."""

    estimator: Estimator = DEFAULT_ESTIMATOR
    margin: float = DEFAULT_MARGIN


@dataclass(frozen=True)
class Verdict:
    """The guard's decision. ``old`` and ``new``: all estimates by name; ``atc`` is missing without a threshold.

    ``changed`` of the ``clips`` clips get another answer from the new student.
    """

    accept: bool
    reason: str
    old: dict[str, float]
    new: dict[str, float]
    rule: Rule
    clips: int
    changed: int
    decided_by: str = ""
    """The estimator's name, or "corrections"."""


def estimates(student: Outputs, other: Outputs, present: Outputs) -> dict[Estimator, float]:
    """Return the estimates of the student's accuracy, 0 to 1, by the formulas above; ``present`` is the one in use.

    ATC is missing without a threshold. Raises ValueError for no clips, different shapes, NaN or infinity.
    """
    _check(student, other)
    confidence_N = student.local_NC.max(axis=1)
    answer_N = student.local_NC.argmax(axis=1)
    row_N = np.arange(len(answer_N))
    own_N, others_N = student.teacher_NC[row_N, answer_N], other.teacher_NC[row_N, answer_N]
    scores: dict[Estimator, npt.NDArray[np.generic]] = {
        Estimator.CONFIDENCE: confidence_N,
        Estimator.AGREEMENT: answer_N == student.teacher_NC.argmax(axis=1),
        Estimator.TEACHER: own_N,
        Estimator.JOINT: (own_N + others_N) / 2,
        Estimator.CROSS: others_N,
        Estimator.PRESENT: present.local_NC[row_N, answer_N],
    }
    if student.atc_threshold is not None:
        scores[Estimator.ATC] = confidence_N >= student.atc_threshold
    return {estimator: float(score_N.mean(dtype=np.float64)) for estimator, score_N in scores.items()}


def judge(old: Outputs, new: Outputs, rule: Rule = Rule()) -> Verdict:
    """Decide whether the new student replaces the old one. With margin 0 it does if both estimates are equal.

    Raises ValueError as ``estimates`` does, and if the rule's estimate cannot be made for one of the two.
    """
    of_old, of_new = estimates(old, new, old), estimates(new, old, old)
    if rule.estimator not in of_old or rule.estimator not in of_new:
        raise ValueError(f"no estimate '{rule.estimator.value}': the cloud measured no threshold for a student")
    before, after = of_old[rule.estimator], of_new[rule.estimator]
    accept = after >= before + rule.margin
    clips = len(old.local_NC)
    changed = int((old.local_NC.argmax(axis=1) != new.local_NC.argmax(axis=1)).sum())
    asked = f", a gain of {100 * rule.margin:.1f} points is required" if rule.margin > 0 else ""
    if rule.margin < 0:
        asked = f", a loss of {-100 * rule.margin:.1f} points is accepted"
    reason = (
        f"estimated accuracy {100 * before:.1f} % before and {100 * after:.1f} % after "
        f"('{rule.estimator.value}', {clips} clips, {changed} answered differently{asked})"
    )
    return Verdict(
        accept,
        reason if accept else f"the new student is not good enough: {reason}",
        {estimator.value: value for estimator, value in of_old.items()},
        {estimator.value: value for estimator, value in of_new.items()},
        rule,
        clips,
        changed,
        rule.estimator.value,
    )


def by_corrections(verdict: Verdict, old_NC: FloatArray, new_NC: FloatArray, said_NC: Reals) -> Verdict:
    """Return the verdict by what the person said of clips; unchanged if they spoke of fewer than four.

    ``old_NC`` and ``new_NC`` are both students' answers as the user sees them, but without what was learned from the
    corrections. ``said_NC`` has the share of each class in what was said of a clip, zeros if nothing was. The new
    student is accepted if it finds what was said as likely as the old one does, on average.
    """
    told_N = said_NC.sum(axis=1) > 0
    count = int(told_N.sum())
    if count < FEWEST_CORRECTIONS:
        return verdict
    before, after = (float((each_NC[told_N] * said_NC[told_N]).sum(axis=1).mean()) for each_NC in (old_NC, new_NC))
    right = [
        int((each_NC[told_N].argmax(axis=1) == said_NC[told_N].argmax(axis=1)).sum()) for each_NC in (old_NC, new_NC)
    ]
    accept = after >= before
    reason = f"right on {right[0]} of {count} clips that you corrected before, and on {right[1]} after"
    return replace(
        verdict,
        accept=accept,
        reason=reason if accept else f"the new student is not good enough: {reason}",
        old={**verdict.old, CORRECTIONS: before},
        new={**verdict.new, CORRECTIONS: after},
        decided_by=CORRECTIONS,
    )


def _check(student: Outputs, other: Outputs) -> None:
    shape = student.local_NC.shape
    arrays = (student.local_NC, student.teacher_NC, other.local_NC, other.teacher_NC)
    if len(shape) != 2 or 0 in shape:
        raise ValueError("no clip to compare the students on")
    if any(array.shape != shape for array in arrays):
        raise ValueError("the students were not seen on the same clips and classes")
    if not all(np.isfinite(array).all() for array in arrays):
        raise ValueError("a student's probabilities are not finite")
