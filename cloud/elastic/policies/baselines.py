"""PURE: the baseline policies. Each serves every batch at one fixed gamma.

They do not adapt the number of tokens. They differ only in the order of queries and the size of batches.
"""

from isthmus.cloud.elastic.policies.batching import BatchingRule, BatchQueue
from isthmus.cloud.elastic.scheduling.policy import EPSILON, Choice
from isthmus.cloud.elastic.scheduling.profile import Profile
from isthmus.cloud.elastic.scheduling.query import Query, by_deadline


def require_gamma(profile: Profile, gamma: int) -> None:
    """Raises ValueError if ``profile`` was not measured at ``gamma``."""
    if gamma not in profile.gammas:
        raise ValueError(f"the profile was not measured at gamma {gamma}, only at {list(profile.gammas)}")


class Fifo:
    """Decides first come, first served at one gamma, and ignores utilities and deadlines.

    At gamma 0 this stands for PetS (Zhou et al., USENIX ATC 2022): a shared backbone with one head per task, batches
    across tasks, and throughput as the goal.
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
    """Decides first come, first served at gamma 0, with an adaptive batch size (Crankshaw et al., NSDI 2017).

    Clipper finds by trial the largest batch that meets a latency goal. Here the profile gives that size directly. The
    goal is half of the shortest latency requested among the waiting queries, so that one batch can run while another
    waits.
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
    """Runs the batches of Alg. 1 at one gamma, earliest deadline first, without the queries that would be late.

    Gammas -5 to -20 are the ToMe baseline, 2 to 8 the VPT baseline, and 0 is a PetS that respects deadlines. Each is
    as strong as one gamma allows: the paper does not say that its own baselines consider deadlines.
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
    """Splits queries, sorted by deadline, into (those that would be late, those that finish in time together).

    ``times_s[n]`` is the time of a batch of n queries, which starts at ``now_s``.
    """
    for first in range(len(queries)):
        if queries[first].deadline_s >= now_s + times_s[len(queries) - first]:
            return queries[:first], queries[first:]
    return queries, []
