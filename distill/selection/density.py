"""Soft weights: how much more likely a public sample is under the client's distribution than under the public one.

Axes: K rows, N public samples, C classes, R kernel centres, P plausible samples, B a block, V width compared.
"""

from typing import Final

import numpy as np

from isthmus.distill.selection.interface import Float32s, Float64s, Public, Selection, Wanted, check
from isthmus.distill.selection.prior import client_prior
from isthmus.distill.selection.space import Space, by_both, by_probability

MOST: Final = 20.0
"""The largest weight, as a multiple of the mean."""

NEGLIGIBLE: Final = 0.05
"""Samples that count less than this share of the mean are left out."""

_IMPLAUSIBLE: Final = 0.01
"""Samples whose class factor alone is below this share of the mean get no kernel factor."""

_SHARE: Final = 0.1
"""Share of the client in the mixture that the ratio is taken to; it bounds the ratio by 10."""

_RIDGE: Final = 0.1
_CENTRES: Final = 512
_REFERENCE: Final = 4_096
_NARROWEST: Final = 0.05
_BLOCK: Final = 1 << 12
_ROWS: Final = 1 << 16


def density_ratio(wanted: Wanted, public: Public, samples_per_row: int, rng: np.random.Generator) -> Selection:
    """Return weights w(x) = p_client(x) / p_public(x) for every public sample that matters, in order of index.

    The weight has two factors. The first is the classes: if only the class prior differs between client and public, the
    ratio is exactly sum_c pi_c / own_c beta_p(c | x) (Saerens et al. 2002), with pi by EM from the prototypes
    (``prior``). The second is what remains: the ratio of the prototypes' density to that of the public set with those
    weights, by relative least-squares importance fitting (Yamada et al., "Relative density-ratio estimation for robust
    distribution comparison", Neural Computation 25, 2013). Its Gaussian kernels of cosine distance are centred on the
    prototypes, in probabilities, and in features too if the device sent them. If the teacher gives the same output for
    everything, every sample has weight 1.

    Samples under ``NEGLIGIBLE`` times the mean are dropped; the others are clipped at ``MOST`` times their mean and
    scaled to mean 1. ``Selection.effective_size`` is the number of equally weighted samples that this is worth. How
    many samples stay depends on the client, not on ``samples_per_row``: for a client of 3 classes in 28 about a tenth
    of the public set, and an epoch takes longer than one of a hard pick in the same proportion. Up to 512 rows, their
    order changes only rounding; beyond that, an evenly spaced part of the rows become kernel centres. ``rng`` is not
    used.

    Raises ValueError as ``cosine``, and for features that the public set cannot match.
    """
    check(wanted, public, samples_per_row)
    prior_C, own_C = client_prior(wanted, public)
    by_class_N = _class_ratio(public.probabilities_NC, prior_C / own_C)
    plausible_P = np.flatnonzero(by_class_N > _IMPLAUSIBLE * by_class_N.mean())
    space = by_probability(wanted, public) if wanted.features_KE is None else by_both(wanted, public)
    weights_P = by_class_N[plausible_P] * _kernel_ratio(
        space.within(plausible_P), wanted.shares_K, by_class_N[plausible_P]
    )
    stays_P = weights_P >= NEGLIGIBLE * weights_P.mean()
    return Selection(plausible_P[stays_P], _clipped(weights_P[stays_P]).astype(np.float32))


def _clipped(weights_P: Float64s) -> Float64s:
    """Return the weights with mean 1 and none over ``MOST``.

    Clipping lowers the mean, so the bound is found for each number of clipped samples: with k of them it is MOST times
    the sum of the others over P - MOST k.
    """
    falling_P = np.sort(weights_P)[::-1]
    samples = len(falling_P)
    clipped = np.arange(-(-samples // MOST))  # Fewer than P / MOST can be over MOST times the mean.
    rest = falling_P.sum() - np.concatenate([[0.0], np.cumsum(falling_P)])[clipped.astype(np.int64)]
    bounds = MOST * rest / (samples - MOST * clipped)
    fits = falling_P[clipped.astype(np.int64)] <= bounds
    weights_P = np.minimum(weights_P, bounds[int(fits.argmax()) if fits.any() else -1])
    normalised_P: Float64s = weights_P / weights_P.mean()
    return normalised_P


def _class_ratio(probabilities_NC: Float32s, ratio_C: Float64s) -> Float64s:
    """Return the likelihood ratio of a shift in class priors for every sample, (N,)."""
    return np.concatenate(
        [
            probabilities_NC[start : start + _ROWS].astype(np.float64) @ ratio_C
            for start in range(0, len(probabilities_NC), _ROWS)
        ]
    )


def _kernel_ratio(space: Space, shares_K: Float64s, reference_P: Float64s) -> Float64s:
    """Return the relative density ratio of the rows to the samples weighted by ``reference_P``, with mean 1 under the
    latter.

    Least squares: (a H_client + (1 - a) H_reference + ridge) theta = h_client, theta cut at 0 (Yamada et al., eq. 9).
    The bandwidth is the mean distance of the reference from its nearest centre.
    """
    rows = len(space.queries_KV)
    centres = np.arange(0, rows, -(-rows // _CENTRES))
    centres_RV = space.queries_KV[centres]
    sample_M = np.arange(0, space.samples, max(1, space.samples // _REFERENCE))
    shares_M = reference_P[sample_M] / reference_P[sample_M].sum()
    distance_MR = space.parts - space.vectors(sample_M) @ centres_RV.T / space.unit
    bandwidth = max(float(shares_M @ distance_MR.min(axis=1)), _NARROWEST)
    reference_MR = np.exp(-distance_MR / bandwidth)
    client_h_R = np.zeros(len(centres))
    client_H_RR = np.zeros((len(centres), len(centres)))
    for start in range(0, rows, _BLOCK):
        part = slice(start, start + _BLOCK)
        kernel_BR = np.exp((space.queries_KV[part] @ centres_RV.T / space.unit - space.parts) / bandwidth)
        client_h_R += shares_K[part] @ kernel_BR
        client_H_RR += kernel_BR.T @ (shares_K[part, np.newaxis] * kernel_BR)
    mixed_RR = _SHARE * client_H_RR + (1 - _SHARE) * (reference_MR.T @ (shares_M[:, np.newaxis] * reference_MR))
    theta_R = np.maximum(np.linalg.solve(mixed_RR + _RIDGE * np.eye(len(centres)), client_h_R), 0.0)
    if not theta_R.any():
        return np.ones(space.samples)
    ratio_P = _kernel_sums(space, centres_RV, theta_R, bandwidth)
    mean = float(reference_P @ ratio_P / reference_P.sum())
    return ratio_P / mean if mean > 0 else np.ones(space.samples)


def _kernel_sums(space: Space, centres_RV: Float64s, theta_R: Float64s, bandwidth: float) -> Float64s:
    """Return sum_r theta_r k(x, centre_r) for every sample (P,), in float32: its rounding does not matter to the
    weights.
    """
    left_VR = (centres_RV / (np.sqrt(space.unit) * bandwidth)).T.astype(np.float32)
    # exp(-1/h) of each part is multiplied into theta: one pass less over the large array.
    theta_R = (theta_R * np.exp(-space.parts / bandwidth)).astype(np.float32)
    sums: list[Float64s] = []
    for start in range(0, space.samples, _BLOCK):
        block_BV = space.vectors(slice(start, start + _BLOCK)) / np.sqrt(space.unit)
        kernel_BR = block_BV.astype(np.float32) @ left_VR
        np.exp(kernel_BR, out=kernel_BR)
        sums.append((kernel_BR @ theta_R).astype(np.float64))
    return np.concatenate(sums)
