"""Hulls and prices against their definitions."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from isthmus.cloud.elastic.policies.pricing import Market, hull

costs = st.lists(st.integers(1, 20).map(float), min_size=1, max_size=6)


@given(costs, st.data(), st.floats(0, 12))
def test_at_a_price_the_hull_buys_the_best_gamma(costs_s: list[float], data: st.DataObject, price: float) -> None:
    gains = data.draw(st.lists(st.integers(0, 20).map(float), min_size=len(costs_s), max_size=len(costs_s)))
    slopes = [slope for slope, _, _ in hull(costs_s, gains)]
    assert slopes == sorted(slopes, reverse=True)
    assert all(slope > 0 for slope in slopes)
    level = Market(costs_s, [gains]).level(0, price)
    bought = 0.0 if level is None else gains[level] - price * costs_s[level]
    best = max([0.0, *(gain - price * cost for gain, cost in zip(gains, costs_s, strict=True))])
    assert np.isclose(bought, best, atol=1e-9)


@given(costs, st.data(), st.floats(0.1, 500))
def test_the_price_is_where_demand_meets_the_time_there_is(
    costs_s: list[float], data: st.DataObject, seconds: float
) -> None:
    rows = st.lists(st.integers(0, 20).map(float), min_size=len(costs_s), max_size=len(costs_s))
    gains_KG = data.draw(st.lists(rows, min_size=1, max_size=4))
    counts_K = np.array(data.draw(st.lists(st.integers(0, 9), min_size=len(gains_KG), max_size=len(gains_KG))), float)
    market = Market(costs_s, gains_KG)
    price = market.price(counts_K, seconds)

    def demand_s(at: float) -> float:
        levels = [market.level(kind, at) for kind in range(len(gains_KG))]
        return sum(count * costs_s[level] for count, level in zip(counts_K, levels, strict=True) if level is not None)

    # Just above the price what is asked for fits; just below it, it would not.
    assert demand_s(price * (1 + 1e-9) + 1e-9) < seconds + 1e-6
    if price > 0:
        assert demand_s(price * (1 - 1e-9)) >= seconds - 1e-6


def test_nothing_to_sell_has_no_price() -> None:
    assert Market([1.0], []).price(np.array([]), 1.0) == 0.0
    assert Market([1.0], [[0.0]]).level(0, 0.0) is None
