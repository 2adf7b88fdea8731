"""The client's class prior from the teacher's soft outputs, by expectation maximisation (Saerens et al. 2002).

Axes: K rows of class probabilities, N public samples, C classes.
"""

from typing import Final

import numpy as np

from isthmus.data.label_shift import LEAST_SHARE, class_prior
from isthmus.distill.selection.interface import Float32s, Float64s, Public, Wanted

_BLOCK: Final = 1 << 16


def own_prior(probabilities_NC: Float32s) -> Float64s:
    """Return the classifier's own prior (C,): the mean of its outputs on the public set, no class under 1e-6.

    Raises ValueError for values that are not finite.
    """
    total_C = np.zeros(probabilities_NC.shape[1])
    for start in range(0, len(probabilities_NC), _BLOCK):
        total_C += probabilities_NC[start : start + _BLOCK].sum(axis=0, dtype=np.float64)
    if not np.isfinite(total_C).all():
        raise ValueError("the public set holds values that are not numbers")
    prior_C = np.maximum(total_C / max(total_C.sum(), 1e-300), LEAST_SHARE)
    normalised_C: Float64s = prior_C / prior_C.sum()
    return normalised_C


def client_prior(wanted: Wanted, public: Public) -> tuple[Float64s, Float64s]:
    """Return (the client's class prior, the classifier's own), with one pseudo-clip per class."""
    own_C = own_prior(public.probabilities_NC)
    classes = len(own_C)
    return class_prior(wanted.prototypes_KC, wanted.sizes_K, own_C, pseudo_clips=float(classes)), own_C
