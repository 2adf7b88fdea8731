"""PURE: k-means of a few hundred clips, with numpy alone.

scikit-learn's does the same. With scipy it would be 194 MB on a device's disk and 75 MB in its memory.

Axes: N points, K clusters, C coordinates, T candidates for a centre.
"""

import math
from typing import Final

import numpy as np
import numpy.typing as npt

MOST_TURNS: Final = 300
"""Lloyd's turns end when no point changes its cluster, nearly always sooner."""

Float64s = npt.NDArray[np.float64]
Int64s = npt.NDArray[np.int64]


def k_means(points_NC: Float64s, clusters: int, *, restarts: int, seed: int) -> Int64s:
    """Return the cluster of each point (N,), of the best of ``restarts`` runs: that with the smallest squared error.

    Each run draws its centres by greedy k-means++ (Arthur and Vassilvitskii, SODA 2007) and moves them by Lloyd's
    turns. A cluster that loses its last point gets the one that is farthest from its centre. The result is
    deterministic for the seed. Raises ValueError for more clusters than points, or fewer than one.
    """
    if not 1 <= clusters <= len(points_NC):
        raise ValueError(f"{clusters} clusters of {len(points_NC)} points")
    rng = np.random.default_rng(seed)
    runs = [_lloyd(points_NC, _drawn_centres(points_NC, clusters, rng)) for _ in range(restarts)]
    return min(runs, key=lambda run: run[1])[0]


def _drawn_centres(points_NC: Float64s, clusters: int, rng: np.random.Generator) -> Float64s:
    """Draw points as centres, each with a probability that grows with its distance; of a few, keep the best."""
    candidates = 2 + int(math.log(clusters))
    chosen = [int(rng.integers(len(points_NC)))]
    nearest_N = _squared(points_NC, points_NC[chosen])[:, 0]
    while len(chosen) < clusters:
        total = nearest_N.sum()
        shares_N = nearest_N / total if total > 0 else None  # all points are centres already
        drawn_T = rng.choice(len(points_NC), candidates, p=shares_N)
        left_NT = np.minimum(nearest_N[:, np.newaxis], _squared(points_NC, points_NC[drawn_T]))
        best = int(left_NT.sum(axis=0).argmin())
        chosen.append(int(drawn_T[best]))
        nearest_N = left_NT[:, best]
    return points_NC[chosen]


def _lloyd(points_NC: Float64s, centres_KC: Float64s) -> tuple[Int64s, float]:
    """Return the clusters and their squared error once no point changes its cluster."""
    labels_N = np.full(len(points_NC), -1, np.int64)
    for _ in range(MOST_TURNS):
        squared_NK = _squared(points_NC, centres_KC)
        before_N, labels_N = labels_N, _none_empty(squared_NK)
        if np.array_equal(before_N, labels_N):
            break
        sums_KC = np.zeros_like(centres_KC)
        np.add.at(sums_KC, labels_N, points_NC)
        centres_KC = sums_KC / np.bincount(labels_N, minlength=len(centres_KC))[:, np.newaxis]
    squared_NK = _squared(points_NC, centres_KC)
    return labels_N, float(squared_NK[np.arange(len(points_NC)), labels_N].sum())


def _none_empty(squared_NK: Float64s) -> Int64s:
    """Return the nearest centre of each point, but give each centre without a point the farthest one of a shared
    centre.
    """
    labels_N: Int64s = squared_NK.argmin(axis=1)
    away_N = squared_NK[np.arange(len(labels_N)), labels_N]
    sizes_K = np.bincount(labels_N, minlength=squared_NK.shape[1])
    for empty in np.flatnonzero(sizes_K == 0):
        shared_N = sizes_K[labels_N] > 1
        far = int(np.where(shared_N, away_N, -1.0).argmax())
        sizes_K[labels_N[far]] -= 1
        labels_N[far], away_N[far], sizes_K[empty] = empty, 0.0, 1
    return labels_N


def _squared(points_NC: Float64s, centres_KC: Float64s) -> Float64s:
    """Return the squared distances (N, K)."""
    squared_NK: Float64s = np.square(points_NC[:, np.newaxis] - centres_KC).sum(axis=2)
    return squared_NK
