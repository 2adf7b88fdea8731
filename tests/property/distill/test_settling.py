"""The overlap of two selections against its definition on sets."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from isthmus.distill.student.settling import overlap, settled

selections = st.lists(st.integers(0, 12), max_size=20)
thresholds = st.floats(0, 1, exclude_min=True)


@given(selections, selections, thresholds)
def test_as_on_sets(before: list[int], after: list[int], threshold: float) -> None:
    a, b = set(before), set(after)
    expected = len(a & b) / len(a | b) if a | b else 1.0
    before_S, after_S = np.array(before, np.int64), np.array(after, np.int64)
    assert overlap(before_S, after_S) == overlap(after_S, before_S) == expected
    assert settled(before_S, after_S, threshold) == (expected >= threshold)
    assert settled(before_S, before_S[::-1], threshold), "the order taken does not count"
