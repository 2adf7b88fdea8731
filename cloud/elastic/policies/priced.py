"""PURE: our default policy. Whenever an executor is free, it decides a batch and that batch's gamma together.

Alg. 1 fills a batch before it knows the gamma, so queries that need speed share a batch with queries that deserve more
tokens. Here gamma comes first:

1. The load sets a price of the executor's time (``pricing.py``). The load is, for each kind of query, the number that
   wait and the number that will arrive soon.
2. The price sets each kind's gamma.
3. A batch is filled from the kinds with the same gamma, earliest deadline first.

Every query counts by its own deadline. A query that is not worth its time at this price waits until nothing else does.
Queries that permit only some gammas are kinds of their own, which buy among these gammas.

Latencies may differ by orders of magnitude: a person waits for one answer, and a nightly job for another. Then the
horizon is that of the impatient queries, and the patient ones share in it as far as their own deadlines require.
"""

import math
from bisect import bisect_left, bisect_right, insort
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from isthmus.cloud.elastic.policies.arrivals import ArrivalRate
from isthmus.cloud.elastic.policies.pricing import Market
from isthmus.cloud.elastic.scheduling.policy import EPSILON, Choice
from isthmus.cloud.elastic.scheduling.profile import Profile
from isthmus.cloud.elastic.scheduling.query import Query

HORIZON: Final = 0.75
"""The load counts waiting queries, and arrivals within this share of the mean requested latency."""
BACKLOG: Final = 0.25
"""Work that may wait at the end of the horizon, as a share of the mean requested latency. It keeps batches full."""
TYPICAL_SIZE: Final = 48
"""The cost of an image at a gamma is its share of the time of a batch of this size."""
LONGEST: Final = 0.0875
"""Longest time of a batch, as a share of the mean requested latency. While a batch runs, the price is not updated and
nothing more urgent can start."""
DEARER: Final = 0.05
"""Exception to ``LONGEST``: no batch is made so small that an image costs more than this share above the least cost."""
PATIENT: Final = 2.0
"""A latency of more than this multiple of the shortest one counts as that multiple."""
UTILITY_STEP: Final = 1.25
"""Queries whose utilities differ by less than about this factor belong to one kind."""
LATENCY_STEP: Final = 2.0
"""Queries whose latencies differ by less than about this factor belong to one kind."""
RECENT: Final = 0.05
"""A kind is asked for if at least this weight of its arrivals is left in the average of its rate."""
MAX_IDLE_KINDS: Final = 64
SHORTEST_S: Final = 1e-3
"""Shorter latencies count as this one: no batch is faster."""
MIN_WINDOW_S: Final = 0.1
MAX_WINDOW_S: Final = 60.0

Waiting = tuple[float, int, Query]
_Key = tuple[str, int, int, frozenset[int] | None]


@dataclass(slots=True)
class _Kind:
    """Queries of one task, similar utility, similar latency and the same permitted gammas.

    The waiting ones, by deadline, and the arrival rate of more. ``counted_s`` is the latency that counts among all
    kinds (``PATIENT``).
    """

    task: str
    utility: float
    gammas: frozenset[int] | None
    latency_s: float
    rate: ArrivalRate
    counted_s: float
    waiting: list[Waiting] = field(default_factory=list)

    def due(self, now_s: float) -> float:
        """Returns how many of the waiting queries must be answered within ``counted_s``, so that all are in time.

        The time that is left until the median deadline counts, so the queries of a burst count more as it shrinks.
        """
        if not self.waiting:
            return 0.0
        left_s = self.waiting[len(self.waiting) // 2][0] - now_s
        return len(self.waiting) * self.counted_s / max(left_s, self.counted_s)

    def is_asked_for(self, now_s: float) -> bool:
        """Returns whether queries wait, or have arrived recently."""
        return bool(self.waiting) or self.rate.at(now_s) * self.rate.window_s >= RECENT


class Priced:
    """Decides by price (see the module). ``arrived`` raises KeyError if the profile lacks the query's task."""

    def __init__(self, epsilon: int = EPSILON) -> None:
        self.gammas: tuple[int, ...] = ()
        self.executors = 1.0
        self.keeps_to_gammas = True
        self._epsilon = epsilon
        self._kinds: dict[_Key, _Kind] = {}
        self._market: Market | None = None

    def use(self, profile: Profile) -> None:
        self._profile = profile
        self.gammas = profile.gammas
        self._times_s = [profile.times_s(gamma) for gamma in profile.gammas]
        size = min(TYPICAL_SIZE, self._epsilon)
        self._costs_s = [times[size] / size for times in self._times_s]
        self._least_sizes = [_least_size(times, self._epsilon) for times in self._times_s]
        self._by_speed = sorted(range(len(self.gammas)), key=lambda level: self._costs_s[level])
        self._market = None

    def arrived(self, query: Query) -> None:
        key = _key(query)
        kind = self._kinds.get(key)
        if kind is None:
            self._profile.accuracy[query.task]
            self._forget_idle(query.arrival_s)
            latency_s = max(query.deadline_s - query.arrival_s, SHORTEST_S)
            kind = _Kind(
                query.task, query.utility, query.gammas, latency_s, ArrivalRate(_window_s(latency_s)), latency_s
            )
            self._kinds[key] = kind
            self._market = None
        kind.rate.add(query.arrival_s)
        insort(kind.waiting, (query.deadline_s, query.id, query))

    def left(self, query: Query) -> None:
        waiting = self._kinds[_key(query)].waiting
        del waiting[bisect_left(waiting, (query.deadline_s, query.id))]

    def choose(self, now_s: float) -> Choice:
        rates, latency_s = self._asked_for(now_s)
        by_level = self._sorted_by_level(self._price(rates, latency_s, now_s))
        longest_s = LONGEST * latency_s
        unwanted = by_level.pop(None, [])
        chosen = self._most_urgent(by_level, now_s, longest_s)
        if chosen is None and unwanted:
            chosen = self._most_urgent(self._at_fastest(unwanted), now_s, longest_s)
        return chosen if chosen is not None else Choice()

    def price_per_s(self, now_s: float) -> float:
        """Returns the current price: the utility per second of the executor."""
        return self._price(*self._asked_for(now_s), now_s)

    def _asked_for(self, now_s: float) -> tuple[list[float], float]:
        """Returns (arrivals per second of each kind, mean requested latency in seconds).

        Without arrivals the latency is the longest of the known kinds. The latencies of patient kinds count as
        ``PATIENT`` says, and their arrivals are averaged over as long: a burst of them is forgotten within the horizon.
        """
        shortest_s = min(
            (kind.latency_s for kind in self._kinds.values() if kind.is_asked_for(now_s)), default=math.inf
        )
        for kind in self._kinds.values():
            kind.counted_s = min(kind.latency_s, PATIENT * shortest_s)
            kind.rate.average_over(_window_s(kind.counted_s), now_s)
        rates = [kind.rate.at(now_s) for kind in self._kinds.values()]
        latencies_s = [kind.counted_s for kind in self._kinds.values()]
        total = sum(rates)
        if total > 0:
            return rates, sum(rate * latency_s for rate, latency_s in zip(rates, latencies_s, strict=True)) / total
        return rates, max(latencies_s, default=0.0)

    def _price(self, rates: list[float], latency_s: float, now_s: float) -> float:
        kinds = list(self._kinds.values())
        if not kinds:
            return 0.0
        if self._market is None:
            self._market = Market(self._costs_s, [self._gains(kind) for kind in kinds])
        counts_K = np.array(
            [kind.due(now_s) + rate * HORIZON * latency_s for rate, kind in zip(rates, kinds, strict=True)]
        )
        return self._market.price(counts_K, self.executors * (HORIZON + BACKLOG) * latency_s)

    def _gains(self, kind: _Kind) -> list[float]:
        """Returns the expected utility of a query of ``kind`` at each gamma; 0 if its task was removed."""
        shares = self._profile.accuracy.get(kind.task)
        if shares is None:
            return [0.0] * len(self.gammas)
        permitted = self.gammas if kind.gammas is None else kind.gammas
        return [shares[gamma] * kind.utility if gamma in permitted else 0.0 for gamma in self.gammas]

    def _sorted_by_level(self, price: float) -> dict[int | None, list[Waiting]]:
        """Groups waiting queries by the gamma that they buy at ``price`` (None: no time), sorted by deadline.

        A query never buys a gamma that it does not permit, since it gains nothing there.
        """
        by_level: dict[int | None, list[Waiting]] = {}
        for index, kind in enumerate(self._kinds.values()):
            if kind.waiting:
                assert self._market is not None
                by_level.setdefault(self._market.level(index, price), []).extend(kind.waiting)
        for waiting in by_level.values():
            waiting.sort()
        return by_level

    def _at_fastest(self, waiting: list[Waiting]) -> dict[int | None, list[Waiting]]:
        """Groups queries by the fastest gamma that they permit."""
        grouped: dict[int | None, list[Waiting]] = {}
        for each in waiting:
            for level in self._by_speed:
                if each[2].may_run_at(self.gammas[level]):
                    grouped.setdefault(level, []).append(each)
                    break
        return grouped

    def _most_urgent(self, by_level: dict[int | None, list[Waiting]], now_s: float, longest_s: float) -> Choice | None:
        """Makes one batch per gamma and returns the one with the least time to spare; None if no batch can run.

        If no query can be in time at the wanted gamma, faster gammas are tried in turn.
        """
        best: tuple[float, list[Waiting], int] | None = None
        for wanted, waiting in by_level.items():
            assert wanted is not None
            for level in self._by_speed[self._by_speed.index(wanted) :: -1]:
                if level != wanted:
                    permitting = [each for each in waiting if each[2].may_run_at(self.gammas[level])]
                else:
                    permitting = waiting
                times_s = self._times_s[level]
                most = max(bisect_right(times_s, longest_s, 1, self._epsilon + 1) - 1, self._least_sizes[level])
                batch = _batch(permitting, times_s, now_s, most)
                if batch:
                    slack_s = batch[0][0] - now_s - times_s[len(batch)]
                    if best is None or slack_s < best[0]:
                        best = (slack_s, batch, level)
                    break
        if best is None:
            return None
        return Choice(tuple(query for _, _, query in best[1]), self.gammas[best[2]])

    def _forget_idle(self, now_s: float) -> None:
        """Removes kinds without waiting queries or recent arrivals if there are many, to keep memory bounded."""
        if len(self._kinds) < MAX_IDLE_KINDS:
            return
        for key, kind in list(self._kinds.items()):
            if not kind.is_asked_for(now_s):
                del self._kinds[key]


def _batch(waiting: list[Waiting], times_s: tuple[float, ...], now_s: float, most: int) -> list[Waiting]:
    """Returns up to ``most`` queries with the earliest deadlines that all finish in time together.

    It skips queries that would be late.
    """
    full_s = now_s + times_s[most]
    first = bisect_left(waiting, (full_s,))
    if len(waiting) - first >= most:
        return waiting[first : first + most]
    for first in range(max(0, len(waiting) - most), len(waiting)):
        if waiting[first][0] >= now_s + times_s[len(waiting) - first]:
            return waiting[first:]
    return []


def _least_size(times_s: tuple[float, ...], epsilon: int) -> int:
    """Returns the smallest batch size whose cost per image is at most ``DEARER`` above the least cost per image."""
    costs_s = [times_s[size] / size for size in range(1, epsilon + 1)]
    bearable_s = (1 + DEARER) * min(costs_s)
    return next(size for size, cost_s in enumerate(costs_s, 1) if cost_s <= bearable_s)


def _key(query: Query) -> _Key:
    step = round(math.log(query.utility) / math.log(UTILITY_STEP)) if query.utility > 0 else -(10**6)
    latency_s = max(query.deadline_s - query.arrival_s, SHORTEST_S)
    return query.task, step, round(math.log(latency_s) / math.log(LATENCY_STEP)), query.gammas


def _window_s(latency_s: float) -> float:
    return min(max(latency_s, MIN_WINDOW_S), MAX_WINDOW_S)
