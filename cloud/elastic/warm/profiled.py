"""PURE: which warmed model serves which reduction number, and a profile that plans with the warmed accuracies.

Offline, every kept model is profiled at every reduction number, and the best model of each number is noted. Where we
differ from chapter 4 of Chen 2025: the vanilla model stays unless another beats it by more than the noise of the
profiling set. Any policy of elastic serving can then plan on a profile that holds the warmed accuracies.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Final

from isthmus.cloud.elastic.scheduling.profile import Profile

Table = Mapping[str, Mapping[int, float]]
"""Accuracy by model and reduction number, on the profiling set."""


VANILLA: Final = "vanilla"
"""The model that is warmed, among the warmed ones."""


@dataclass(frozen=True)
class Profiled:
    """Models as they were profiled: accuracy by model and reduction number, on so many pictures (0: not known)."""

    accuracy: Table
    pictures: int = 0

    def ranked(self, number: int) -> tuple[str, ...]:
        """The models that were profiled at ``number``, the best first; of equal ones by name.

        The vanilla model comes first as long as the best is not ahead of it by more than one standard error of a share
        of ``pictures`` (the rule of Breiman et al. 1984, "Classification and Regression Trees", section 3.4.3): with
        few merges it has little to win back, and the luckiest of many tuned models looks better than it is. Where it is
        not known how many pictures there were, the best is the best.
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
        """The best model of each number (see ``ranked``), ascending."""
        numbers = sorted({number for shares in self.accuracy.values() for number in shares})
        return {number: self.ranked(number)[0] for number in numbers}

    def warmed(self, gammas: Collection[int]) -> dict[int, float]:
        """The best model's accuracy at each gamma up to 0 that was profiled; gamma is minus the number."""
        best = self.best()
        return {gamma: self.accuracy[best[-gamma]][-gamma] for gamma in gammas if gamma <= 0 and -gamma in best}


def warmed_profile(profile: Profile, task: str, models: Profiled) -> Profile:
    """``profile`` with the warmed accuracies of ``task``, and which model each is of.

    Above gamma 0 nothing changes: prompts belong to the model they were learned with. Raises ValueError where a gamma
    up to 0 was not profiled, since it would be planned with the vanilla model's accuracy.
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
