"""The knapsack of soups against every subset there is."""

from itertools import chain, combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.cloud.warmup.knapsack import Item, pack

ITEMS = st.lists(st.builds(Item, st.floats(-0.1, 0.3), st.integers(0, 30)), min_size=0, max_size=8)


@given(ITEMS, st.integers(0, 120))
def test_it_is_the_best_of_all_subsets(items: list[Item], budget: int) -> None:
    named = {str(index): item for index, item in enumerate(items)}
    chosen = pack(named, budget)
    assert sum(named[name].bytes for name in chosen) <= budget
    every = chain.from_iterable(combinations(named, size) for size in range(len(named) + 1))
    best = max(
        sum(named[name].gain for name in some) for some in every if sum(named[name].bytes for name in some) <= budget
    )
    assert sum(named[name].gain for name in chosen) == pytest.approx(best, abs=1e-12)
    assert list(chosen) == [name for name in named if name in chosen]
    assert all(named[name].gain > 0 for name in chosen)


def test_an_unbounded_budget_keeps_all_that_gains() -> None:
    assert pack({"a": Item(0.1, 5), "b": Item(0.0, 1), "c": Item(0.2, 9)}, float("inf")) == ("a", "c")
    with pytest.raises(ValueError, match="negative bytes"):
        pack({"a": Item(0.1, -5)}, 3)
