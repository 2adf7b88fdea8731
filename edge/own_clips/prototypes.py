"""From a user's class probabilities to the few centroids that may leave the device. Pure.

k-means runs with k = ceil(n / clip_per_cluster). Then every cluster below the floor is folded into its nearest
neighbour, so that every prototype is the mean of at least ``min_cluster`` clips.

The floor prevents that the output of a single clip is sent. k-means alone is no formal privacy: a centroid of three
near-identical clips says much about each of them. The optional noise adds a formal guarantee; ``noisy`` states its
limits.

Axes: N clips, K prototypes, C classes, E feature values (both modalities, audio then visual).
"""

import math

import numpy as np
import numpy.typing as npt

from isthmus.edge.own_clips.kmeans import k_means
from isthmus.proto.errors import BadPrototypes
from isthmus.proto.limits import MAX_FEATURE_WIDTH, MAX_PROTOTYPE_ROWS, MAX_PROTOTYPE_VALUES
from isthmus.proto.messages import FloatArray, Prototypes, UploadMode

_SUM_TOLERANCE = 1e-3
_RESTARTS = 4

_Float64s = npt.NDArray[np.float64]
_Int64s = npt.NDArray[np.int64]


def make_prototypes(
    probabilities_NC: FloatArray,
    *,
    seed: int,
    min_cluster: int = 3,
    clip_per_cluster: int = 3,
    noise: float | None = None,
    noise_seed: int | None = None,
    features_NE: FloatArray | None = None,
) -> Prototypes:
    """Return the centroids of ``probabilities_NC`` (rows are distributions) and their cluster sizes, which sum to N.

    ``noise`` is the epsilon of Laplace noise on the centroids (see ``noisy``); None adds none. The result is
    deterministic for the seeds. The cloud may know ``seed`` but not ``noise_seed``: with it the noise could be
    removed. Pass fresh entropy (``secrets.randbits(128)``) and store it nowhere.

    With ``features_NE``, the student's features of the same clips, each prototype also has the mean features of its
    cluster (mode FEATURES). This reveals more, about no fewer clips. Only the probabilities decide the clusters.

    Raises ValueError for noise without its seed. Raises BadPrototypes for rows that are no distributions, for fewer
    than ``min_cluster`` clips, for features that are not one finite row per clip, and for features with noise: the
    guarantee needs distributions, and features have no such bound.

    >>> outputs_NC = np.full((6, 3), 1 / 3, np.float32)  # six clips, three classes, no opinion
    >>> prototypes = make_prototypes(outputs_NC, seed=0)
    >>> prototypes.values_KC.shape, prototypes.sizes_K.tolist()  # one row that stands for all six clips
    ((1, 3), [6])
    """
    if noise is not None and noise_seed is None:
        raise ValueError("noise needs a noise_seed of its own, unknown to the cloud")
    if features_NE is not None:
        _check_features(features_NE, len(probabilities_NC), noise)
    _check(probabilities_NC, min_cluster, clip_per_cluster, noise)
    labels_N = assign_clusters(
        probabilities_NC,
        seed=seed,
        min_cluster=min_cluster,
        clip_per_cluster=clip_per_cluster,
        feature_values=0 if features_NE is None else features_NE.shape[1],
    )
    values_KC, sizes_K = _means(_distributions(probabilities_NC), labels_N)
    if noise is not None:
        values_KC = noisy(values_KC, sizes_K, epsilon=noise, rng=np.random.default_rng(noise_seed))
    values_KC = values_KC / values_KC.sum(axis=1, keepdims=True)
    features_KE = (
        None if features_NE is None else _means(features_NE.astype(np.float64), labels_N)[0].astype(np.float32)
    )
    return Prototypes(
        values_KC=values_KC.astype(np.float32),
        sizes_K=sizes_K.astype(np.int32),
        mode=UploadMode.PROTOTYPES if features_KE is None else UploadMode.FEATURES,
        min_cluster=min_cluster,
        epsilon=noise,
        features_KE=features_KE,
    )


def each_clip(probabilities_NC: FloatArray) -> Prototypes:
    """Return the probabilities of every single clip: a less private upload mode, which the user must choose."""
    _check(probabilities_NC, 1, 1, None)
    return Prototypes(
        values_KC=probabilities_NC.astype(np.float32),
        sizes_K=np.ones(len(probabilities_NC), dtype=np.int32),
        mode=UploadMode.PROBABILITIES,
        min_cluster=1,
    )


def assign_clusters(
    probabilities_NC: FloatArray, *, seed: int, min_cluster: int = 3, clip_per_cluster: int = 3, feature_values: int = 0
) -> _Int64s:
    """Return labels_N, the prototype of each clip: from 0 without gaps, with small clusters folded.

    There are no more clusters than a message can carry with ``feature_values`` features each. Row k of
    ``make_prototypes`` with the same arguments is the mean of the clips with label k. Raises BadPrototypes.
    """
    _check(probabilities_NC, min_cluster, clip_per_cluster, None)
    wide_NC = _distributions(probabilities_NC)
    clips, classes = wide_NC.shape
    most = min(MAX_PROTOTYPE_ROWS, MAX_PROTOTYPE_VALUES // (classes + feature_values))
    clusters = min(math.ceil(clips / clip_per_cluster), len(np.unique(wide_NC, axis=0)), most)
    labels_N = k_means(wide_NC, clusters, restarts=_RESTARTS, seed=seed % (1 << 32))
    folded_K = fold_small(*_means(wide_NC, labels_N), min_cluster)
    return folded_K[labels_N]


def _distributions(probabilities_NC: FloatArray) -> _Float64s:
    wide_NC: _Float64s = np.clip(probabilities_NC.astype(np.float64), 0.0, None)
    wide_NC /= wide_NC.sum(axis=1, keepdims=True)
    return wide_NC


def _means(wide_NC: _Float64s, labels_N: _Int64s) -> tuple[_Float64s, _Int64s]:
    sizes_K = np.bincount(labels_N)
    sums_KC = np.zeros((len(sizes_K), wide_NC.shape[1]))
    np.add.at(sums_KC, labels_N, wide_NC)
    return sums_KC / sizes_K[:, np.newaxis], sizes_K


def fold_small(centroids_KC: _Float64s, sizes_K: _Int64s, min_cluster: int) -> _Int64s:
    """Fold the smallest cluster into its nearest neighbour until none is below ``min_cluster`` or one is left.

    Returns the folded cluster of each cluster, numbered without gaps. A folded centroid is the mean weighted by size,
    so it remains the mean of its clips. Ties go to the lower index.
    """
    centroids_KC, sizes_K = centroids_KC.copy(), sizes_K.copy()
    folded_K: _Int64s = np.arange(len(sizes_K), dtype=np.int64)
    while len(sizes_K) > 1 and sizes_K.min() < min_cluster:
        small = int(sizes_K.argmin())
        distances_K = np.square(centroids_KC - centroids_KC[small]).sum(axis=1)
        distances_K[small] = np.inf
        near = int(distances_K.argmin())
        total = sizes_K[near] + sizes_K[small]
        centroids_KC[near] = (centroids_KC[near] * sizes_K[near] + centroids_KC[small] * sizes_K[small]) / total
        sizes_K[near] = total
        centroids_KC = np.delete(centroids_KC, small, axis=0)
        sizes_K = np.delete(sizes_K, small)
        folded_K[folded_K == small] = near
        folded_K[folded_K > small] -= 1
    return folded_K


def noisy(centroids_KC: _Float64s, sizes_K: _Int64s, *, epsilon: float, rng: np.random.Generator) -> _Float64s:
    """Return the centroids with Laplace noise of scale 2 / (size epsilon), projected back onto the simplex.

    Exchanging one clip in a cluster of s clips moves its mean by at most 2 / s in the L1 norm, because both outputs
    are distributions. Each clip is in one cluster only, so the clusters compose in parallel and one upload spends
    ``epsilon``. The guarantee has limits: it does not protect the assignment of clips to clusters or the sizes, R
    rounds spend R times epsilon, and the noise is drawn in floating point.
    """
    scale_K1 = 2.0 / (sizes_K * epsilon)[:, np.newaxis]
    return project_to_simplex(centroids_KC + rng.laplace(0.0, scale_K1, size=centroids_KC.shape))


def project_to_simplex(values_KC: _Float64s) -> _Float64s:
    """Return the nearest distribution to each row in the Euclidean norm (Duchi et al., ICML 2008, Figure 1)."""
    classes = values_KC.shape[1]
    # Shifting a row does not change its projection, and keeps the sums below small for any noise.
    values_KC = values_KC - values_KC.max(axis=1, keepdims=True)
    descending_KC = -np.sort(-values_KC, axis=1)
    excess_KC = np.cumsum(descending_KC, axis=1) - 1.0
    positive_KC = descending_KC * np.arange(1, classes + 1) > excess_KC
    last_K = classes - 1 - np.argmax(positive_KC[:, ::-1], axis=1)
    shift_K1 = np.take_along_axis(excess_KC, last_K[:, np.newaxis], axis=1) / (last_K + 1)[:, np.newaxis]
    projected_KC: _Float64s = np.maximum(values_KC - shift_K1, 0.0)
    return projected_KC


def _check_features(features_NE: FloatArray, clips: int, noise: float | None) -> None:
    if noise is not None:
        raise BadPrototypes("noise is promised for probabilities alone: choose mode prototypes, or no noise")
    if features_NE.ndim != 2 or len(features_NE) != clips or features_NE.shape[1] < 2 or features_NE.shape[1] % 2:
        raise BadPrototypes(f"features of shape {features_NE.shape} for {clips} clips")
    if features_NE.shape[1] > 2 * MAX_FEATURE_WIDTH:
        raise BadPrototypes(
            f"{features_NE.shape[1]} feature values per clip; at most {2 * MAX_FEATURE_WIDTH} can be sent"
        )
    if not np.isfinite(features_NE).all():
        raise BadPrototypes("features contain an undefined value")


def _check(probabilities_NC: FloatArray, min_cluster: int, clip_per_cluster: int, noise: float | None) -> None:
    if min_cluster < 1 or clip_per_cluster < 1:
        raise BadPrototypes("min_cluster and clip_per_cluster must be at least 1")
    if noise is not None and not (math.isfinite(noise) and noise >= 1e-6):
        raise BadPrototypes(f"epsilon is {noise}; it must be a finite number of at least 1e-6")
    if probabilities_NC.ndim != 2 or probabilities_NC.shape[1] < 2:
        raise BadPrototypes(f"probabilities of shape {probabilities_NC.shape}; expected clips x classes")
    if not np.isfinite(probabilities_NC).all() or (probabilities_NC < -_SUM_TOLERANCE).any():
        raise BadPrototypes("probabilities contain a negative or undefined value")
    if (np.abs(probabilities_NC.sum(axis=1, dtype=np.float64) - 1) > _SUM_TOLERANCE).any():
        raise BadPrototypes("a row of probabilities does not sum to 1")
    if len(probabilities_NC) < max(min_cluster, 1):
        raise BadPrototypes(
            f"{len(probabilities_NC)} clips are too few: a prototype needs at least {min_cluster}; collect more"
        )
