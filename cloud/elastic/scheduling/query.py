"""PURE: queries, their outcomes, and batches of queries. All times are in seconds of one clock."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Final

from isthmus.cloud.elastic.scheduling.levels import gamma_of
from isthmus.proto.errors import InvalidInput

MAX_LATENCY_S: Final = 3_600.0
MAX_UTILITY: Final = 1e6


@dataclass(frozen=True, slots=True)
class Query:
    """One image to be classified. ``deadline_s`` is ``arrival_s`` plus the requested latency.

    ``gammas`` are the only gammas at which it may run; None: any. See ``permitted``.

    :meth:`asked` makes a query from values of a client and checks them. Code with checked values calls the constructor.

    >>> Query.asked(0, "CIFAR10", arrival_s=2.0, latency_s=0.5, utility=1.0).deadline_s
    2.5
    """

    id: int
    task: str
    arrival_s: float
    deadline_s: float
    utility: float
    gammas: frozenset[int] | None = None

    @staticmethod
    def asked(
        id: int,
        task: str,
        arrival_s: float,
        latency_s: float,
        utility: float,
        gammas: frozenset[int] | None = None,
    ) -> "Query":
        """Makes a query whose deadline is ``latency_s`` after its arrival.

        Raises InvalidInput for a latency outside (0, MAX_LATENCY_S] or a utility outside [0, MAX_UTILITY].
        """
        if not 0 < latency_s <= MAX_LATENCY_S:
            raise InvalidInput(f"latency must be above 0 and at most {MAX_LATENCY_S:g} s")
        if not 0 <= utility <= MAX_UTILITY:
            raise InvalidInput(f"utility must be from 0 to {MAX_UTILITY:g}")
        if not math.isfinite(arrival_s):
            raise InvalidInput("arrival must be finite")
        return Query(id, task, arrival_s, arrival_s + latency_s, utility, gammas)

    def may_run_at(self, gamma: int) -> bool:
        """Returns whether the query permits ``gamma``."""
        return self.gammas is None or gamma in self.gammas


def permitted(
    task: str, accuracy: Mapping[int, float], *, gamma: int | None = None, min_accuracy: float | None = None
) -> frozenset[int] | None:
    """Returns the gammas at which a query may run whose caller fixes ``gamma``, or asks for a floor of accuracy.

    ``accuracy`` is the task's accuracy by gamma, 0 where it cannot run. If the model has experts, these are levels
    (levels.py), and a fixed gamma permits any number of experts. Returns None if the caller asks for neither.
    Raises InvalidInput, which names what is possible, if no gamma is left.

    >>> sorted(permitted("pets", {-4: 0.8, 0: 0.9, 2: 0.0}, min_accuracy=0.75))
    [-4, 0]
    """
    if gamma is None and min_accuracy is None:
        return None
    if min_accuracy is not None and not 0 <= min_accuracy <= 1:
        raise InvalidInput("min_accuracy must be from 0 to 1")
    able = {each: share for each, share in accuracy.items() if share > 0}
    if gamma is not None and not any(gamma_of(level) == gamma for level in able):
        listed = ", ".join(map(str, sorted({gamma_of(level) for level in able}))) or "none"
        raise InvalidInput(f"gamma {gamma}: task {task!r} cannot run at it; it runs at {listed}")
    able = {level: share for level, share in able.items() if gamma in (None, gamma_of(level))}
    good = frozenset(level for level, share in able.items() if min_accuracy is None or share >= min_accuracy)
    if not good:
        where = f"at gamma {gamma}" if gamma is not None else "at its best gamma"
        most = max(able.values(), default=0.0)
        raise InvalidInput(f"min_accuracy {min_accuracy:g}: task {task!r} reaches {most:.3f} {where}")
    return good


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
