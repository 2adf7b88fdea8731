"""PURE: decides which reduction numbers to fine-tune within a budget of time and storage (Prodigy, Alg. 4).

Prodigy is chapter 4 of J. Chen, *Towards Elastic, Robust and Privacy-Preserving AI Model Serving*, PolyU, 2025. A
reduction number is the number of merges per layer, or the per cent pruned. The model of the middle number (about 20)
serves all numbers below it. The interval from it to the largest number is split repeatedly: always the part whose ends
differ most in accuracy.

Where we differ: the paper's pseudocode uses r_new - 1, and numbers that are not in R. Here a new number is the member
of R nearest to the midpoint; of two equally near ones it is the larger, which is cheaper to tune. Costs are predicted,
so every prediction is scaled by the ratio of actual to predicted cost so far. Tuning gets an allowance of seconds: a
model that would exceed it is given up, and its seconds count.

The state is the ordered list of tuned models; everything else follows from it. So a plan can resume from its JSON.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any, Final

FORMAT: Final = 1
UNBOUNDED: Final = math.inf


class BudgetTooSmall(ValueError):
    """The budget is too small for the models at both ends. The message states a sufficient budget."""


@dataclass(frozen=True)
class Cost:
    """The predicted cost of tuning one number."""

    seconds: float
    bytes: int


@dataclass(frozen=True)
class Tuned:
    """The cost of tuning ``number``, and the accuracy of the model at its own number on the profiling set.

    ``accuracy`` None means that tuning was given up when the time budget was spent: there is no model and no bytes.
    """

    number: int
    accuracy: float | None
    seconds: float
    bytes: int
    predicted_s: float


@dataclass(frozen=True)
class Plan:
    """The request, and what was tuned so far, in order.

    ``costs`` holds every number of R; those from ``middle`` to the largest may be tuned. ``probe_s`` is the time of the
    prediction, which counts too. Raises ValueError for impossible numbers or costs, and BudgetTooSmall.
    """

    middle: int
    costs: Mapping[int, Cost]
    time_budget_s: float = UNBOUNDED
    storage_budget_bytes: float = UNBOUNDED
    probe_s: float = 0.0
    tuned: tuple[Tuned, ...] = ()

    def __post_init__(self) -> None:
        if self.middle not in self.costs:
            raise ValueError(f"the middle number {self.middle} is none of {sorted(self.costs)}")
        if min(self.costs) < 0:
            raise ValueError(f"reduction numbers start at 0: {sorted(self.costs)}")
        if self.largest == self.middle:
            raise ValueError(f"no number is above the middle one, {self.middle}")
        for number, cost in self.costs.items():
            if not (0 < cost.seconds < math.inf and cost.bytes > 0):
                raise ValueError(f"the cost of number {number} must be above 0: {cost}")
        if not self.probe_s >= 0:
            raise ValueError(f"the time of the probe must not be negative: {self.probe_s} s")
        ends = [self.costs[number] for number in self.ends]
        least_s = self.probe_s + math.fsum(cost.seconds for cost in ends)
        least_bytes = sum(cost.bytes for cost in ends)
        if not (self.time_budget_s >= least_s and self.storage_budget_bytes >= least_bytes):
            raise BudgetTooSmall(
                f"the models at {self.middle} and {self.largest} alone are predicted to take {least_s:.1f} s (probing "
                f"included) and {least_bytes} bytes; give at least --time-budget-s {math.ceil(least_s)} and "
                f"--storage-budget-bytes {least_bytes}"
            )

    @property
    def largest(self) -> int:
        """The largest number of R."""
        return max(self.costs)

    @property
    def ends(self) -> tuple[int, int]:
        """The ends of the interval that is split."""
        return self.middle, self.largest

    @property
    def models(self) -> tuple[Tuned, ...]:
        """The tuned models (without those that were given up), by number."""
        return tuple(sorted((one for one in self.tuned if one.accuracy is not None), key=lambda one: one.number))

    @property
    def spent_s(self) -> float:
        """The seconds spent so far, including the probe."""
        return self.probe_s + math.fsum(one.seconds for one in self.tuned)

    @property
    def stored_bytes(self) -> int:
        """The bytes of all tuned models."""
        return sum(one.bytes for one in self.models)

    @property
    def allowance_s(self) -> float:
        """The seconds that the next model may take. A model that would take more must be given up."""
        return self.time_budget_s - self.spent_s

    @property
    def overrun(self) -> float:
        """The ratio of actual to predicted cost so far.

        It is 1 before the first model, and never below 1, so that a lucky start does not make predictions optimistic.
        """
        predicted_s = math.fsum(one.predicted_s for one in self.tuned)
        return max(1.0, math.fsum(one.seconds for one in self.tuned) / predicted_s) if predicted_s else 1.0

    def predicted_s(self, number: int) -> float:
        """Returns the predicted seconds of tuning ``number``, scaled by ``overrun``."""
        return self.costs[number].seconds * self.overrun

    def to_json(self) -> str:
        def bound(value: float) -> float | None:
            return None if value == UNBOUNDED else value

        return json.dumps(
            {
                "format": FORMAT,
                "middle": self.middle,
                "costs": {str(number): asdict(cost) for number, cost in sorted(self.costs.items())},
                "time_budget_s": bound(self.time_budget_s),
                "storage_budget_bytes": bound(self.storage_budget_bytes),
                "probe_s": self.probe_s,
                "tuned": [asdict(one) for one in self.tuned],
            },
            indent=1,
        )

    @staticmethod
    def from_json(text: str) -> "Plan":
        """Reads what ``to_json`` wrote. Raises ValueError for other text or another format."""
        try:
            raw: dict[str, Any] = json.loads(text)
            if raw["format"] != FORMAT:
                raise ValueError(f"the plan has format {raw['format']!r}; this version reads format {FORMAT}")
            time_s, stored = raw["time_budget_s"], raw["storage_budget_bytes"]
            return Plan(
                middle=int(raw["middle"]),
                costs={
                    int(number): Cost(float(cost["seconds"]), int(cost["bytes"]))
                    for number, cost in raw["costs"].items()
                },
                time_budget_s=UNBOUNDED if time_s is None else float(time_s),
                storage_budget_bytes=UNBOUNDED if stored is None else float(stored),
                probe_s=float(raw["probe_s"]),
                tuned=tuple(
                    Tuned(
                        int(one["number"]),
                        None if one["accuracy"] is None else float(one["accuracy"]),
                        float(one["seconds"]),
                        int(one["bytes"]),
                        float(one["predicted_s"]),
                    )
                    for one in raw["tuned"]
                ),
            )
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"not a plan: {error!r}") from error


@dataclass(frozen=True)
class Step:
    """What to do next: tune ``number``, or stop (None).

    ``why`` is the reason as text for people. ``interval`` is the part that is split.
    """

    number: int | None
    why: str
    interval: tuple[int, int] | None = None


def next_step(plan: Plan) -> Step:
    """Returns the next step. It depends only on the plan, so a plan that was saved and read back continues the same."""
    if any(one.accuracy is None for one in plan.tuned):
        return Step(None, "the time budget is spent")
    known = {one.number for one in plan.tuned}
    for end in plan.ends:
        if end not in known:
            return Step(end, "an end of the interval")
    by_gap = sorted(
        pairwise(plan.models), key=lambda ends: (-abs(_accuracy(ends[0]) - _accuracy(ends[1])), ends[0].number)
    )
    for low, high in by_gap:
        number = _within(plan, low.number, high.number)
        if number is not None:
            gap = abs(_accuracy(low) - _accuracy(high))
            why = f"between {low.number} and {high.number}, whose accuracies differ by {gap:.1%}"
            return Step(number, why, (low.number, high.number))
    if all(_between(plan, low.number, high.number) == [] for low, high in pairwise(plan.models)):
        return Step(None, "every number is tuned")
    return Step(None, "no further model fits the budget")


def record(plan: Plan, tuned: Tuned) -> Plan:
    """Returns the plan after a model was tuned or given up. Raises ValueError for a number that was not due."""
    due = next_step(plan).number
    if tuned.number != due:
        raise ValueError(f"number {tuned.number} was tuned, but {due} was due")
    if not (tuned.seconds >= 0 and (tuned.accuracy is None or 0 <= tuned.accuracy <= 1)):
        raise ValueError(f"impossible result of tuning: {tuned}")
    return replace(plan, tuned=(*plan.tuned, tuned))


def _accuracy(tuned: Tuned) -> float:
    assert tuned.accuracy is not None
    return tuned.accuracy


def _between(plan: Plan, low: int, high: int) -> list[int]:
    return sorted(number for number in plan.costs if low < number < high)


def _within(plan: Plan, low: int, high: int) -> int | None:
    """Returns the number that splits (low, high), or None.

    It is the number nearest to the midpoint, or the first larger one that both budgets allow.
    """
    candidates = _between(plan, low, high)
    if not candidates:
        return None
    middle = (low + high) / 2
    nearest = min(candidates, key=lambda number: (abs(number - middle), -number))
    for number in candidates[candidates.index(nearest) :]:
        fits_time = plan.spent_s + plan.predicted_s(number) <= plan.time_budget_s
        if fits_time and plan.stored_bytes + plan.costs[number].bytes <= plan.storage_budget_bytes:
            return number
    return None
