"""Measuring a student: which public clips are taken, and the confidence that as many clips reach as are right."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from isthmus.distill.student.measure import atc_threshold, measured_rows


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=30, unique_by=lambda pair: pair[0]))
def test_above_the_threshold_are_as_many_as_are_right(clips: list[tuple[float, bool]]) -> None:
    confidence_N, right_N = np.array([c for c, _ in clips]), np.array([r for _, r in clips])
    threshold = atc_threshold(confidence_N, right_N)
    assert 0 <= threshold <= 1
    if right_N.any() or confidence_N.max() < 1:
        assert (confidence_N >= threshold).mean() == right_N.mean()


@given(st.integers(0, 2**32), st.integers(1, 300), st.integers(1, 100))
def test_measured_on_what_was_not_selected_where_there_is_enough(seed: int, clips: int, at_most: int) -> None:
    rng = np.random.default_rng(seed)
    labels_N = rng.integers(-1, 4, clips)
    selected_S = rng.permutation(clips)[: rng.integers(0, clips)]
    rows = measured_rows(labels_N, selected_S, at_most=at_most)
    labelled = set(np.flatnonzero(labels_N >= 0).tolist())
    outside = labelled - set(selected_S.tolist())
    allowed = outside if len(outside) >= 50 else labelled
    assert set(rows.tolist()) <= allowed
    assert len(set(rows.tolist())) == len(rows) == min(at_most, len(allowed))
    assert list(rows) == sorted(rows)
