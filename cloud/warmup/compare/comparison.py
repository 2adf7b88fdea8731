"""PURE: compares warm-up methods: accuracy, cost, and the share of the lost accuracy that was recovered.

A method is a set of models. At each number it uses the model that is best on the profiling set, and is judged on the
test set. Tables hold accuracy by model and number.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from isthmus.cloud.elastic.warm.profiled import Profiled
from isthmus.cloud.warmup.planner import Plan, Tuned, next_step, record

LOST: Final = 0.03
"""``won_back`` is reported at numbers where the vanilla model loses at least this much accuracy against number 0."""
METHODS: Final = ("clipper", "otas", "maxprune", "exhaustive", "prodigy", "prodigy+soups")


@dataclass(frozen=True)
class Measured:
    """One model of a grid: accuracy by number on both sets, and the seconds of tuning (0 for vanilla and soups)."""

    profiling: Mapping[int, float]
    test: Mapping[int, float]
    seconds: float = 0.0


def replayed(plan: Plan, tuned: Mapping[int, Measured]) -> Plan:
    """Returns what the planner would have tuned, given the measured costs and accuracies of every number."""
    while (number := next_step(plan).number) is not None:
        found, predicted_s = tuned[number], plan.predicted_s(number)
        given_up = found.seconds > plan.allowance_s
        took_s = min(found.seconds, plan.allowance_s)
        stored = 0 if given_up else plan.costs[number].bytes
        share = None if given_up else found.profiling[number]
        plan = record(plan, Tuned(number, share, took_s, stored, predicted_s))
    return plan


def picked(models: Mapping[str, Measured], number: int, pictures: int) -> str:
    """Returns the best model at ``number`` by the profiling set of ``pictures`` pictures, chosen as a server does."""
    return Profiled({name: of.profiling for name, of in models.items()}, pictures).ranked(number)[0]


def by_method(
    vanilla: Measured,
    tuned: Mapping[int, Measured],
    planned: Sequence[int],
    soups: Mapping[str, Measured],
    pictures: int = 0,
) -> dict[str, dict[int, float]]:
    """Returns the test accuracy of each method by number. ``pictures`` is the size of the profiling set.

    - clipper: the vanilla model with all tokens at every number.
    - otas: the vanilla model.
    - maxprune: only the model tuned at the largest number.
    - exhaustive: the vanilla model and all tuned models.
    - prodigy: the vanilla model and the planned models.
    - prodigy+soups: the same, and the kept soups of the planned models.
    """
    numbers = sorted(vanilla.test)
    base = {"vanilla": vanilla}
    every = {f"tuned-{number}": of for number, of in tuned.items()}
    some = {f"tuned-{number}": tuned[number] for number in planned}
    sets: dict[str, Mapping[str, Measured]] = {
        "otas": base,
        "maxprune": {"max": tuned[max(tuned)]},
        "exhaustive": {**base, **every},
        "prodigy": {**base, **some},
        "prodigy+soups": {**base, **some, **soups},
    }
    found = {
        method: {number: models[picked(models, number, pictures)].test[number] for number in numbers}
        for method, models in sets.items()
    }
    return {"clipper": dict.fromkeys(numbers, vanilla.test[0]), **found}


def compared(accuracy: Mapping[str, Mapping[int, float]], plan: Plan, tuned: Mapping[int, Measured]) -> dict[str, Any]:
    """Returns the figures of one seed.

    ``won_back[method][number]`` is the recovered share of the accuracy that otas loses against number 0, at numbers
    where this loss is at least LOST. ``cost_at_0`` is what a method loses at number 0 against the vanilla model.
    """
    vanilla = accuracy["otas"]
    means = {method: statistics.fmean(shares.values()) for method, shares in accuracy.items()}
    exhaustive_s = math.fsum(of.seconds for of in tuned.values())
    losing = [number for number in vanilla if vanilla[0] - vanilla[number] >= LOST]
    return {
        "mean_accuracy": means,
        "of_exhaustive": {method: mean / means["exhaustive"] for method, mean in means.items()},
        "won_back": {
            method: {number: (shares[number] - vanilla[number]) / (vanilla[0] - vanilla[number]) for number in losing}
            for method, shares in accuracy.items()
            if method not in ("clipper", "otas")
        },
        "cost_at_0": {method: vanilla[0] - shares[0] for method, shares in accuracy.items()},
        "exhaustive_s": exhaustive_s,
        "planned_s": plan.spent_s,
        "cost_share": plan.spent_s / exhaustive_s if exhaustive_s else 0.0,
        "prediction_errors": {one.number: one.seconds / one.predicted_s - 1 for one in plan.tuned},
        "vanilla_loses_most": max(vanilla[0] - share for share in vanilla.values()),
    }


def with_time_share(plan: Plan, tuned: Mapping[int, Measured], share: float) -> Plan:
    """Returns ``plan`` with a time budget of ``share`` of the time of tuning every number. Raises BudgetTooSmall."""
    return replace(plan, time_budget_s=share * math.fsum(of.seconds for of in tuned.values()))
