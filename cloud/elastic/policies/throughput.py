"""PURE: decides the gamma by the arrival rate alone: Prodigy's reduction scheduler (chapter 4 of Chen 2025)."""

from isthmus.cloud.elastic.policies.baselines import in_time
from isthmus.cloud.elastic.policies.batching import BatchingRule, BatchQueue
from isthmus.cloud.elastic.scheduling.policy import Choice
from isthmus.cloud.elastic.scheduling.profile import Profile
from isthmus.cloud.elastic.scheduling.query import Query, by_deadline


class ThroughputRule:
    """Runs the batches of Alg. 1, earliest deadline first, without the queries that would be late.

    The reduction number is the smallest whose profiled throughput is above the arrival rate during the last batch, or
    the largest if there is none. The first batch runs at the smallest number, since no rate is known yet.
    """

    def __init__(self, rule: BatchingRule | None = None) -> None:
        self.gammas: tuple[int, ...] = ()
        self.executors = 1.0
        self._queue = BatchQueue(rule)
        self._arrivals_s: list[float] = []
        self._since_s: float | None = None
        self._rate_per_s = 0.0

    def use(self, profile: Profile) -> None:
        """Plans with ``profile``. Raises ValueError if it has no gamma of 0 or below."""
        self.gammas = tuple(gamma for gamma in profile.gammas if gamma <= 0)
        if not self.gammas:
            raise ValueError("the profile has no gamma of 0 or below, so no tokens can be removed")
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
        """Returns the gamma nearest 0 that serves more than ``rate_per_s``; if there is none, the most negative one."""
        fitting = [gamma for gamma in self.gammas if self._capacity[gamma] * self.executors > rate_per_s]
        return max(fitting, default=min(self.gammas))

    def _rate(self, now_s: float) -> float:
        """Returns the arrivals per second since the last batch began, or the previous rate if no time has passed."""
        if self._since_s is None or now_s <= self._since_s:
            return self._rate_per_s
        return len(self._arrivals_s) / (now_s - self._since_s)
