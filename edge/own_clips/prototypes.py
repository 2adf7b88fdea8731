"""From a user's class probabilities to the few centroids that may leave the device. Pure.

k-means with k = ceil(n / clip_per_cluster), then every cluster smaller than the floor is folded into its nearest
neighbour, so that no prototype stands for fewer than ``min_cluster`` clips (spec 1, section 5).

What this protects, honestly: the floor keeps any one clip's own output from being sent as it is. k-means alone is
not privacy in the formal sense: a centroid of three near-identical clips says much about each of them. The optional
noise adds a stated guarantee, within limits told at ``noisy``.

Axes: N clips, K prototypes, C classes, E feature values (both modalities, audio then visual).
"""

import math

import numpy as np
import numpy.typing as npt

from isthmus.proto.errors import BadPrototypes
from isthmus.proto.limits import MAX_FEATURE_WIDTH, MAX_PROTOTYPE_ROWS, MAX_PROTOTYPE_VALUES
from isthmus.proto.messages import FloatArray, Prototypes, UploadMode

_SUM_TOLERANCE = 1e-3
_RESTARTS = 4

_Wide = npt.NDArray[np.float64]
_Counts = npt.NDArray[np.int64]


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
    """Centroids of ``probabilities_NC`` (rows are distributions) with the sizes of their clusters, which sum to N.

    ``noise`` is the epsilon of Laplace noise on the centroids (see ``noisy``); None adds none. Deterministic for the
    seeds. ``seed`` may be known to the cloud; ``noise_seed``, wanted with noise, may not: whoever knows it can take
    the noise off. It is fresh entropy (``secrets.randbits(128)``) and is kept nowhere.

    With ``features_NE``, the student's features of the same clips, each prototype also carries the mean of its
    cluster's (mode FEATURES): more is told, of no fewer clips. Clusters are made of the probabilities alone.

    Raises ValueError for noise without its seed, BadPrototypes for rows that are no distributions, for fewer than
    ``min_cluster`` clips, for features that are not one finite row a clip, and for features with noise: its promise
    stands on outputs being distributions, and features have no such bound.
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
    """Every clip's own probabilities: the less private upload mode, for a user who has chosen it."""
    _check(probabilities_NC, 1, 1, None)
    return Prototypes(
        values_KC=probabilities_NC.astype(np.float32),
        sizes_K=np.ones(len(probabilities_NC), dtype=np.int32),
        mode=UploadMode.PROBABILITIES,
        min_cluster=1,
    )


def assign_clusters(
    probabilities_NC: FloatArray, *, seed: int, min_cluster: int = 3, clip_per_cluster: int = 3, feature_values: int = 0
) -> _Counts:
    """Which prototype stands for each clip: labels_N from 0 without gaps, small clusters folded.

    No more clusters than a message can carry with ``feature_values`` features each. Row k of ``make_prototypes`` with
    the same arguments is the mean of the clips with label k. Raises BadPrototypes as it does.
    """
    _check(probabilities_NC, min_cluster, clip_per_cluster, None)
    wide_NC = _distributions(probabilities_NC)
    clips, classes = wide_NC.shape
    most = min(MAX_PROTOTYPE_ROWS, MAX_PROTOTYPE_VALUES // (classes + feature_values))
    clusters = min(math.ceil(clips / clip_per_cluster), len(np.unique(wide_NC, axis=0)), most)
    _, labels_N = np.unique(_cluster(wide_NC, clusters, seed), return_inverse=True)  # a cluster can be empty
    folded_K = fold_small(*_means(wide_NC, labels_N), min_cluster)
    return folded_K[labels_N]


def _distributions(probabilities_NC: FloatArray) -> _Wide:
    wide_NC: _Wide = np.clip(probabilities_NC.astype(np.float64), 0.0, None)
    wide_NC /= wide_NC.sum(axis=1, keepdims=True)
    return wide_NC


def _means(wide_NC: _Wide, labels_N: _Counts) -> tuple[_Wide, _Counts]:
    sizes_K = np.bincount(labels_N)
    sums_KC = np.zeros((len(sizes_K), wide_NC.shape[1]))
    np.add.at(sums_KC, labels_N, wide_NC)
    return sums_KC / sizes_K[:, np.newaxis], sizes_K


def _cluster(wide_NC: _Wide, clusters: int, seed: int) -> _Counts:
    from sklearn.cluster import KMeans  # Here, because its import is slower than the rest of the device together.

    labels_N: _Counts = KMeans(clusters, n_init=_RESTARTS, random_state=seed % (1 << 32)).fit_predict(wide_NC)
    return labels_N


def fold_small(centroids_KC: _Wide, sizes_K: _Counts, min_cluster: int) -> _Counts:
    """Folds the smallest cluster into its nearest neighbour until none is under ``min_cluster`` or one is left.

    Returns the folded cluster of each cluster, numbered without gaps. A folded centroid is the mean weighted by size,
    so it stays the mean of its clips. Ties go to the lower index.
    """
    centroids_KC, sizes_K = centroids_KC.copy(), sizes_K.copy()
    folded_K: _Counts = np.arange(len(sizes_K), dtype=np.int64)
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


def noisy(centroids_KC: _Wide, sizes_K: _Counts, *, epsilon: float, rng: np.random.Generator) -> _Wide:
    """Centroids with Laplace noise of scale 2 / (size epsilon), projected back on the simplex.

    Exchanging one clip of a cluster of s moves its mean by at most 2 / s in the L1 norm, since both outputs are
    distributions; each clip is in one cluster only, so the clusters compose in parallel and one upload spends
    ``epsilon``. The limits of that promise: the assignment of clips to clusters and the sizes are taken as given and
    are not protected; R rounds spend R times epsilon; and the noise is drawn in floating point.
    """
    scale_K1 = 2.0 / (sizes_K * epsilon)[:, np.newaxis]
    return project_to_simplex(centroids_KC + rng.laplace(0.0, scale_K1, size=centroids_KC.shape))


def project_to_simplex(values_KC: _Wide) -> _Wide:
    """The nearest distribution to each row in the Euclidean norm (Duchi et al., ICML 2008, Figure 1)."""
    classes = values_KC.shape[1]
    # Shifting a row does not move its projection; it keeps the sums below small, however large the noise.
    values_KC = values_KC - values_KC.max(axis=1, keepdims=True)
    descending_KC = -np.sort(-values_KC, axis=1)
    excess_KC = np.cumsum(descending_KC, axis=1) - 1.0
    positive_KC = descending_KC * np.arange(1, classes + 1) > excess_KC
    last_K = classes - 1 - np.argmax(positive_KC[:, ::-1], axis=1)
    shift_K1 = np.take_along_axis(excess_KC, last_K[:, np.newaxis], axis=1) / (last_K + 1)[:, np.newaxis]
    projected_KC: _Wide = np.maximum(values_KC - shift_K1, 0.0)
    return projected_KC


def _check_features(features_NE: FloatArray, clips: int, noise: float | None) -> None:
    if noise is not None:
        raise BadPrototypes("noise is promised for probabilities alone: choose mode prototypes, or no noise")
    if features_NE.ndim != 2 or len(features_NE) != clips or features_NE.shape[1] < 2 or features_NE.shape[1] % 2:
        raise BadPrototypes(f"features of shape {features_NE.shape} for {clips} clips")
    if features_NE.shape[1] > 2 * MAX_FEATURE_WIDTH:
        raise BadPrototypes(f"{features_NE.shape[1]} feature values a clip; at most {2 * MAX_FEATURE_WIDTH} are sent")
    if not np.isfinite(features_NE).all():
        raise BadPrototypes("features hold an undefined value")


def _check(probabilities_NC: FloatArray, min_cluster: int, clip_per_cluster: int, noise: float | None) -> None:
    if min_cluster < 1 or clip_per_cluster < 1:
        raise BadPrototypes("min_cluster and clip_per_cluster are at least 1")
    if noise is not None and not (math.isfinite(noise) and noise >= 1e-6):
        raise BadPrototypes(f"epsilon is {noise}; wanted a finite number of at least 1e-6")
    if probabilities_NC.ndim != 2 or probabilities_NC.shape[1] < 2:
        raise BadPrototypes(f"probabilities of shape {probabilities_NC.shape}; wanted clips x classes")
    if not np.isfinite(probabilities_NC).all() or (probabilities_NC < -_SUM_TOLERANCE).any():
        raise BadPrototypes("probabilities hold a negative or undefined value")
    if (np.abs(probabilities_NC.sum(axis=1, dtype=np.float64) - 1) > _SUM_TOLERANCE).any():
        raise BadPrototypes("a row of probabilities does not sum to 1")
    if len(probabilities_NC) < max(min_cluster, 1):
        raise BadPrototypes(
            f"{len(probabilities_NC)} clips are too few: a prototype stands for at least {min_cluster}; collect more"
        )
