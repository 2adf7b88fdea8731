"""k-means against scikit-learn's, and what must hold for every set of points."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.edge.own_clips.kmeans import k_means

Float64s = npt.NDArray[np.float64]


def error(points_NC: Float64s, labels_N: npt.NDArray[np.int64]) -> float:
    parts = (points_NC[labels_N == cluster] for cluster in np.unique(labels_N))
    return float(sum(np.square(part_NC - part_NC.mean(axis=0)).sum() for part_NC in parts))


def points(seed: int, count: int, classes: int, sharp: float) -> Float64s:
    return np.random.default_rng(seed).dirichlet(np.full(classes, sharp), count)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 60), st.integers(2, 8), st.sampled_from([0.1, 1.0, 10.0]), st.data())
def test_every_cluster_has_a_point_and_every_point_its_nearest_centre(
    seed: int, count: int, classes: int, sharp: float, data: st.DataObject
) -> None:
    points_NC = points(seed, count, classes, sharp)
    clusters = data.draw(st.integers(1, count))
    labels_N = k_means(points_NC, clusters, restarts=2, seed=seed)
    assert sorted(set(labels_N.tolist())) == list(range(clusters))
    centres_KC = np.stack([points_NC[labels_N == cluster].mean(axis=0) for cluster in range(clusters)])
    squared_NK = np.square(points_NC[:, np.newaxis] - centres_KC).sum(axis=2)
    own_N = squared_NK[np.arange(count), labels_N]
    assert (own_N <= squared_NK.min(axis=1) + 1e-12).all()
    assert np.array_equal(labels_N, k_means(points_NC, clusters, restarts=2, seed=seed)), "the seed decides"


@pytest.mark.parametrize("sharp", [0.1, 0.5, 3.0])
def test_it_is_as_good_as_scikit_learns(sharp: float) -> None:
    cluster = pytest.importorskip("sklearn.cluster")
    ours, theirs = [], []
    for seed in range(20):
        points_NC = points(seed, 90, 6, sharp)
        ours.append(error(points_NC, k_means(points_NC, 30, restarts=4, seed=seed)))
        model = cluster.KMeans(30, n_init=4, random_state=seed)
        theirs.append(error(points_NC, model.fit_predict(points_NC).astype(np.int64)))
    assert np.mean(ours) <= 1.02 * np.mean(theirs)


def test_points_that_are_alike_still_fill_their_clusters() -> None:
    labels_N = k_means(np.ones((4, 3)), 3, restarts=2, seed=0)
    assert set(labels_N.tolist()) == {0, 1, 2}


@pytest.mark.parametrize("clusters", [0, 5])
def test_a_number_of_clusters_that_cannot_be_is_refused(clusters: int) -> None:
    with pytest.raises(ValueError, match=r"clusters of 4 points"):
        k_means(np.ones((4, 3)), clusters, restarts=1, seed=0)
