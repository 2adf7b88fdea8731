"""PURE: the baseline policies. Each serves every batch at one fixed gamma.

They do not adapt the number of tokens. They differ only in the order of queries and the size of batches.
"""

import math
from itertools import islice
from typing import Final

from isthmus.cloud.elastic.policies.batching import BatchingRule, BatchQueue
from isthmus.cloud.elastic.scheduling.policy import EPSILON, Choice
from isthmus.cloud.elastic.scheduling.profile import MAX_BATCH, Profile
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

    The largest batch is found by trial (section 4.3): it grows by ``GROWTH`` queries as long as full batches meet the
    latency goal, and shrinks to ``SHRUNK`` of the size of a batch that missed it. The profile is not read. ``most`` is
    the largest batch of the engine, since the 64 of OTAS are not Clipper's.

    Where we differ: Clipper's operator sets the goal per application. Here it is half of the shortest latency that was
    requested in the batch, so that one batch can run while another waits.
    """

    GROWTH: Final = 1
    SHRUNK: Final = 0.9

    def __init__(self, most: int = MAX_BATCH) -> None:
        super().__init__(0, most)
        self._most = most
        self.largest = 1
        """The largest batch at present."""
        self._goal_s = math.inf

    def choose(self, now_s: float) -> Choice:
        chosen = tuple(query for _, query in zip(range(self.largest), self._waiting.values(), strict=False))
        self._goal_s = min((query.deadline_s - query.arrival_s for query in chosen), default=math.inf) / 2
        return Choice(chosen, 0)

    def ran(self, size: int, took_s: float) -> None:
        """Adapts the largest batch by additive increase and multiplicative decrease."""
        if took_s > self._goal_s:
            self.largest = max(1, math.floor(self.SHRUNK * size))
        elif size >= self.largest:
            self.largest = min(self._most, self.largest + self.GROWTH)


class DynamicBatching(Fifo):
    """Decides first come, first served at gamma 0, by the documented rule of Triton's dynamic batcher.

    If one of the ``preferred`` sizes can be filled, the largest of them runs at once. Otherwise the batch waits for
    more queries until its oldest one has waited for ``delay_s``, and then runs as it is, with at most ``most`` queries.
    Without preferred sizes and delay, every batch is as large as possible and nothing waits: Triton's defaults. Its
    options for priorities, time limits and the order of answers are off by default, and are not here. Source:
    docs.nvidia.com/deeplearning/triton-inference-server/user-guide/docs/batcher.html.
    """

    def __init__(self, preferred: tuple[int, ...] = (), delay_s: float = 0.0, most: int = EPSILON) -> None:
        """Raises ValueError for a size that is not between 1 and ``most``, or a delay that is no time."""
        if not all(1 <= size <= most for size in preferred) or not 0 <= delay_s < math.inf:
            raise ValueError(f"preferred sizes are between 1 and {most}, and the delay is at least 0 ms")
        super().__init__(0, most)
        self._most, self._preferred, self._delay_s = most, sorted(preferred), delay_s

    @classmethod
    def named(cls, settings: str) -> "DynamicBatching":
        """Make the policy from "SIZES:MS", such as "16+32:5": preferred sizes, and the delay in milliseconds.

        Both may be empty. Raises ValueError.
        """
        sizes, _, delay_ms = settings.partition(":")
        try:
            preferred = tuple(int(size) for size in sizes.split("+") if sizes)
            return cls(preferred, float(delay_ms or 0) / 1e3)
        except ValueError as error:
            way_out = f"dynamic:SIZES:MS needs sizes from 1 to {EPSILON} and milliseconds, such as dynamic:16+32:5"
            raise ValueError(f"{way_out}, not {settings!r}") from error

    def choose(self, now_s: float) -> Choice:
        count = min(len(self._waiting), self._most)
        if not count:
            return Choice()
        filled = [size for size in self._preferred if size <= count]
        due_s = next(iter(self._waiting.values())).arrival_s + self._delay_s
        if not filled and count < self._most and now_s < due_s:
            return Choice(wait_until_s=due_s)
        return Choice(tuple(islice(self._waiting.values(), filled[-1] if filled else count)))


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
