"""PURE: what a person said of some clips, learned as a small change of the heads, and which clip to ask about next.

A correction is evidence, not an order: the change that explains all corrections best, and is small, is learned. For the
scores s_k and features x_k of corrected clip k, and the share t_k of each class in what was said of it, it minimises

    sum_k CE(t_k, softmax(s_k + dW x_k)) + lambda / 2 |dW|^2

which is multinomial logistic regression with a Gaussian prior around the heads in use. The minimum is dW = A^T X with
lambda A = T - P, so that only a matrix of clips x classes is sought. It is found by steps of

    A <- A + (G / 2 + lambda I)^-1 (T - P - lambda A),   G = X X^T

each of which lowers the sum, because the Hessian of the cross-entropy is at most a half (Böhning and Lindsay 1988,
"Monotonicity of quadratic-approximation algorithms", Annals of the Institute of Statistical Mathematics 40).

Axes: K corrected clips, N clips, C classes, E features of both modalities.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

Reals = npt.NDArray[np.floating]
Float64s = npt.NDArray[np.float64]

PENALTY: Final = 10.0
"""lambda, for features of unit variance within people."""

MOST_KEPT: Final = 2_000
"""The oldest corrections beyond this are forgotten."""

MOST_USED: Final = 200
"""The newest corrections that are learned from. More would hardly change the heads, and every estimate would wait."""

_MOST_STEPS: Final = 500
_STILL: Final = 1e-7


@dataclass(frozen=True)
class Correction:
    """What a person said: clip ``clip`` was ``label``. ``said_s`` is Unix time, ``student_id`` the student in use."""

    clip: str
    label: str
    said_s: float
    student_id: str


def said(corrections: Iterable[Correction], clips: Iterable[str], classes: tuple[str, ...]) -> Float64s:
    """Return the share of each class (N, C) in what was said of each clip; zeros for a clip of which nothing was said.

    If a clip was corrected more than once, every correction counts alike. Labels that are no class are left out.
    """
    row = {clip: number for number, clip in enumerate(clips)}
    counts_NC = np.zeros((len(row), len(classes)))
    for one in corrections:
        if one.clip in row and one.label in classes:
            counts_NC[row[one.clip], classes.index(one.label)] += 1
    shares_NC: Float64s = counts_NC / np.maximum(counts_NC.sum(axis=1, keepdims=True), 1)
    return shares_NC


def learned(scores_KC: Reals, features_KE: Reals, said_KC: Reals, *, penalty: float = PENALTY) -> Float64s:
    """Return the change dW (C, E) of the heads by the formulas above; zeros without corrections.

    Raises ValueError for shapes that do not fit, NaN or infinity, or rows of ``said_KC`` that are no distribution.
    """
    scores_KC, features_KE, said_KC = (np.asarray(each, np.float64) for each in (scores_KC, features_KE, said_KC))
    if scores_KC.shape != said_KC.shape or len(features_KE) != len(scores_KC) or penalty <= 0:
        raise ValueError(f"{scores_KC.shape} scores, {said_KC.shape} corrections and {features_KE.shape} features")
    if not all(np.isfinite(each).all() for each in (scores_KC, features_KE, said_KC)):
        raise ValueError("the corrected clips contain values that are not finite")
    if (said_KC < 0).any() or (np.abs(said_KC.sum(axis=1) - 1) > 1e-6).any():
        raise ValueError("what was said of a clip does not sum to 1")
    clips = len(scores_KC)
    gram_KK = features_KE @ features_KE.T
    step_KK = np.linalg.inv(gram_KK / 2 + penalty * np.eye(clips))
    change_KC = np.zeros_like(scores_KC)
    for _ in range(_MOST_STEPS):
        wanted_KC = said_KC - _softmax(scores_KC + gram_KK @ change_KC) - penalty * change_KC
        step_KC = step_KK @ wanted_KC
        change_KC += step_KC
        if not clips or np.abs(gram_KK @ step_KC).max() < _STILL:
            break
    return change_KC.T @ features_KE


def least_certain(answers_NC: Reals, allowed_N: npt.NDArray[np.bool_]) -> int | None:
    """Return the row whose two likeliest classes are closest, among the allowed ones; None if none is allowed.

    Asking about it teaches most for one answer (margin sampling: Scheffer, Decomain and Wrobel, IDA 2001).
    """
    rows = np.flatnonzero(allowed_N)
    if not len(rows):
        return None
    ordered_RC = np.sort(answers_NC[rows], axis=1)
    return int(rows[np.argmin(ordered_RC[:, -1] - ordered_RC[:, -2])])


def _softmax(scores_KC: Float64s) -> Float64s:
    if not len(scores_KC):
        return scores_KC
    powers_KC = np.exp(scores_KC - scores_KC.max(axis=1, keepdims=True))
    shares_KC: Float64s = powers_KC / powers_KC.sum(axis=1, keepdims=True)
    return shares_KC
