"""The exact planner equals brute force; thinned, it stays within its bound; no plan holds an infeasible batch."""

import itertools
import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.cloud.elastic.policies.planning import Candidate, Plan, alg2, alg3, exact, level_for_rate

NOW_S = 10.0


@st.composite
def candidates(draw: st.DrawFn, most_batches: int = 4, most_gammas: int = 3) -> list[Candidate]:
    gammas = draw(st.integers(1, most_gammas))
    batches = []
    for _ in range(draw(st.integers(0, most_batches))):
        count = draw(st.integers(1, 4))
        # Whole hundredths, so that ends and deadlines meet exactly now and then.
        deadlines_N = np.array(sorted(draw(st.lists(st.integers(0, 60), min_size=count, max_size=count)))) / 100
        gains = st.lists(st.integers(0, 9), min_size=gammas, max_size=gammas)
        gains_NG = np.array(draw(st.lists(gains, min_size=count, max_size=count)), dtype=float)
        times_G = np.array(draw(st.lists(st.integers(1, 30), min_size=gammas, max_size=gammas))) / 100
        batches.append(Candidate.of(NOW_S + deadlines_N, gains_NG, times_G, float(gains_NG.mean())))
    return batches


def earned(batches: list[Candidate], levels: tuple[int | None, ...], executors: int = 1) -> tuple[float, float]:
    """Utility and end of running ``levels`` one after another, from the definitions alone."""
    clock_s, utility = NOW_S, 0.0
    for batch, level in zip(batches, levels, strict=True):
        if level is not None:
            end_s = clock_s + float(batch.times_G[level])
            clock_s += float(batch.times_G[level]) / executors
            gains = -np.diff(batch.worth_GM[level])
            utility += sum(float(gain) for gain, due_s in zip(gains, batch.deadlines_N, strict=True) if end_s <= due_s)
    return utility, clock_s


def best(batches: list[Candidate], price_per_s: float, executors: int = 1) -> float:
    every = (
        earned(batches, levels, executors)
        for levels in itertools.product(*([None, *range(len(batch.times_G))] for batch in batches))
    )
    return max(utility - price_per_s * end_s for utility, end_s in every)


def assert_as_told(batches: list[Candidate], plan: Plan, executors: int = 1) -> None:
    utility, end_s = earned(batches, plan.levels, executors)
    assert math.isclose(plan.utility, utility, abs_tol=1e-9)
    assert math.isclose(plan.end_s, end_s, abs_tol=1e-9)


@settings(max_examples=150)
@given(candidates(), st.sampled_from([0.0, 1.0, 20.0]), st.booleans(), st.sampled_from([1, 1, 2, 4]))
def test_exact_equals_brute_force(batches: list[Candidate], price_per_s: float, whole: bool, executors: int) -> None:
    queue = [batch.whole() for batch in batches] if whole else batches
    plan = exact(queue, NOW_S, price_per_s=price_per_s, most_labels=10_000, executors=executors)
    assert plan.loss_bound == 0
    assert_as_told(queue, plan, executors)
    assert math.isclose(plan.utility - price_per_s * plan.end_s, best(queue, price_per_s, executors), abs_tol=1e-6)


@settings(max_examples=150)
@given(candidates(most_batches=6), st.sampled_from([0.0, 5.0]), st.integers(1, 5))
def test_a_thinned_frontier_loses_no_more_than_it_says(
    batches: list[Candidate], price_per_s: float, most_labels: int
) -> None:
    full = exact(batches, NOW_S, price_per_s=price_per_s, most_labels=10_000)
    thin = exact(batches, NOW_S, price_per_s=price_per_s, most_labels=most_labels)
    assert_as_told(batches, thin)
    lost = (full.utility - price_per_s * full.end_s) - (thin.utility - price_per_s * thin.end_s)
    assert -1e-6 <= lost <= thin.loss_bound + 1e-6


@settings(max_examples=150)
@given(candidates(most_batches=6), st.integers(0, 2), st.sampled_from([1, 1, 2, 8]))
def test_no_plan_holds_an_infeasible_batch(batches: list[Candidate], rate_level: int, executors: int) -> None:
    queue = sorted((batch.whole() for batch in batches), key=lambda batch: float(batch.deadlines_N[0]))
    plans = [alg2(queue, NOW_S, executors), exact(queue, NOW_S, executors=executors)]
    if queue:
        plans.append(alg3(queue, NOW_S, min(rate_level, len(queue[0].times_G) - 1), executors=executors))
    for plan in plans:
        clock_s = NOW_S
        for batch, level in zip(queue, plan.levels, strict=True):
            if level is not None:
                assert clock_s + float(batch.times_G[level]) <= batch.deadlines_N[0] + 1e-9
                clock_s += float(batch.times_G[level]) / executors
        assert_as_told(queue, plan, executors)


@settings(max_examples=100)
@given(candidates(most_batches=5), st.sampled_from([1, 1, 3]))
def test_the_papers_planner_never_beats_the_exact_one(batches: list[Candidate], executors: int) -> None:
    queue = sorted((batch.whole() for batch in batches), key=lambda batch: float(batch.deadlines_N[0]))
    found = exact(queue, NOW_S, most_labels=10_000, executors=executors)
    assert alg2(queue, NOW_S, executors).utility <= found.utility + 1e-9


def test_alg2_throws_away_the_earlier_path_and_the_exact_planner_does_not() -> None:
    def batch(due_s: float, times: list[float], gains: list[float]) -> Candidate:
        return Candidate.of(np.array([NOW_S + due_s]), np.array([gains]), np.array(times))

    # The first batch's best gamma leaves no time for the third, for any gamma of the second.
    first, second = batch(1.0, [0.1, 0.9], [9.0, 10.0]), batch(1.05, [0.1, 0.1], [1.0, 1.0])
    queue = [first, second, batch(1.15, [0.9, 0.9], [9.0, 9.0])]
    assert alg2(queue, NOW_S).utility == 11.0
    assert exact(queue, NOW_S).utility == 19.0


@given(st.lists(st.floats(1, 1e4), min_size=1, max_size=8), st.floats(0, 2e4))
def test_the_rate_table_picks_the_largest_gamma_that_keeps_up(capacities: list[float], rate_per_s: float) -> None:
    level = level_for_rate(capacities, rate_per_s)
    keeping_up = [index for index, capacity in enumerate(capacities) if capacity > rate_per_s]
    assert level == max(keeping_up, default=0)
