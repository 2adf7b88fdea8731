"""PURE: decides which warmed model serves which reduction number, and makes a profile with the warmed accuracies.

Before serving, every kept model is profiled at every reduction number, and the best model per number is noted. Where we
differ from chapter 4 of J. Chen's thesis (PolyU, 2025): the vanilla model stays unless another model beats it by more
than the noise of the profiling set. Any policy of elastic serving can plan with the resulting profile.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Final

from isthmus.cloud.elastic.scheduling.profile import Profile

Table = Mapping[str, Mapping[int, float]]
"""Accuracy by model and reduction number, on the profiling set."""


VANILLA: Final = "vanilla"
"""The name of the unwarmed model in a store."""


@dataclass(frozen=True)
class Profiled:
    """Accuracy by model and reduction number, measured on ``pictures`` pictures (0: unknown)."""

    accuracy: Table
    pictures: int = 0

    def ranked(self, number: int) -> tuple[str, ...]:
        """Returns the models that were profiled at ``number``, best first, equal ones by name.

        The vanilla model is first unless the best model is ahead of it by more than one standard error of the accuracy
        on ``pictures`` (the rule of Breiman et al. 1984, "Classification and Regression Trees", section 3.4.3). With
        few merges there is little to win back, and the luckiest of many tuned models looks better than it is. If
        ``pictures`` is unknown, this rule is not applied.
        """
        known = {name: shares[number] for name, shares in self.accuracy.items() if number in shares}
        order = sorted(known, key=lambda name: (-known[name], name))
        if VANILLA in known and self.pictures:
            best = known[order[0]]
            if best - known[VANILLA] <= math.sqrt(best * (1 - best) / self.pictures):
                order.remove(VANILLA)
                order.insert(0, VANILLA)
        return tuple(order)

    def best(self) -> dict[int, str]:
        """Returns the best model of each number (see ``ranked``), by ascending number."""
        numbers = sorted({number for shares in self.accuracy.values() for number in shares})
        return {number: self.ranked(number)[0] for number in numbers}

    def warmed(self, gammas: Collection[int]) -> dict[int, float]:
        """Returns the best model's accuracy at each profiled gamma of 0 or below. Gamma is minus the number."""
        best = self.best()
        return {gamma: self.accuracy[best[-gamma]][-gamma] for gamma in gammas if gamma <= 0 and -gamma in best}


def warmed_profile(profile: Profile, task: str, models: Profiled) -> Profile:
    """Returns ``profile`` with the warmed accuracies of ``task`` and the model that each of them belongs to.

    Above gamma 0 nothing changes, because prompts belong to the model they were learned with. Raises ValueError if a
    gamma of 0 or below was not profiled, because it would be planned with the vanilla model's accuracy.
    """
    warmed = models.warmed(profile.gammas)
    missing = [gamma for gamma in profile.gammas if gamma <= 0 and gamma not in warmed]
    if missing:
        raise ValueError(
            f"the warmed models were not profiled at {', '.join(str(-gamma) for gamma in missing)}, and the profile "
            f"has gamma {', '.join(map(str, missing))}: run 'isthmus elastic warmup run' with these among its numbers"
        )
    best = models.best()
    before = profile.accuracy.get(task, dict.fromkeys(profile.gammas, 0.0))
    return replace(
        profile.with_task(task, {**before, **warmed}),
        models={**profile.models, task: {gamma: best[-gamma] for gamma in warmed}},
    )
