"""PURE: queries, their outcomes, and batches of queries. All times are in seconds of one clock."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Final

from isthmus.proto.errors import InvalidInput

MAX_LATENCY_S: Final = 3_600.0
MAX_UTILITY: Final = 1e6


@dataclass(frozen=True, slots=True)
class Query:
    """One image to be classified. ``deadline_s`` is ``arrival_s`` plus the requested latency.

    :meth:`asked` makes a query from values of a client and checks them. Code with checked values calls the constructor.

    >>> Query.asked(0, "CIFAR10", arrival_s=2.0, latency_s=0.5, utility=1.0).deadline_s
    2.5
    """

    id: int
    task: str
    arrival_s: float
    deadline_s: float
    utility: float

    @staticmethod
    def asked(id: int, task: str, arrival_s: float, latency_s: float, utility: float) -> "Query":
        """Makes a query whose deadline is ``latency_s`` after its arrival.

        Raises InvalidInput for a latency outside (0, MAX_LATENCY_S] or a utility outside [0, MAX_UTILITY].
        """
        if not 0 < latency_s <= MAX_LATENCY_S:
            raise InvalidInput(f"latency must be above 0 and at most {MAX_LATENCY_S:g} s")
        if not 0 <= utility <= MAX_UTILITY:
            raise InvalidInput(f"utility must be from 0 to {MAX_UTILITY:g}")
        if not math.isfinite(arrival_s):
            raise InvalidInput("arrival must be finite")
        return Query(id, task, arrival_s, arrival_s + latency_s, utility)


class Outcome(Enum):
    """How a query ended. Each query ends exactly once. The first three are in time (outcomes 1 and 2 in OTAS)."""

    CORRECT_IN_TIME = "correct_in_time"
    WRONG_IN_TIME = "wrong_in_time"
    ANSWERED_IN_TIME = "answered_in_time"
    """In time; the label is unknown."""
    LATE = "late"
    EVICTED = "evicted"
    """Not run, because it could no longer be in time or its caller left."""
    FAILED = "failed"
    """Its batch failed while it ran."""


IN_TIME: Final = frozenset({Outcome.CORRECT_IN_TIME, Outcome.WRONG_IN_TIME, Outcome.ANSWERED_IN_TIME})


@dataclass(frozen=True, slots=True)
class Batch:
    """Queries that run together, in the order of their answers. It is never empty."""

    queries: tuple[Query, ...]

    def __post_init__(self) -> None:
        if not self.queries:
            raise ValueError("a batch holds at least one query")

    def __len__(self) -> int:
        return len(self.queries)

    @property
    def first_arrival_s(self) -> float:
        """The arrival of its first query (s_b in Alg. 1)."""
        return self.queries[0].arrival_s

    @property
    def deadline_s(self) -> float:
        """Its earliest deadline (d_b in Alg. 1)."""
        return min(query.deadline_s for query in self.queries)

    @property
    def utility(self) -> float:
        """The utility of its first query (u_b in Alg. 1)."""
        return self.queries[0].utility

    def split(self, size: int) -> tuple["Batch", ...]:
        """Returns the queries, in order, in batches of at most ``size``. Raises ValueError for a size below 1."""
        if size < 1:
            raise ValueError(f"batches of {size} queries: the size must be at least 1")
        return tuple(Batch(self.queries[start : start + size]) for start in range(0, len(self.queries), size))


def by_deadline(queries: Iterable[Query]) -> list[Query]:
    """Sorts queries: earliest deadline first, equal deadlines by arrival, then by id."""
    return sorted(queries, key=lambda query: (query.deadline_s, query.arrival_s, query.id))
