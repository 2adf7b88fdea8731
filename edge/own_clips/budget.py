"""PURE: how many uploads a person allows, and how much privacy budget (epsilon) they may spend in all.

The budget counts over the device's life: through another personalisation and through enrolling again. Only the person
can raise it. Nothing that a cloud sends changes it.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final

from isthmus.proto.errors import IsthmusError
from isthmus.proto.limits import MAX_ROUNDS

DEFAULT_ROUNDS: Final = 3
"""Rounds of one personalisation if neither the person nor the enrolment names a number."""

MOST_UNASKED_ROUNDS: Final = 15
"""The largest number of rounds that a cloud can name; only a person can ask for more."""

_TOLERANCE: Final = 1e-9


class BudgetSpent(IsthmusError):
    """The person's privacy budget does not allow another upload."""


@dataclass(frozen=True)
class Budget:
    """``rounds``: uploads per personalisation, pinned at the first enrolment; a person can ask for others.

    ``epsilon``: the most that all uploads together may spend; None if no noise was ever asked for. ``chosen``: the
    person set ``epsilon``; otherwise it is rounds times noise, pinned when noise was first asked for.
    """

    rounds: int
    epsilon: float | None = None
    chosen: bool = False


def pinned(known: Budget | None, offered_rounds: int) -> Budget:
    """Return the budget after an enrolment at which the cloud offers this many rounds (0: it names none).

    The number of the first enrolment stays.
    """
    if known is not None:
        return known
    return Budget(min(offered_rounds or DEFAULT_ROUNDS, MOST_UNASKED_ROUNDS))


def chosen(budget: Budget, *, rounds: int, noise: float | None, epsilon: float | None) -> Budget:
    """Return the budget after the person's choices for a run.

    ``rounds`` is the person's number for this run, 0 if none. ``epsilon`` sets the budget; with None a budget that is
    known stays, and the first ``noise`` sets rounds times noise. Raises BudgetSpent for a budget without noise: every
    upload without noise would spend more than any budget.
    """
    if epsilon is not None:
        budget = replace(budget, epsilon=epsilon, chosen=True)
    elif budget.epsilon is None and noise is not None:
        budget = replace(budget, epsilon=allowed_rounds(budget, rounds) * noise)
    if noise is None and budget.chosen and budget.epsilon is not None and math.isfinite(budget.epsilon):
        raise BudgetSpent(
            f"this device has a privacy budget of epsilon {budget.epsilon:g}, so uploads need noise: give --noise, or "
            "lift the budget with --epsilon-budget inf"
        )
    return budget


def allowed_rounds(budget: Budget, asked: int) -> int:
    """Return the uploads that one personalisation may make: the person's number, else the pinned one."""
    return min(asked or budget.rounds, MAX_ROUNDS)


def spent(epsilons: Iterable[float | None]) -> float:
    """Return the epsilon that uploads have spent together (sequential composition); uploads without noise count 0."""
    return math.fsum(epsilon or 0.0 for epsilon in epsilons)


def check(budget: Budget, already: float, noise: float | None) -> None:
    """Raise BudgetSpent if one more upload with this noise would pass the budget."""
    if noise is None or budget.epsilon is None:
        return
    if already + noise > budget.epsilon + _TOLERANCE:
        raise BudgetSpent(
            f"the privacy budget is epsilon {budget.epsilon:g} and {already:g} of it is spent: an upload with epsilon "
            f"{noise:g} does not fit. Nothing is sent. A person can set a larger one with --epsilon-budget"
        )


def affordable_rounds(budget: Budget, already: float, noise: float | None, rounds: int) -> int:
    """Return how many of ``rounds`` uploads the budget allows if the first of them is in ``already``; at least 1."""
    if noise is None or budget.epsilon is None or not math.isfinite(budget.epsilon):
        return rounds
    return max(1, min(rounds, 1 + math.floor((budget.epsilon - already) / noise + _TOLERANCE)))
