"""Plans follow the time that batches really take."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.cloud.elastic.policies.by_name import POLICIES, make_policy
from isthmus.cloud.elastic.scheduling.engine import Engine, Work
from isthmus.cloud.elastic.scheduling.pace import (
    CLEARLY,
    CUSHION,
    FORGET_S,
    LEAST_KEPT,
    LEAST_SIZE,
    MOST,
    STEP,
    Pace,
    Paces,
)
from isthmus.cloud.elastic.scheduling.profile import paper_profile
from isthmus.cloud.elastic.scheduling.query import IN_TIME, Outcome, Query
from isthmus.cloud.elastic.scheduling.simulate import Run, draws, simulate
from isthmus.cloud.elastic.scheduling.workload import queries_at_load, wandering_rates

PROFILE = paper_profile()


def ran(pace: Pace, ratios: list[float], profiled_s: float = 0.1) -> float:
    for ratio in ratios:
        pace.ran(64, profiled_s, ratio * profiled_s)
    return pace.factor


@pytest.mark.parametrize("truth", [0.6, 1.0, 1.3, 3.0])
def test_it_finds_a_machine_that_is_slower_or_faster(truth: float) -> None:
    assert ran(Pace(), [truth] * 100) == pytest.approx(truth, rel=1.1 * STEP)


def test_times_that_vary_are_allowed_for_by_their_mean_deviation() -> None:
    found = ran(Pace(), [0.9, 1.1] * 200)
    assert found == pytest.approx(1 + 0.1 * CUSHION, rel=2 * STEP)


def test_as_long_as_the_profile_is_right_nothing_changes() -> None:
    pace = Pace()
    assert not any(pace.ran(size, 0.01 * size, 0.01 * size * (1 + 1e-9)) for size in range(1, 65))
    assert pace.factor == 1


def test_a_few_images_do_not_say_that_a_machine_is_slow() -> None:
    pace = Pace()
    assert not any(pace.ran(LEAST_SIZE - 1, 0.1, 0.3) for _ in range(100))
    assert pace.ran(LEAST_SIZE, 0.1, 0.3)


@given(st.floats(1.5, 4.0), st.floats(0.1, 4.0), st.integers(1, LEAST_SIZE - 1))
def test_a_few_images_say_that_it_is_slow_no_more_but_never_that_it_is_fast(was: float, now: float, size: int) -> None:
    pace = Pace()
    slow = ran(pace, [was] * 100)
    for _ in range(100):
        before = pace.factor
        pace.ran(size, 0.1, now * 0.1)
        assert 1 <= pace.factor <= before
    small = max(now, 1.0)
    assert pace.factor == slow if small > slow * CLEARLY else pace.factor <= small / CLEARLY * (1 + 2 * STEP)
    pace = Pace()
    assert ran(pace, [0.5] * 100) < 0.6 and not pace.ran(size, 0.1, now * 0.1)


@given(st.floats(0.3, 4.0))
def test_what_was_slow_is_forgotten_by_halves_and_soon_learned_again(was: float) -> None:
    pace = Pace()
    before = ran(pace, [was] * 100)
    steps = 0
    while pace.forget():
        steps += 1
        assert pace.factor == 1 or pace.factor == pytest.approx(1 + (before - 1) / 2**steps)
    assert pace.factor == min(before, 1.0) and steps <= 7
    if was > 1.5:
        assert ran(pace, [was] * 20, profiled_s=0.01) > 0.9 * was


def test_only_executors_that_run_nothing_forget() -> None:
    paces = Paces(range(3))
    for executor in range(3):
        slow(paces, executor, 3.0)
    factor = paces.factor(0)
    assert not paces.forget(0.0, {2})
    assert paces.ran(0, 1, 0.1, 0.3, FORGET_S - 1) is False, "too small to say more than that it runs"
    assert not paces.forget(FORGET_S - 1, {2})
    assert paces.forget(FORGET_S + 1, {2})
    assert [paces.factor(executor) for executor in range(3)] == [factor, 1 + (factor - 1) / 2, factor]
    assert not paces.forget(FORGET_S + 2, ()), "half at a time"
    assert paces.forget(3.5 * FORGET_S, ())
    assert paces.factor(1) == 1 + (factor - 1) / 8 and paces.factor(2) == 1 + (factor - 1) / 4
    assert not paces.forget(0.0, ()), "a clock that goes back"
    paces.forget(1e9, ())
    assert [paces.factor(executor) for executor in range(3)] == [1, 1, 1]


@given(st.lists(st.tuples(st.integers(1, 64), st.floats(1e-4, 10), st.floats(0, 1e6), st.booleans()), max_size=60))
def test_no_clock_carries_it_away(batches: list[tuple[int, float, float, bool]]) -> None:
    pace = Pace()
    for size, profiled_s, took_s, forgets in batches:
        pace.ran(size, profiled_s, took_s)
        if forgets:
            pace.forget()
        assert (1 - STEP) / MOST <= pace.factor <= (MOST + CUSHION * MOST) * (1 + STEP)


def test_one_stray_batch_is_soon_forgotten() -> None:
    pace = Pace()
    struck = ran(pace, [1e6])
    assert struck <= 1 + (1 + CUSHION) * (MOST - 1) * (1 - LEAST_KEPT)
    assert ran(pace, [1.0] * 60) == pytest.approx(1, rel=2 * STEP)


def served(policy: str, *, adapts: bool, factor: float) -> Run:
    rng = np.random.default_rng(3)
    queries = queries_at_load(rng, wandering_rates(rng, 10.0), 1.0, PROFILE)

    def takes_s(work: Work) -> float:
        return factor * PROFILE.batch_time_s(work.gamma, len(work.batch))

    engine = Engine(PROFILE, make_policy(policy, PROFILE), adapts=adapts)
    return simulate(engine, queries, draws(np.random.default_rng(4), len(queries)), takes_s)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_right_profile_is_served_as_if_nobody_looked(policy: str) -> None:
    assert served(policy, adapts=True, factor=1.0) == served(policy, adapts=False, factor=1.0)


@pytest.mark.parametrize("policy", ["priced", "exact", "otas"])
def test_on_a_slower_machine_fewer_are_late_and_more_is_earned(policy: str) -> None:
    blind, seeing = (served(policy, adapts=adapts, factor=1.4) for adapts in (False, True))
    assert blind.share(Outcome.LATE) > 0.02
    assert seeing.share(Outcome.LATE) < 0.2 * blind.share(Outcome.LATE)
    assert seeing.expected_utility > 1.02 * blind.expected_utility


def slow(paces: Paces, executor: int, ratio: float) -> None:
    for _ in range(100):
        paces.of(executor).ran(64, 0.1, ratio * 0.1)


@given(st.lists(st.floats(0.3, 3.0), min_size=1, max_size=8))
def test_executors_of_any_speed_add_up(ratios: list[float]) -> None:
    paces = Paces(range(len(ratios)))
    for executor, ratio in enumerate(ratios):
        slow(paces, executor, ratio)
    factors = [paces.factor(executor) for executor in paces.able]
    together = sum(1 / factor for factor in factors)
    for executor, factor in enumerate(factors):
        assert paces.alike(executor) == pytest.approx(together * factor)
        assert paces.alike(executor) >= 1
    assert paces.mean == pytest.approx(len(factors) / together)
    assert factors[paces.fastest(paces.able)] == min(factors)


@given(st.integers(1, 64), st.floats(0.3, 3.0))
def test_equal_executors_count_exactly_as_many(count: int, ratio: float) -> None:
    paces = Paces(range(count))
    for executor in paces.able:
        slow(paces, executor, ratio)
    assert all(paces.alike(executor) == count for executor in paces.able)
    assert paces.mean == pytest.approx(paces.factor(0), rel=1e-15) and paces.fastest(paces.able) == 0


@given(st.floats(0.3, 3.0))
def test_one_executor_is_planned_with_exactly_its_own_pace(ratio: float) -> None:
    paces = Paces([0])
    slow(paces, 0, ratio)
    assert (paces.mean, paces.alike(0)) == (paces.factor(0), 1)


def test_a_new_executor_starts_at_the_median_pace_and_a_known_one_keeps_its_own() -> None:
    paces = Paces(range(3))
    for executor, ratio in enumerate((1.0, 1.5, 3.0)):
        slow(paces, executor, ratio)
    paces.count_on([0, 3])
    assert paces.factor(3) == paces.factor(1) and paces.able == (0, 3)
    slow(paces, 3, 1.0)
    paces.count_on(range(4))
    assert paces.factor(2) == pytest.approx(3, rel=0.1) and paces.factor(1) > 1.4 > paces.factor(3)
    with pytest.raises(ValueError, match="at least 1"):
        paces.count_on([])
    with pytest.raises(KeyError):
        paces.of(7)


def uneven(policy: str, paces: type[Paces]) -> Run:
    """Two executors at load 1.5, of which the second takes three times as long."""
    rng = np.random.default_rng(3)
    queries = queries_at_load(rng, wandering_rates(rng, 6.0), 1.5 * 4 / 3, PROFILE)

    def takes_s(work: Work) -> float:
        return (1.0, 3.0)[work.executor] * PROFILE.batch_time_s(work.gamma, len(work.batch))

    engine = Engine(PROFILE, make_policy(policy, PROFILE), executors=2, paces=paces)
    return simulate(engine, queries, draws(np.random.default_rng(4), len(queries)), takes_s)


class OnePace(Paces):
    def of(self, executor: int) -> Pace:
        return super().of(0)


@pytest.mark.parametrize("policy", ["priced", "otas", "throughput"])
def test_a_pace_for_each_of_two_uneven_executors_earns_more_than_one_for_both(policy: str) -> None:
    own, one = uneven(policy, Paces), uneven(policy, OnePace)
    assert own.expected_utility > 1.01 * one.expected_utility
    assert own.share(Outcome.LATE) < 0.03


@pytest.mark.parametrize("executors", [1, 2])
@pytest.mark.parametrize("policy", ["priced", "otas"])
def test_after_a_slow_spell_an_executor_is_as_good_as_before(policy: str, executors: int) -> None:
    """With a requested latency of little more than a batch takes, plans give a slow executor nothing, or too little."""
    spell_s, per_s = 4.0, 600
    times_s = {gamma: (0.010, 0.030 - 0.0004 * place) for place, gamma in enumerate(reversed(PROFILE.gammas))}
    profile = replace(PROFILE, latency_s=times_s)
    arrivals_s = np.arange(per_s * executors * 22) / (per_s * executors)
    queries = [Query(id, "CIFAR10", at_s, at_s + 0.045, 1.0) for id, at_s in enumerate(arrivals_s.tolist())]
    last = executors - 1

    def takes_s(work: Work) -> float:
        slower = 4.0 if work.executor == last and work.started_s < spell_s else 1.0
        return slower * profile.batch_time_s(work.gamma, len(work.batch))

    engine = Engine(profile, make_policy(policy, profile), executors=executors)
    run = simulate(engine, queries, draws(np.random.default_rng(4), len(queries)), takes_s)
    during, after = run.outcomes[: round(spell_s * per_s)], run.outcomes[-round(4.0 * per_s) :]
    assert sum(outcome not in IN_TIME for outcome in during) > 0.02 * len(during), "it was slow"
    assert sum(outcome in IN_TIME for outcome in after) >= 0.99 * len(after)
    assert engine.pace_of(last) < 1 / CLEARLY * (1 + 2 * STEP)
