"""PURE: whether a new student pays, judged without a label on the device's own clips, before it is swapped in.

Axes: N selection clips, C classes. Each estimate of a student's accuracy is the mean over the clips of a score, all on
the same clips, so that what is alike in both students cancels out of their difference:

    confidence   max_c p_local[c]                   (Hendrycks and Gimpel, ICLR 2017, as an average)
    atc          1[max_c p_local[c] >= t]           average thresholded confidence (Garg et al., ICLR 2022), with t as
                                                    the cloud measured it for that student on public clips
    agreement    1[argmax p_local = argmax p_teacher]   (after Jiang et al., ICLR 2022: two heads on the same features)
    teacher      p_teacher[argmax p_local]          expected accuracy, were the teacher's head calibrated
    joint        (p_teacher + p_teacher') / 2 [argmax p_local]
    cross        p_teacher'[argmax p_local]
    present      p_present[argmax p_local]

where p_teacher is the teacher's head on this student's features, p_teacher' on the other's, and p_present the local
head of the student in use. The last three are ours: a student whose features have collapsed is sure of itself, and its
own teacher head with it; under ``joint`` both students are scored by one judge, under ``cross`` none by itself.
``present`` trusts what is in use: it never finds a new student better, only nearer or farther, so it wants a tolerance,
and a student that is sure and wrong could never be replaced under it. It is the default because, of these, it alone
told over many updates which ones hurt (docs/results/personalisation).
"""

from dataclasses import dataclass
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
"""By which a device judges unless told otherwise."""

DEFAULT_MARGIN: Final = -0.02
"""So much estimated accuracy may be lost; it belongs to the default estimate."""


@dataclass(frozen=True)
class Outputs:
    """One student on the selection clips: its local head, and the teacher's head on its features; rows sum to 1.

    ``atc_threshold``: from the student's manifest; None where the cloud measured none.
    """

    local_NC: FloatArray
    teacher_NC: FloatArray
    atc_threshold: float | None = None


@dataclass(frozen=True)
class Rule:
    """Accept where the estimate of the new student is at least that of the old one plus ``margin`` (share of clips)."""

    estimator: Estimator = DEFAULT_ESTIMATOR
    margin: float = DEFAULT_MARGIN


@dataclass(frozen=True)
class Verdict:
    """``old`` and ``new``: every estimate of accuracy by its name; ``atc`` is missing where there is no threshold.

    ``changed``: the clips, of ``clips``, that the new student answers otherwise than the old one.
    """

    accept: bool
    reason: str
    old: dict[str, float]
    new: dict[str, float]
    rule: Rule
    clips: int
    changed: int


def estimates(student: Outputs, other: Outputs, present: Outputs) -> dict[Estimator, float]:
    """Estimates of the student's accuracy on the clips, 0 to 1, by the formulas above; ``present`` is the one in use.

    Without a threshold there is no ATC. Raises ValueError for no clips, shapes that differ, or what is no number.
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
    """Whether the new student is to take the old one's place. Where the two come out equal, it is.

    Raises ValueError as ``estimates`` does, and where the rule's estimate cannot be made for one of the two.
    """
    of_old, of_new = estimates(old, new, old), estimates(new, old, old)
    if rule.estimator not in of_old or rule.estimator not in of_new:
        raise ValueError(f"no estimate '{rule.estimator.value}': the cloud measured no threshold for a student")
    before, after = of_old[rule.estimator], of_new[rule.estimator]
    accept = after >= before + rule.margin
    clips = len(old.local_NC)
    changed = int((old.local_NC.argmax(axis=1) != new.local_NC.argmax(axis=1)).sum())
    asked = f", a gain of {100 * rule.margin:.1f} points was asked for" if rule.margin > 0 else ""
    if rule.margin < 0:
        asked = f", a loss of {-100 * rule.margin:.1f} points is let pass"
    reason = (
        f"estimated accuracy {100 * before:.1f} % before and {100 * after:.1f} % after "
        f"('{rule.estimator.value}', {clips} clips, {changed} answered otherwise{asked})"
    )
    return Verdict(
        accept,
        reason if accept else f"the new student would not pay: {reason}",
        {estimator.value: value for estimator, value in of_old.items()},
        {estimator.value: value for estimator, value in of_new.items()},
        rule,
        clips,
        changed,
    )


def _check(student: Outputs, other: Outputs) -> None:
    shape = student.local_NC.shape
    arrays = (student.local_NC, student.teacher_NC, other.local_NC, other.teacher_NC)
    if len(shape) != 2 or 0 in shape:
        raise ValueError("no clip to judge the students by")
    if any(array.shape != shape for array in arrays):
        raise ValueError("the students were not seen on the same clips and classes")
    if not all(np.isfinite(array).all() for array in arrays):
        raise ValueError("a student's probabilities are not numbers")
