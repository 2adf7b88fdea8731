"""The privacy budget: pinned values, values that a person can change, and values that do not fit."""

import math

import pytest

from isthmus.edge.own_clips import budget as budgets
from isthmus.edge.own_clips.budget import Budget, BudgetSpent


@pytest.mark.parametrize(("offered", "rounds"), [(0, budgets.DEFAULT_ROUNDS), (2, 2), (100, 15)])
def test_rounds_are_pinned_at_the_first_enrolment(offered: int, rounds: int) -> None:
    first = budgets.pinned(None, offered)
    assert first == Budget(rounds)
    assert budgets.pinned(first, 99) == first, "another enrolment raises nothing"


def test_with_noise_and_no_budget_it_is_rounds_times_noise_once() -> None:
    first = budgets.chosen(Budget(3), rounds=2, noise=0.5, epsilon=None)
    assert first == Budget(3, 1.0)
    assert budgets.chosen(first, rounds=9, noise=2.0, epsilon=None) == first, "a default is not raised by later choices"
    assert budgets.chosen(first, rounds=0, noise=2.0, epsilon=7.0) == Budget(3, 7.0, chosen=True)


def test_a_budget_needs_noise_and_can_be_lifted() -> None:
    with pytest.raises(BudgetSpent, match="--noise"):
        budgets.chosen(Budget(3, 1.0, chosen=True), rounds=0, noise=None, epsilon=None)
    lifted = budgets.chosen(Budget(3, 1.0, chosen=True), rounds=0, noise=None, epsilon=math.inf)
    assert lifted.epsilon == math.inf
    budgets.check(lifted, 1e9, 5.0)


def test_an_upload_that_does_not_fit_is_refused() -> None:
    budget = Budget(3, 0.3)
    already = budgets.spent([0.1, None, 0.1])
    budgets.check(budget, already, 0.1)
    with pytest.raises(BudgetSpent, match=r"0\.3 and 0\.2 of it is spent"):
        budgets.check(budget, already, 0.2)
    budgets.check(budget, already, None)


def test_a_job_is_asked_for_no_more_rounds_than_fit() -> None:
    budget = Budget(3, 2.0, chosen=True)
    assert budgets.affordable_rounds(budget, 1.0, 1.0, 5) == 2
    assert budgets.affordable_rounds(budget, 2.0, 1.0, 5) == 1
    assert budgets.affordable_rounds(budget, 0.0, None, 5) == 5
    assert budgets.allowed_rounds(budget, 0) == 3
    assert budgets.allowed_rounds(budget, 1) == 1
