"""PURE: how often each class occurs to one user, read from a classifier's unlabelled answers, and answers that know it.

A classifier answers under the class frequencies that it was trained on. Where a user's differ (label shift), the same
evidence means something else: with prior pi in place of its own, p'(c) is proportional to p(c) pi_c / own_c.

Axes: K rows of class probabilities, N clips, C classes.
"""

from typing import Final

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Wide = npt.NDArray[np.float64]

_MOST_STEPS: Final = 10_000
_STILL: Final = 1e-10
LEAST_SHARE: Final = 1e-6
"""A class that a classifier never met: a ratio to its share must stay a number."""


def class_prior(
    probabilities_KC: Floats, sizes_K: npt.NDArray[np.generic], own_C: Wide, *, pseudo_clips: float = 0.0
) -> Wide:
    """The prior pi (C,) under which the rows are likeliest: it maximises, over distributions,

        sum_k size_k log sum_c p_k(c) pi_c / own_c  +  pseudo_clips sum_c own_c log pi_c

    by EM: each row's posterior under the present prior, then their mean (Saerens, Latinne and Decaestecker 2002,
    "Adjusting the outputs of a classifier to new a priori probabilities", Neural Computation 14, eq. 9). Where we
    differ: rows are centroids weighted by their sizes; and the second term, a Dirichlet prior around ``own_C`` worth
    ``pseudo_clips`` clips. Averaging outputs blurs them, so that the likeliest prior of a few centroids is often a
    single class; some pseudo-clips keep the others in play. The objective is concave, so where EM begins matters only
    among equally likely priors: it begins at ``own_C``, and a teacher that says the same of everything leaves it there.
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


def adapted(probabilities_NC: Floats, prior_C: Wide, own_C: Wide) -> Floats:
    """Each row's posterior (N, C) under ``prior_C`` in place of ``own_C``, with which the classifier was trained
    (Saerens et al. 2002, eq. 4). Shares of ``own_C`` below 1e-6 count as that. A row that the prior rules out
    altogether stays as it is."""
    own_C = np.maximum(own_C, LEAST_SHARE)
    weighted_NC = np.maximum(probabilities_NC.astype(np.float64), 0.0) * (prior_C / own_C)
    total_N1 = weighted_NC.sum(axis=1, keepdims=True)
    changed_NC = np.where(total_N1 > 0, weighted_NC / np.where(total_N1 > 0, total_N1, 1.0), probabilities_NC)
    answers_NC: Floats = changed_NC.astype(np.float32)
    return answers_NC
