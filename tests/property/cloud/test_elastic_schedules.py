"""The search for schedules: within its budget of operations and evaluations, never worse than uniform, resumable."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.cloud.elastic.model.merging import mergeable
from isthmus.cloud.elastic.model.schedules import Schedule, candidates, search

TOKENS = 65


def operations(schedule: Schedule) -> int:
    """Tokens that each layer's MLP still sees, in all."""
    tokens, seen = TOKENS, 0
    for cut in schedule:
        tokens -= mergeable(tokens, -cut)
        seen += tokens
    return seen


def test_the_papers_candidates() -> None:
    found = candidates(-20, 12, 197)
    assert found[0] == (-20,) * 12
    assert found[1] == (-25,) * 2 + (-20,) * 6 + (0,) * 4
    assert found[2] == (-23,) * 3 + (-20,) * 5 + (0,) * 4
    assert found[3] == (-22,) * 4 + (-20,) * 4 + (0,) * 4


@given(gamma=st.integers(-TOKENS, -1), depth=st.integers(1, 24))
def test_candidates_are_schedules(gamma: int, depth: int) -> None:
    found = candidates(gamma, depth, TOKENS)
    assert found[0] == (gamma,) * depth
    assert len(set(found)) == len(found)
    assert all(len(schedule) == depth and all(-TOKENS <= cut <= 0 for cut in schedule) for schedule in found)


@given(
    gamma=st.integers(-32, -1),
    depth=st.integers(1, 6),
    evaluations=st.integers(1, 25),
    weights=st.lists(st.floats(0, 1), min_size=6, max_size=6),
)
def test_what_is_found_fits_and_is_no_worse(gamma: int, depth: int, evaluations: int, weights: list[float]) -> None:
    def accuracy(schedule: Schedule) -> float:
        return sum(weight * cut for weight, cut in zip(weights, schedule, strict=False)) / 1_000

    calls: list[Schedule] = []
    found = search(
        gamma,
        depth,
        accuracy,
        operations,
        most=TOKENS,
        max_evaluations=evaluations,
        on_evaluated=lambda schedule, _: calls.append(schedule),
    )
    assert len(calls) == len(set(calls)) == found.tried <= evaluations
    assert found.accuracy == accuracy(found.schedule) == max(map(accuracy, calls)) >= found.uniform_accuracy
    assert all(operations(schedule) <= 1.02 * operations((gamma,) * depth) for schedule in calls)


def test_an_interrupted_search_evaluates_nothing_twice() -> None:
    def accuracy(schedule: Schedule) -> float:
        return -sum(layer * cut for layer, cut in enumerate(schedule)) / 1_000

    known: dict[Schedule, float] = {}

    def stop_after_nine(schedule: Schedule, share: float) -> None:
        known[schedule] = share
        if len(known) == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(-8, 6, accuracy, operations, most=TOKENS, on_evaluated=stop_after_nine)
    counter = itertools.count()

    def counted(schedule: Schedule) -> float:
        assert schedule not in known
        next(counter)
        return accuracy(schedule)

    resumed = search(-8, 6, counted, operations, most=TOKENS, known=known)
    assert resumed == search(-8, 6, accuracy, operations, most=TOKENS)
    assert next(counter) == resumed.tried - 9


def test_what_cannot_be_searched_is_refused() -> None:
    for gamma in (0, 4, -66):
        with pytest.raises(ValueError, match="gamma"):
            candidates(gamma, 6, TOKENS)
    with pytest.raises(ValueError, match="at least one schedule"):
        search(-8, 6, lambda _: 0.0, operations, most=TOKENS, max_evaluations=0)
