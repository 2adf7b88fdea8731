"""How many executors a load needs: added at once, removed after a window, and no swinging back and forth."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.cloud.elastic.policies.by_name import make_policy
from isthmus.cloud.elastic.scheduling.engine import Engine
from isthmus.cloud.elastic.scheduling.profile import paper_profile
from isthmus.cloud.elastic.scheduling.scaling import Load, Scale, Scaler, ScaleRule, full_image_s, scaled
from isthmus.cloud.elastic.scheduling.simulate import Growing, draws, simulate
from isthmus.cloud.elastic.scheduling.workload import PAPER_KINDS, make_queries, poisson_arrivals

RULE = ScaleRule(least=1, most=8)


def followed(
    offered: list[float], rule: ScaleRule = RULE, every_s: float = 1.0, waits_s: float = 0.0
) -> list[tuple[float, int]]:
    """Returns (time, executors) at each change, for a load in executors that is given at each step."""
    state, changes = Scale.begin(rule, 0.0), []
    for step, load in enumerate(offered, 1):
        after = scaled(rule, state, Load(load * every_s, waits_s), step * every_s)
        if after.executors != state.executors:
            changes.append((step * every_s, after.executors))
        state = after
    return changes


def reversals(changes: list[tuple[float, int]], first: int = 1) -> list[tuple[float, int]]:
    """Returns (time, direction) of each change that goes the other way than the one before it."""
    found, before, direction = [], first, 0
    for at_s, number in changes:
        now = 1 if number > before else -1
        if direction and now != direction:
            found.append((at_s, now))
        before, direction = number, now
    return found


def test_a_step_to_four_times_the_load_is_followed_within_ten_seconds_and_kept_for_a_window() -> None:
    changes = followed([0.5] * 300 + [2.0] * 300 + [0.5] * 1_500)
    first_s = next(at_s for at_s, _ in changes)
    assert 300 < first_s <= 310
    assert max(number for at_s, number in changes if at_s <= 310) == 3
    downs = [at_s for at_s, number in changes if number == 1]
    assert len(downs) == 1 and 1_200 <= downs[0] <= 1_220, "ten minutes after the last time that three were needed"
    assert len(reversals(changes)) == 1


def test_a_load_that_varies_by_chance_changes_the_number_once() -> None:
    """20 images per second, 31 of which fill an executor: within seconds chance alone asks for a second one."""
    rng = np.random.default_rng(0)
    changes = followed((rng.poisson(20, 7_200) / 31).tolist())
    assert [number for _, number in changes] == [2]


def test_what_waits_asks_for_executors_too() -> None:
    assert followed([0.5] * 10) == []
    assert followed([0.5] * 10, waits_s=10.0)[0] == (1.0, 3), "10 s of work within 5 s, and a little of what arrives"


@pytest.mark.parametrize("period_s", [20, 60, 120, 300, 900])
def test_a_load_that_swings_faster_than_the_window_keeps_what_its_peaks_need(period_s: int) -> None:
    wave = ([0.5] * (period_s // 2) + [3.0] * (period_s // 2)) * (7_200 // period_s)
    changes = followed(wave)
    assert all(number > before for (_, before), (_, number) in zip([(0, 1), *changes], changes, strict=False))


def test_removals_that_were_wrong_wait_longer() -> None:
    """Peaks every 25 minutes, longer than the window: the first removals are taken back, and then no more are made."""
    wave = ([3.0] * 60 + [0.5] * 1_440) * 16
    changes = followed(wave)
    removed = [at_s for at_s, direction in reversals(changes) if direction < 0]
    assert removed and all(later - earlier > 600 for earlier, later in itertools.pairwise(removed))


@given(st.lists(st.tuples(st.integers(1, 900), st.floats(0, 12)), min_size=1, max_size=12), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_any_load_is_met_at_once_and_no_removal_follows_an_addition_within_a_window(
    plan: list[tuple[int, float]], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    offered = [load * noise for seconds, load in plan for noise in rng.gamma(20, 1 / 20, seconds)]
    state, added_s = Scale.begin(RULE, 0.0), -np.inf
    for step, load in enumerate(offered, 1):
        after = scaled(RULE, state, Load(load, 0.0), float(step))
        assert RULE.least <= after.executors <= RULE.most
        assert after.executors >= min(RULE.most, after.offered / RULE.target), "enough for the present load"
        if after.executors > state.executors:
            added_s = step
        elif after.executors < state.executors:
            assert step - added_s >= RULE.window_s
        assert len(after.needs) <= RULE.most, "the state stays small"
        state = after


def test_a_clock_that_stands_or_goes_back_changes_nothing() -> None:
    state = scaled(RULE, Scale.begin(RULE, 5.0), Load(3.0, 0.0), 6.0)
    assert scaled(RULE, state, Load(100.0, 100.0), 6.0) == state
    assert scaled(RULE, state, Load(100.0, 100.0), 2.0) == state


def test_the_scaler_counts_from_totals() -> None:
    profile = paper_profile()
    scaler = Scaler(ScaleRule(most=4), profile, 0.0)
    per_s = 2 / full_image_s(profile)  # two executors' worth
    for second in range(1, 30):
        scaler.look(round(per_s * second), 0, float(second))
    assert scaler.wanted == 3, "two of three are 67 % busy"
    assert scaler.look(round(per_s * 30), 0, 30.0, pace=1.5) == 3
    for second in range(31, 60):
        scaler.look(round(per_s * second), 0, float(second), pace=1.5)
    assert scaler.wanted == 4, "batches take longer than the profile says"


@pytest.mark.parametrize(
    "wrong",
    [
        {"least": 0},
        {"least": 3, "most": 2},
        {"target": 0.0},
        {"target_after": 0.9},
        {"target": 1.5},
        {"drain_s": 0.0},
        {"window_s": -1.0},
    ],
)
def test_rules_that_make_no_sense_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError):
        ScaleRule(**wrong)  # type: ignore[arg-type]


def test_executors_that_grow_with_the_load_earn_what_many_fixed_ones_do() -> None:
    """One engine, simulated: a load of 0.6 that becomes 2.4. New executors take 5 s to start."""
    profile = paper_profile().slowed(4)
    rng = np.random.default_rng(0)
    rate_T = np.concatenate([np.full(30, 0.6), np.full(60, 2.4)]) * profile.capacity_per_s(0)
    queries = make_queries(rng, poisson_arrivals(rng, rate_T), PAPER_KINDS)
    luck_N = draws(rng, len(queries))

    def earned(executors: int, most: int) -> tuple[float, list[tuple[float, int]]]:
        engine = Engine(profile, make_policy("priced", profile), executors=executors)
        growing = Growing(Scaler(ScaleRule(executors, most), profile, 0.0), start_s=5.0)
        run = simulate(engine, queries, luck_N, growing=growing)
        assert all(outcome is not None for outcome in run.outcomes) and engine.executors == growing.scaler.wanted
        return run.expected_utility, growing.changes

    one, none = earned(1, 1)
    grown, changes = earned(1, 4)
    four, _ = earned(4, 4)
    assert none == [] and 30 < changes[0][0] <= 40
    assert one < grown <= 1.001 * four and (grown - one) > 0.7 * (four - one)
