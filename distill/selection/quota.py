"""Class quotas by prior matching, and within each class the public samples nearest to the client's prototypes."""

import numpy as np

from isthmus.distill.selection.interface import (
    Float64s,
    Indices,
    Public,
    Selection,
    Wanted,
    check,
    wanted_count,
)
from isthmus.distill.selection.prior import client_prior
from isthmus.distill.selection.space import by_feature, by_probability
from isthmus.distill.selection.turns import take_in_turn


def quota(wanted: Wanted, public: Public, samples_per_row: int, rng: np.random.Generator) -> Selection:
    """Give each class its share of min(K n, N) by the client's prior, and take the nearest samples of that label.

    The prior is estimated by EM from the prototypes (``prior``), the quotas by largest remainder. A class with fewer
    public samples than its quota gives all it has; the rest goes to the other classes by prior, and the notes say so.
    Within a class the prototypes share the quota by the number of its clips that are likely behind each (size times
    posterior). They take the nearest samples of that label in turn: by features if the device sent them, else by
    probabilities. Samples without a label are never taken. Ties go to the lower index; the order of the rows matters
    only if two want the same sample. ``rng`` is not used.

    Raises ValueError as ``cosine``, for labels beyond the label set, for a public set without labels, and for features
    that the public set cannot match.
    """
    check(wanted, public, samples_per_row)
    classes = wanted.prototypes_KC.shape[1]
    prior_C, own_C = client_prior(wanted, public)
    members = members_by_class(public, classes)
    capacity_C = np.array([len(members_M) for members_M in members])
    total = min(wanted_count(wanted, public, samples_per_row), int(capacity_C.sum()))
    asked_C = largest_remainder(prior_C, total)
    counts_C = quotas(prior_C, capacity_C, total)
    space = by_probability(wanted, public) if wanted.features_KE is None else by_feature(wanted, public)
    behind_KC = wanted.sizes_K[:, np.newaxis] * _posterior(wanted, prior_C / own_C)
    picked: list[Indices] = []
    for members_M, count, behind_K in zip(members, counts_C, behind_KC.T, strict=True):
        if count:
            shares_K = behind_K if behind_K.sum() > 0 else wanted.shares_K
            within = space.within(members_M)
            counts_K = largest_remainder(shares_K, int(count))
            picked.append(members_M[take_in_turn(within.queries_KV, counts_K, within.pool())])
    short = np.flatnonzero(capacity_C < asked_C)
    notes = tuple(
        f"class {c}: {asked_C[c]} samples were wanted, the public set has {capacity_C[c]}; others take their place"
        for c in short
    )
    return Selection.of(np.concatenate(picked), notes)


def quotas(prior_C: Float64s, capacity_C: Indices, total: int) -> Indices:
    """Distribute ``total`` samples (at most all there are) over the classes by prior, none over its capacity.

    What a full class cannot take goes to the others by prior, or by free capacity if the prior gives them nothing.
    """
    given_C = np.zeros(len(prior_C), np.int64)
    while (left := total - int(given_C.sum())) > 0:
        room_C = capacity_C - given_C
        weights_C = np.where(room_C > 0, prior_C, 0.0)
        if weights_C.sum() <= 0:
            weights_C = room_C.astype(np.float64)
        given_C += np.minimum(largest_remainder(weights_C, left), room_C)
    return given_C


def largest_remainder(weights_R: Float64s, total: int) -> Indices:
    """Divide ``total`` into whole numbers in proportion to the weights (Hamilton), ties to the lower position."""
    exact_R = weights_R * (total / weights_R.sum())
    counts_R: Indices = np.floor(exact_R).astype(np.int64)
    order_R = np.argsort(counts_R - exact_R, kind="stable")
    counts_R[order_R[: total - int(counts_R.sum())]] += 1
    return counts_R


def members_by_class(public: Public, classes: int) -> list[Indices]:
    """Return the indices of each class's samples, ascending. Raises ValueError for labels out of range, or if there are
    none.
    """
    labels_N = np.asarray(public.labels_N)
    if labels_N.max() >= classes or labels_N.min() < -1:
        raise ValueError(f"public labels run from {labels_N.min()} to {labels_N.max()}; there are {classes} classes")
    by_class_N = np.argsort(labels_N, kind="stable")
    bounds = np.searchsorted(labels_N[by_class_N], np.arange(classes + 1))
    if bounds[0] == len(labels_N):
        raise ValueError("no public sample has a label: choose a strategy that needs none, such as cosine")
    return [by_class_N[bounds[c] : bounds[c + 1]] for c in range(classes)]


def _posterior(wanted: Wanted, ratio_C: Float64s) -> Float64s:
    """Return each row's class probabilities under the client's prior."""
    posterior_KC = np.maximum(wanted.prototypes_KC, 0.0) * ratio_C
    normalised_KC: Float64s = posterior_KC / np.maximum(posterior_KC.sum(axis=1, keepdims=True), 1e-300)
    return normalised_KC
