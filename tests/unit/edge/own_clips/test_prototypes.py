"""Prototypes: the floor, the fold, the noise, and refusals."""

import numpy as np
import pytest

from isthmus.edge.own_clips.disclosure import disclose
from isthmus.edge.own_clips.prototypes import (
    assign_clusters,
    each_clip,
    fold_small,
    make_prototypes,
    noisy,
    project_to_simplex,
)
from isthmus.edge.own_clips.selection_pass import PrototypeChoices
from isthmus.proto.convert import prototypes_to_pb
from isthmus.proto.errors import BadPrototypes
from isthmus.proto.limits import MAX_MESSAGE_BYTES, MAX_PROTOTYPE_VALUES
from isthmus.proto.messages import UploadMode


def three_groups() -> np.ndarray:
    """Two groups of four and a lone clip, which k-means gives a cluster of its own."""
    first, second, lone = np.array([[0.9, 0.1, 0.0], [0.1, 0.9, 0.0], [0.0, 0.0, 1.0]], np.float32)
    return np.stack([first] * 4 + [second] * 4 + [lone])


def test_a_lone_clip_is_folded_into_its_neighbour() -> None:
    made = make_prototypes(three_groups(), seed=0)
    assert sorted(made.sizes_K.tolist()) == [4, 5]
    larger_C = made.values_KC[int(made.sizes_K.argmax())]
    assert larger_C[2] == pytest.approx(0.2)
    assert (made.min_cluster, made.mode, made.epsilon) == (3, UploadMode.PROTOTYPES, None)


def test_the_same_seed_gives_the_same_prototypes() -> None:
    probabilities_NC = np.random.default_rng(1).dirichlet(np.ones(4), 50).astype(np.float32)
    first, second = (make_prototypes(probabilities_NC, seed=3) for _ in range(2))
    np.testing.assert_array_equal(first.values_KC, second.values_KC)
    np.testing.assert_array_equal(first.sizes_K, second.sizes_K)


def test_identical_clips_make_one_prototype() -> None:
    made = make_prototypes(np.tile(np.array([0.2, 0.8], np.float32), (10, 1)), seed=0)
    assert made.sizes_K.tolist() == [10]
    np.testing.assert_allclose(made.values_KC, [[0.2, 0.8]], atol=1e-6)


def test_folding_goes_to_the_nearest_and_renumbers() -> None:
    folded_K = fold_small(np.array([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]]), np.array([3, 1, 4]), 3)
    assert folded_K.tolist() == [0, 0, 1]
    # The first is folded into the third; then the second is folded into both.
    centroids_KC = np.array([[0.9, 0.1], [0.5, 0.5], [0.7, 0.3], [0.0, 1.0]])
    assert fold_small(centroids_KC, np.array([1, 3, 5, 9]), 5).tolist() == [0, 0, 0, 1]


def test_clusters_are_those_that_the_prototypes_are_means_of() -> None:
    probabilities_NC = np.random.default_rng(2).dirichlet(np.ones(5), 40).astype(np.float32)
    labels_N = assign_clusters(probabilities_NC, seed=4, min_cluster=6)
    made = make_prototypes(probabilities_NC, seed=4, min_cluster=6)
    assert np.bincount(labels_N).tolist() == made.sizes_K.tolist()
    for row, values_C in enumerate(made.values_KC):
        np.testing.assert_allclose(probabilities_NC[labels_N == row].mean(axis=0), values_C, atol=1e-6)
    with pytest.raises(BadPrototypes, match="3 clips are too few"):
        assign_clusters(probabilities_NC[:3], seed=0, min_cluster=4)


@pytest.mark.parametrize(
    ("probabilities_NC", "message"),
    [
        (np.full((2, 2), 0.5), "2 clips are too few"),
        (np.zeros((0, 2)), "0 clips are too few"),
        (np.full((5, 2), 0.7), "does not sum to 1"),
        (np.array([[np.nan, 1.0]] * 5), "undefined"),
        (np.array([[-0.5, 1.5]] * 5), "negative"),
        (np.full(5, 0.2), "clips x classes"),
    ],
)
def test_bad_probabilities_are_refused(probabilities_NC: np.ndarray, message: str) -> None:
    with pytest.raises(BadPrototypes, match=message):
        make_prototypes(probabilities_NC.astype(np.float32), seed=0)


def test_each_clip_is_the_less_private_mode() -> None:
    sent = each_clip(three_groups())
    assert (sent.mode, sent.min_cluster, sent.sizes_K.tolist()) == (UploadMode.PROBABILITIES, 1, [1] * 9)


def test_features_are_averaged_over_the_same_clusters() -> None:
    rng = np.random.default_rng(2)
    probabilities_NC, features_NE = rng.dirichlet(np.ones(5), 40).astype(np.float32), rng.random((40, 6), np.float32)
    plain = make_prototypes(probabilities_NC, seed=4, min_cluster=6)
    made = make_prototypes(probabilities_NC, seed=4, min_cluster=6, features_NE=features_NE)
    assert (made.mode, plain.features_KE) == (UploadMode.FEATURES, None)
    np.testing.assert_array_equal(made.values_KC, plain.values_KC)
    labels_N = assign_clusters(probabilities_NC, seed=4, min_cluster=6)
    for row, features_E in enumerate(made.features_KE):
        np.testing.assert_allclose(features_NE[labels_N == row].mean(axis=0), features_E, atol=1e-6)
    assert made.sizes_K.min() >= 6


def test_clusters_with_features_stay_within_one_message() -> None:
    rng = np.random.default_rng(0)
    probabilities_NC = rng.dirichlet(np.ones(8), 150).astype(np.float32)
    made = make_prototypes(probabilities_NC, seed=0, features_NE=np.zeros((150, 8_000), np.float32))
    assert len(made.sizes_K) * (8 + 8_000) <= MAX_PROTOTYPE_VALUES < 50 * (8 + 8_000)
    assert prototypes_to_pb(made).ByteSize() < MAX_MESSAGE_BYTES


@pytest.mark.parametrize(
    ("features_NE", "noise", "message"),
    [
        (np.ones((9, 4)), 1.0, "noise is promised for probabilities alone"),
        (np.ones((8, 4)), None, "features of shape"),
        (np.ones((9, 3)), None, "features of shape"),
        (np.full((9, 4), np.nan), None, "undefined"),
        (np.ones((9, 10_000)), None, "at most"),
    ],
)
def test_features_that_may_not_be_sent(features_NE: np.ndarray, noise: float | None, message: str) -> None:
    with pytest.raises(BadPrototypes, match=message):
        make_prototypes(three_groups(), seed=0, noise=noise, noise_seed=1, features_NE=features_NE.astype(np.float32))


def test_features_with_noise_are_refused_before_any_clip_is_read() -> None:
    with pytest.raises(BadPrototypes, match="noise"):
        PrototypeChoices(mode=UploadMode.FEATURES, noise=1.0)


def test_features_are_explained_in_plain_words() -> None:
    made = make_prototypes(three_groups(), seed=0, features_NE=np.ones((9, 4), np.float32))
    explained = disclose(made, ("a", "b", "c"), 1_000)
    assert "average of the 4 numbers" in explained.sentences[0]
    assert "Mode 'prototypes' reveals less" in explained.sentences[0]
    assert explained.message_bytes == prototypes_to_pb(made).ByteSize()


def test_noise_needs_a_seed_the_cloud_does_not_know() -> None:
    with pytest.raises(ValueError, match="noise_seed"):
        make_prototypes(three_groups(), seed=0, noise=1.0)
    with pytest.raises(BadPrototypes, match="epsilon"):
        make_prototypes(three_groups(), seed=0, noise=0.0, noise_seed=1)


def test_noise_is_recorded_and_stays_a_distribution() -> None:
    plain = make_prototypes(three_groups(), seed=0)
    made = make_prototypes(three_groups(), seed=0, noise=0.5, noise_seed=1)
    other = make_prototypes(three_groups(), seed=0, noise=0.5, noise_seed=2)
    assert made.epsilon == 0.5
    np.testing.assert_allclose(made.values_KC.sum(axis=1), 1, atol=1e-5)
    assert not np.allclose(made.values_KC, plain.values_KC)
    assert not np.allclose(made.values_KC, other.values_KC)


def test_noise_has_the_scale_of_the_sensitivity() -> None:
    """Laplace noise of scale b = 2 / (size epsilon) deviates by sqrt(2) b; measured far from the simplex's edge."""
    rows, classes, size, epsilon = 4_000, 5, 10_000, 1.0
    centroids_KC = np.full((rows, classes), 1 / classes)
    moved_KC = noisy(centroids_KC, np.full(rows, size), epsilon=epsilon, rng=np.random.default_rng(0)) - centroids_KC
    # The projection takes out the noise's mean over a row, which lowers the deviation by sqrt(1 - 1 / classes).
    deviation = np.sqrt(2.0) * 2 / (size * epsilon) * np.sqrt(1 - 1 / classes)
    assert moved_KC.std() == pytest.approx(deviation, rel=0.03)


def test_projection_of_a_distribution_is_itself() -> None:
    rows_KC = np.random.default_rng(0).dirichlet(np.ones(6), 20)
    np.testing.assert_allclose(project_to_simplex(rows_KC), rows_KC, atol=1e-12)
    np.testing.assert_allclose(project_to_simplex(np.array([[3.0, 0.0], [-5.0, -5.0]])), [[1, 0], [0.5, 0.5]])
