"""The proxy A-distance: 0 for sets that cannot be separated, 2 for sets that always can."""

import numpy as np
import pytest

from isthmus.distill.student.discrepancy import proxy_a_distance


def test_alike_is_near_zero_apart_is_two_and_the_side_does_not_matter() -> None:
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(size=(200, 4)), rng.normal(size=(300, 4))
    assert proxy_a_distance(ours, theirs, seed=0) < 0.3
    assert proxy_a_distance(ours, theirs + 20, seed=0) == pytest.approx(2.0)
    near = proxy_a_distance(ours, theirs + 0.7, seed=0)
    far = proxy_a_distance(ours, theirs + 1.5, seed=0)
    assert 0.2 < near < far < 2
    assert proxy_a_distance(ours, theirs, seed=0) == proxy_a_distance(ours, theirs, seed=0)


def test_a_row_that_stands_for_many_clips_counts_as_many() -> None:
    rng = np.random.default_rng(1)
    theirs = rng.normal(size=(300, 2))
    ours = np.concatenate([rng.normal(size=(20, 2)) + 6, rng.normal(size=(20, 2))])
    far = proxy_a_distance(ours, theirs, seed=0, ours_weights_N=np.repeat([50.0, 1.0], 20))
    near = proxy_a_distance(ours, theirs, seed=0, ours_weights_N=np.repeat([1.0, 50.0], 20))
    assert near < far - 0.5


def test_too_few_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="both sides need two"):
        proxy_a_distance(np.zeros((1, 3)), np.zeros((9, 3)), seed=0)
