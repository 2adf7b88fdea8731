"""PURE: the policies to compare with, all at one gamma. Token adaptation is off; only order and batch size differ."""

from isthmus.cloud.elastic.policies.batching import BatchingRule, BatchQueue
from isthmus.cloud.elastic.scheduling.policy import EPSILON, Choice
from isthmus.cloud.elastic.scheduling.profile import Profile
from isthmus.cloud.elastic.scheduling.query import Query, by_deadline


def require_gamma(profile: Profile, gamma: int) -> None:
    """Raises ValueError where ``profile`` was not measured at ``gamma``."""
    if gamma not in profile.gammas:
        raise ValueError(f"the profile was not measured at gamma {gamma}, only at {list(profile.gammas)}")


class Fifo:
    """First come, first served, at one gamma, blind to utilities and deadlines.

    At gamma 0 this is PetS (Zhou et al., USENIX ATC 2022) as far as it can be told here: a shared backbone with a head
    for each task, batches across tasks, throughput for a goal.
    """

    def __init__(self, gamma: int = 0, epsilon: int = EPSILON) -> None:
        self.gammas = (gamma,)
        self._epsilon = epsilon
        self._waiting: dict[int, Query] = {}

    def use(self, profile: Profile) -> None:
        require_gamma(profile, self.gammas[0])

    def arrived(self, query: Query) -> None:
        self._waiting[query.id] = query

    def left(self, query: Query) -> None:
        del self._waiting[query.id]

    def choose(self, now_s: float) -> Choice:
        first = zip(range(self._epsilon), self._waiting.values(), strict=False)
        return Choice(tuple(query for _, query in first), self.gammas[0])


class Clipper(Fifo):
    """First come, first served at gamma 0 with an adaptive batch size (Crankshaw et al., NSDI 2017).

    Clipper finds by trial the largest batch that stays within a latency goal; here the profile says it at once. The
    goal is half of the shortest latency asked for among those waiting, so that one batch may run while one waits.
    """

    def __init__(self, epsilon: int = EPSILON) -> None:
        super().__init__(0, epsilon)
        self._times_s: tuple[float, ...] = ()

    def use(self, profile: Profile) -> None:
        super().use(profile)
        self._times_s = profile.times_s(0)

    def choose(self, now_s: float) -> Choice:
        first = super().choose(now_s)
        goal_s = min((query.deadline_s - query.arrival_s for query in first.queries), default=0.0) / 2
        size = len(first.queries)
        while size > 1 and self._times_s[size] > goal_s:
            size -= 1
        return Choice(first.queries[:size], 0)


class FixedGamma:
    """One gamma, batches of Alg. 1, earliest deadline first; what would be late is left out of its batch.

    At -5 to -20 the ToMe baseline, at 2 to 8 the VPT one, at 0 a PetS that knows deadlines. Each is as strong as one
    gamma allows: the paper's own are not said to look at deadlines.
    """

    def __init__(self, gamma: int, rule: BatchingRule | None = None) -> None:
        self.gammas = (gamma,)
        self._queue = BatchQueue(rule)
        self._times_s: tuple[float, ...] = ()

    def use(self, profile: Profile) -> None:
        require_gamma(profile, self.gammas[0])
        self._times_s = profile.times_s(self.gammas[0])

    def arrived(self, query: Query) -> None:
        self._queue.add(query)

    def left(self, query: Query) -> None:
        self._queue.remove(query)

    def choose(self, now_s: float) -> Choice:
        doomed: list[Query] = []
        for batch in self._queue.by_deadline():
            late, queries = in_time(by_deadline(batch.queries), self._times_s, now_s)
            doomed += late
            if queries:
                return Choice(tuple(queries), self.gammas[0], tuple(doomed))
        return Choice(evict=tuple(doomed))


def in_time(queries: list[Query], times_s: tuple[float, ...], now_s: float) -> tuple[list[Query], list[Query]]:
    """Splits queries (by deadline) that run together from ``now_s``: those too late for it, and those all in time."""
    for first in range(len(queries)):
        if queries[first].deadline_s >= now_s + times_s[len(queries) - first]:
            return queries[:first], queries[first:]
    return queries, []
