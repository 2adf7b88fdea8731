"""The fine-tuning planner (Alg. 4): budgets, termination, the exhaustive limit, and a reference of its own writing."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.cloud.warmup.planner import BudgetTooSmall, Cost, Plan, Tuned, next_step, record

BYTES = 100


@st.composite
def worlds(draw: st.DrawFn) -> tuple[tuple[int, ...], int, dict[int, float], dict[int, float]]:
    """R, its middle, what each costs (falling with the number), and the accuracy of each model at its own number."""
    numbers = tuple(sorted(draw(st.sets(st.integers(0, 40), min_size=2, max_size=9))))
    middle = draw(st.sampled_from(numbers[:-1]))
    seconds = sorted((draw(st.integers(1, 50)) for _ in numbers), reverse=True)
    accuracy = {number: draw(st.integers(0, 1000)) / 1000 for number in numbers}
    return numbers, middle, dict(zip(numbers, map(float, seconds), strict=True)), accuracy


def carried_out(plan: Plan, accuracy: dict[int, float], true_s: dict[int, float]) -> Plan:
    """Tune every number that is due. A tuning that would exceed the allowance ends when the allowance is spent."""
    for _ in range(len(plan.costs) + 1):
        number = next_step(plan).number
        if number is None:
            return plan
        predicted_s = plan.predicted_s(number)
        given_up = true_s[number] > plan.allowance_s
        took_s = min(true_s[number], plan.allowance_s)
        share = None if given_up else accuracy[number]
        plan = record(plan, Tuned(number, share, took_s, 0 if given_up else BYTES, predicted_s))
    raise AssertionError("it does not end")


def reference(
    numbers: tuple[int, ...],
    middle: int,
    seconds: dict[int, float],
    accuracy: dict[int, float],
    time_budget_s: float,
    models: float,
) -> list[int]:
    """The rule as in the pseudocode: a list of open intervals, split one after the other."""
    tuned = [middle, numbers[-1]]
    spent = seconds[middle] + seconds[numbers[-1]]
    intervals = [(middle, numbers[-1])]
    while intervals:
        intervals.sort(key=lambda ends: ends[0])
        intervals.sort(key=lambda ends: abs(accuracy[ends[0]] - accuracy[ends[1]]), reverse=True)
        for ends in intervals:
            low, high = ends
            if high - low <= 1 or len(tuned) + 1 > models:
                continue
            inside = [number for number in numbers if low < number < high]
            if not inside:
                continue
            best = math.inf
            new = -1
            for number in inside:
                if abs(2 * number - low - high) <= best:
                    best, new = abs(2 * number - low - high), number
            while new < high and (new not in numbers or spent + seconds[new] > time_budget_s):
                new += 1
            if new < high:
                intervals.remove(ends)
                intervals += [(low, new), (new, high)]
                tuned.append(new)
                spent += seconds[new]
                break
        else:
            return tuned
    return tuned


@given(worlds(), st.integers(0, 300), st.integers(2, 10))
def test_it_is_the_intended_rule(
    world: tuple[tuple[int, ...], int, dict[int, float], dict[int, float]], extra_s: int, models: int
) -> None:
    numbers, middle, seconds, accuracy = world
    budget_s = seconds[middle] + seconds[numbers[-1]] + extra_s
    costs = {number: Cost(seconds[number], BYTES) for number in numbers}
    plan = carried_out(Plan(middle, costs, budget_s, models * BYTES), accuracy, seconds)
    assert [one.number for one in plan.tuned] == reference(numbers, middle, seconds, accuracy, budget_s, models)


@given(worlds(), st.integers(0, 300), st.integers(2, 10), st.floats(0, 5), st.data())
def test_no_budget_is_ever_exceeded_and_it_ends(
    world: tuple[tuple[int, ...], int, dict[int, float], dict[int, float]],
    extra_s: int,
    models: int,
    probe_s: float,
    data: st.DataObject,
) -> None:
    numbers, middle, seconds, accuracy = world
    budget_s = probe_s + seconds[middle] + seconds[numbers[-1]] + extra_s + 1e-9  # in any order of summing
    true_s = {number: seconds[number] * data.draw(st.floats(0.3, 3)) for number in numbers}
    costs = {number: Cost(seconds[number], BYTES) for number in numbers}
    plan = carried_out(Plan(middle, costs, budget_s, models * BYTES + 50, probe_s), accuracy, true_s)
    assert plan.spent_s <= budget_s * (1 + 1e-12)
    assert plan.stored_bytes <= models * BYTES + 50
    assert len({one.number for one in plan.tuned}) == len(plan.tuned)
    assert all(one.accuracy is not None for one in plan.tuned[:-1])


@given(worlds())
def test_without_budgets_it_becomes_exhaustive(
    world: tuple[tuple[int, ...], int, dict[int, float], dict[int, float]],
) -> None:
    numbers, middle, seconds, accuracy = world
    plan = carried_out(
        Plan(middle, {number: Cost(seconds[number], BYTES) for number in numbers}), accuracy, dict(seconds)
    )
    assert [one.number for one in plan.models] == [number for number in numbers if number >= middle]
    assert next_step(plan).why == "every number is tuned"


@given(worlds(), st.integers(0, 300), st.integers(0, 8))
def test_a_plan_read_back_goes_on_as_it_would_have(
    world: tuple[tuple[int, ...], int, dict[int, float], dict[int, float]], extra_s: int, steps: int
) -> None:
    numbers, middle, seconds, accuracy = world
    costs = {number: Cost(seconds[number], BYTES) for number in numbers}
    plan = Plan(middle, costs, seconds[middle] + seconds[numbers[-1]] + extra_s)
    whole = carried_out(plan, accuracy, seconds)
    part = replace(plan, tuned=whole.tuned[:steps])
    assert Plan.from_json(part.to_json()) == part
    assert carried_out(Plan.from_json(part.to_json()), accuracy, seconds) == whole


def test_a_model_that_was_given_up_ends_the_plan() -> None:
    costs = {number: Cost(1.0, 1) for number in (0, 5, 9)}
    plan = record(Plan(0, costs, time_budget_s=2.0), Tuned(0, None, 2.0, 0, 1.0))
    assert next_step(plan).number is None and plan.models == ()


def test_an_over_run_makes_the_planner_careful() -> None:
    costs = {number: Cost(10.0, 1) for number in (0, 10, 20)}
    plan = Plan(0, costs, time_budget_s=45)
    for number in (0, 20):
        plan = record(plan, Tuned(number, 0.5, 15.0, 1, 10.0))
    assert plan.overrun == 1.5
    assert next_step(plan).number == 10
    step = next_step(replace(plan, time_budget_s=44))
    assert (step.number, step.why) == (None, "no further model fits the budget")


def test_a_budget_that_cannot_hold_both_ends_is_refused_with_one_that_does() -> None:
    costs = {number: Cost(10.0 - number / 10, 7) for number in (0, 10, 20, 30)}
    for budgets in ((14.9, math.inf), (math.inf, 13)):
        with pytest.raises(BudgetTooSmall, match=r"20 and 30 .* --time-budget-s 15 .*--storage-budget-bytes 14"):
            Plan(20, costs, *budgets)
    Plan(20, costs, 15.0, 14)


def test_what_cannot_be_planned_is_refused() -> None:
    costs = {0: Cost(1.0, 1), 5: Cost(1.0, 1)}
    for middle, given_costs, match in (
        (3, costs, "middle number 3"),
        (5, costs, "no number is above"),
        (0, {**costs, 9: Cost(0.0, 1)}, "cost of number 9"),
        (0, {**costs, -1: Cost(1.0, 1)}, "start at 0"),
    ):
        with pytest.raises(ValueError, match=match):
            Plan(middle, given_costs)
    plan = Plan(0, costs)
    with pytest.raises(ValueError, match="but 0 was due"):
        record(plan, Tuned(5, 0.5, 1.0, 1, 1.0))
    with pytest.raises(ValueError, match="impossible result"):
        record(plan, Tuned(0, 1.5, 1.0, 1, 1.0))
    for text in ("{}", "[]", "x", plan.to_json().replace('"format": 1', '"format": 2')):
        with pytest.raises(ValueError, match="plan"):
            Plan.from_json(text)
