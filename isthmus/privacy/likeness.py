"""PURE: similarity of a reconstruction to its clip, and how well a score separates members from others.

Axes: N clips, M reconstructions, H W of a picture or a spectrogram, C channels.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.ndimage import gaussian_filter

Wide = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

_SIGMA = 1.5
_RADIUS = 5


def ssim(first_NHWC: npt.ArrayLike, second_NHWC: npt.ArrayLike, data_range: float) -> Wide:
    """Return the mean structural similarity of each pair: (N,) (Wang et al. 2004, Eq. 13 and 17).

    As theirs: Gaussian window of 11 x 11 with deviation 1.5, K1 = 0.01, K2 = 0.03. Pixels whose window leaves the
    picture are ignored. Equal pictures have 1. Raises ValueError for pictures smaller than the window.
    """
    first, second = np.asarray(first_NHWC, np.float64), np.asarray(second_NHWC, np.float64)
    if first.shape != second.shape or first.ndim != 4:
        raise ValueError(f"pictures of shapes {first.shape} and {second.shape}: both must be N x H x W x C")
    if min(first.shape[1:3]) <= 2 * _RADIUS:
        raise ValueError(f"pictures of {first.shape[1]} x {first.shape[2]} are smaller than the window of 11")
    one, two = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    mean_a, mean_b = _window_mean(first), _window_mean(second)
    var_a = _window_mean(first * first) - mean_a**2
    var_b = _window_mean(second * second) - mean_b**2
    covariance = _window_mean(first * second) - mean_a * mean_b
    index = ((2 * mean_a * mean_b + one) * (2 * covariance + two)) / (
        (mean_a**2 + mean_b**2 + one) * (var_a + var_b + two)
    )
    whole: Wide = index.mean(axis=(1, 2, 3))
    return whole


def _window_mean(pictures_NHWC: Wide) -> Wide:
    smooth: Wide = gaussian_filter(pictures_NHWC, (0, _SIGMA, _SIGMA, 0), truncate=_RADIUS / _SIGMA)
    return smooth[:, _RADIUS:-_RADIUS, _RADIUS:-_RADIUS]


def squared_distances(first_MP: npt.ArrayLike, second_NP: npt.ArrayLike) -> Wide:
    """Return squared Euclidean distances (M, N). They are computed by differences, so equal rows have exactly 0."""
    first, second = np.asarray(first_MP, np.float64), np.asarray(second_NP, np.float64)
    return np.stack([np.square(second - row_P).sum(axis=1) for row_P in first])


def same_class_rate(distances_NN: Wide, labels_N: Indices) -> float:
    """Return the share of reconstructions nearer to their own clip than to another clip of the same class and client.

    Row n holds the distances of clip n's reconstruction to every clip. Ties count half. A reconstruction that knows
    only the class reaches 0.5. NaN if no class has two clips.
    """
    wins, pairs = 0.0, 0
    for row, label in enumerate(labels_N):
        others_N = (labels_N == label) & (np.arange(len(labels_N)) != row)
        own, rest = distances_NN[row, row], distances_NN[row, others_N]
        wins += float((own < rest).sum() + 0.5 * (own == rest).sum())
        pairs += len(rest)
    return wins / pairs if pairs else float("nan")


def retrieval_rate(distances_NN: Wide) -> float:
    """Return how often the nearest of all N clips is the right one. Ties are shared. Chance is 1 / N."""
    nearest_NN = distances_NN == distances_NN.min(axis=1, keepdims=True)
    return float((np.diag(nearest_NN) / nearest_NN.sum(axis=1)).mean())


def auc(members_N: npt.ArrayLike, others_M: npt.ArrayLike) -> float:
    """Return the area under the ROC curve: P(member scores above non-member), ties half. Raises ValueError if empty."""
    members, others = np.asarray(members_N, np.float64), np.sort(np.asarray(others_M, np.float64))
    if not len(members) or not len(others):
        raise ValueError("no members, or no non-members to compare them with")
    below = np.searchsorted(others, members, side="left")
    not_above = np.searchsorted(others, members, side="right")
    return float((below + not_above).mean() / (2 * len(others)))


def true_positive_rate(members_N: npt.ArrayLike, others_M: npt.ArrayLike, false_positive_rate: float) -> float:
    """Return the share of members found at the lowest threshold with at most the given false positive rate."""
    members, others = np.asarray(members_N, np.float64), -np.sort(-np.asarray(others_M, np.float64))
    allowed = int(np.floor(false_positive_rate * len(others) + 1e-9))
    threshold = others[allowed] if allowed < len(others) else -np.inf
    return float((members > threshold).mean())


@dataclass(frozen=True)
class Interval:
    """An estimate with the 2.5th and 97.5th percentile of its bootstrap."""

    value: float
    low: float
    high: float


def bootstrapped(
    statistic: Callable[[Wide, Wide], float], members_N: Wide, others_M: Wide, *, seed: int, draws: int = 500
) -> Interval:
    """Bootstrap: resample members and others with replacement ``draws`` times (percentile bootstrap, Efron 1979)."""
    rng = np.random.default_rng(seed)
    values = [
        statistic(rng.choice(members_N, len(members_N)), rng.choice(others_M, len(others_M))) for _ in range(draws)
    ]
    low, high = np.percentile(values, [2.5, 97.5])
    return Interval(statistic(members_N, others_M), float(low), float(high))
