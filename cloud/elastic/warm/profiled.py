"""PURE: which warmed model serves which number, and the chapter's rule for the number (spec 3, section 5).

Offline, every kept model is profiled at every number and the best is noted; where we differ, the vanilla model stays
unless another beats it beyond the profiling set's noise. Online, Prodigy's own rule takes the smallest number whose
throughput is above the arrival rate during the last batch. The better scheduler is any policy of elastic serving on a
profile that holds the warmed accuracies: the same expected-utility problem, with a better table.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Final

from isthmus.cloud.elastic.policies.baselines import in_time
from isthmus.cloud.elastic.policies.batching import BatchingRule, BatchQueue
from isthmus.cloud.elastic.scheduling.policy import Choice
from isthmus.cloud.elastic.scheduling.profile import Profile
from isthmus.cloud.elastic.scheduling.query import Query, by_deadline

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


class ThroughputRule:
    """Prodigy's reduction scheduler: the smallest number whose profiled throughput is above the arrivals a second
    during the last batch, else the largest; batches of Alg. 1, earliest deadline first, without what would be late.

    The first batch, of which no rate is known yet, runs at the smallest number.
    """

    def __init__(self, rule: BatchingRule | None = None) -> None:
        self.gammas: tuple[int, ...] = ()
        self._queue = BatchQueue(rule)
        self._arrivals_s: list[float] = []
        self._since_s: float | None = None
        self._rate_per_s = 0.0

    def use(self, profile: Profile) -> None:
        """Raises ValueError for a profile without any gamma up to 0."""
        self.gammas = tuple(gamma for gamma in profile.gammas if gamma <= 0)
        if not self.gammas:
            raise ValueError("the profile has no gamma up to 0 that tokens could be taken away at")
        self._capacity = {gamma: profile.capacity_per_s(gamma) for gamma in self.gammas}
        self._times_s = {gamma: profile.times_s(gamma) for gamma in self.gammas}

    def arrived(self, query: Query) -> None:
        self._queue.add(query)
        self._arrivals_s.append(query.arrival_s)

    def left(self, query: Query) -> None:
        self._queue.remove(query)

    def choose(self, now_s: float) -> Choice:
        gamma = self.gamma_for(self._rate(now_s))
        doomed: list[Query] = []
        for batch in self._queue.by_deadline():
            late, queries = in_time(by_deadline(batch.queries), self._times_s[gamma], now_s)
            doomed += late
            if queries:
                self._rate_per_s, self._since_s = self._rate(now_s), now_s
                self._arrivals_s = [at_s for at_s in self._arrivals_s if at_s > now_s]
                return Choice(tuple(queries), gamma, tuple(doomed))
        return Choice(evict=tuple(doomed))

    def gamma_for(self, rate_per_s: float) -> int:
        """The gamma nearest 0 that serves more than ``rate_per_s``, else the furthest."""
        fitting = [gamma for gamma in self.gammas if self._capacity[gamma] > rate_per_s]
        return max(fitting, default=min(self.gammas))

    def _rate(self, now_s: float) -> float:
        """Arrivals a second since the last batch began; where that is now, the rate then."""
        if self._since_s is None or now_s <= self._since_s:
            return self._rate_per_s
        return len(self._arrivals_s) / (now_s - self._since_s)
