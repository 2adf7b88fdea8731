"""The client's class prior from the teacher's soft outputs, by expectation maximisation (Saerens et al. 2002).

Axes: K rows of class probabilities, N public samples, C classes.
"""

from typing import Final

import numpy as np
import numpy.typing as npt

from isthmus.distill.selection.interface import Floats, Public, Wanted, Wide

_BLOCK: Final = 1 << 16
_MOST_STEPS: Final = 10_000
_STILL: Final = 1e-10
_LEAST_PRIOR: Final = 1e-6
"""The classifier's own prior of a class that it never gives: a ratio to it must stay a number."""


def own_prior(probabilities_NC: Floats) -> Wide:
    """The classifier's own prior: the mean of its outputs on the public set, no class under 1e-6. (C,).

    Raises ValueError for values that are not numbers.
    """
    total_C = np.zeros(probabilities_NC.shape[1])
    for start in range(0, len(probabilities_NC), _BLOCK):
        total_C += probabilities_NC[start : start + _BLOCK].sum(axis=0, dtype=np.float64)
    if not np.isfinite(total_C).all():
        raise ValueError("the public set holds values that are not numbers")
    prior_C = np.maximum(total_C / max(total_C.sum(), 1e-300), _LEAST_PRIOR)
    normalised_C: Wide = prior_C / prior_C.sum()
    return normalised_C


def class_prior(
    probabilities_KC: Floats, sizes_K: npt.NDArray[np.int32], own_C: Wide, *, pseudo_clips: float = 0.0
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


def client_prior(wanted: Wanted, public: Public) -> tuple[Wide, Wide]:
    """(the client's class prior, the classifier's own), with one pseudo-clip a class."""
    own_C = own_prior(public.probabilities_NC)
    classes = len(own_C)
    return class_prior(wanted.prototypes_KC, wanted.sizes_K, own_C, pseudo_clips=float(classes)), own_C
