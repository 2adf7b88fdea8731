"""PURE: estimate how often each class occurs to one user from a classifier's unlabelled answers, and correct the
answers.

A classifier's answers assume the class frequencies it was trained on. If a user's differ (label shift), the same
evidence means something else: with prior pi in place of its own, p'(c) is proportional to p(c) pi_c / own_c.

Axes: K rows of class probabilities, N clips, C classes.
"""

from typing import Final

import numpy as np
import numpy.typing as npt

Float32s = npt.NDArray[np.float32]
Float64s = npt.NDArray[np.float64]

_MOST_STEPS: Final = 10_000
_STILL: Final = 1e-10
LEAST_SHARE: Final = 1e-6
"""The least share of a class: the ratio to the share of a class that never occurred must stay finite."""


def class_prior(
    probabilities_KC: Float32s, sizes_K: npt.NDArray[np.generic], own_C: Float64s, *, pseudo_clips: float = 0.0
) -> Float64s:
    """Return the prior pi (C,) under which the rows are most likely. It maximises, over distributions,

        sum_k size_k log sum_c p_k(c) pi_c / own_c  +  pseudo_clips sum_c own_c log pi_c

    by EM: each row's posterior under the present prior, then their mean (Saerens, Latinne and Decaestecker 2002,
    "Adjusting the outputs of a classifier to new a priori probabilities", Neural Computation 14, eq. 9). Where we
    differ: rows are centroids weighted by their sizes, and the second term is a Dirichlet prior around ``own_C`` worth
    ``pseudo_clips`` clips. Averaging blurs outputs, so the most likely prior of a few centroids is often a single
    class; some pseudo-clips keep the others possible. The objective is concave, so the start matters only among equally
    likely priors. EM starts at ``own_C``, and a teacher whose output is always the same leaves it there.
    """
    rows_KC = np.maximum(probabilities_KC.astype(np.float64), 0.0)
    rows_KC /= np.maximum(rows_KC.sum(axis=1, keepdims=True), 1e-300)
    ratio_KC = rows_KC / own_C
    weights_K = np.asarray(sizes_K, np.float64)
    prior_C = own_C.copy()
    for _ in range(_MOST_STEPS):
        evidence_K = np.maximum(ratio_KC @ prior_C, 1e-300)
        counts_C = prior_C * ((weights_K / evidence_K) @ ratio_KC) + pseudo_clips * own_C
        moved_C = counts_C / counts_C.sum()
        step = float(np.abs(moved_C - prior_C).max())
        prior_C = moved_C
        if step < _STILL:
            break
    return prior_C


def adapted(probabilities_NC: Float32s, prior_C: Float64s, own_C: Float64s) -> Float32s:
    """Return each row's posterior (N, C) under ``prior_C`` in place of ``own_C``, the prior that the classifier was
    trained with (Saerens et al. 2002, eq. 4). Shares of ``own_C`` below 1e-6 count as 1e-6. A row that the prior rules
    out altogether stays as it is.
    """
    own_C = np.maximum(own_C, LEAST_SHARE)
    weighted_NC = np.maximum(probabilities_NC.astype(np.float64), 0.0) * (prior_C / own_C)
    total_N1 = weighted_NC.sum(axis=1, keepdims=True)
    changed_NC = np.where(total_N1 > 0, weighted_NC / np.where(total_N1 > 0, total_N1, 1.0), probabilities_NC)
    answers_NC: Float32s = changed_NC.astype(np.float32)
    return answers_NC
