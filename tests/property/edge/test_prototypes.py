"""For any input: no prototype is below the floor, sizes sum to n, and every row is a distribution."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from isthmus.edge.own_clips.prototypes import make_prototypes, project_to_simplex
from isthmus.proto.convert import prototypes_from_pb, prototypes_to_pb
from isthmus.proto.messages import FloatArray


@st.composite
def probabilities(draw: st.DrawFn, floor: int) -> FloatArray:
    """Softmax outputs from flat to one-hot, with many exact ties among them."""
    clips = draw(st.integers(floor, floor + 30))
    classes = draw(st.integers(2, 7))
    logits_NC = draw(
        hnp.arrays(np.float64, (clips, classes), elements=st.sampled_from([-300.0, -3.0, -0.1, 0.0, 0.2, 3.0, 300.0]))
    )
    exponents_NC = np.exp(logits_NC - logits_NC.max(axis=1, keepdims=True))
    return (exponents_NC / exponents_NC.sum(axis=1, keepdims=True)).astype(np.float32)


@settings(max_examples=40)
@given(st.data(), st.integers(1, 6), st.integers(1, 12), st.integers(-5, 1 << 40), st.sampled_from([None, 0.01, 10.0]))
def test_floor_sizes_and_rows_hold(
    data: st.DataObject, floor: int, clip_per_cluster: int, seed: int, noise: float | None
) -> None:
    probabilities_NC = data.draw(probabilities(floor))
    made = make_prototypes(
        probabilities_NC,
        seed=seed,
        min_cluster=floor,
        clip_per_cluster=clip_per_cluster,
        noise=noise,
        noise_seed=None if noise is None else 7,
    )
    assert made.sizes_K.min() >= floor
    assert made.sizes_K.sum() == len(probabilities_NC)
    assert made.values_KC.shape == (len(made.sizes_K), probabilities_NC.shape[1])
    if noise is None:
        mean_C = (made.values_KC * made.sizes_K[:, np.newaxis]).sum(axis=0) / made.sizes_K.sum()
        np.testing.assert_allclose(mean_C, probabilities_NC.mean(axis=0), atol=1e-5)
    # The cloud's check of an upload is the strictest reader.
    read = prototypes_from_pb(prototypes_to_pb(made))
    np.testing.assert_array_equal(read.values_KC, made.values_KC)


@given(hnp.arrays(np.float64, (3, 5), elements=st.floats(-1e9, 1e9)))
def test_projection_is_the_nearest_distribution(values_KC: np.ndarray) -> None:
    projected_KC = project_to_simplex(values_KC)
    assert (projected_KC >= 0).all()
    np.testing.assert_allclose(projected_KC.sum(axis=1), 1, atol=1e-6)
    corners_CC = np.eye(5)
    own_K = np.linalg.norm(values_KC - projected_KC, axis=1)
    for corner_C in corners_CC:
        assert (own_K <= np.linalg.norm(values_KC - corner_C, axis=1) * (1 + 1e-9) + 1e-6).all()
