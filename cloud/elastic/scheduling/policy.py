"""PURE: the interface between the engine and a policy. The policies themselves are in ``policies/``.

A policy keeps its own view of the waiting queries, in the form that it plans with. The engine reports each query that
arrives or leaves, and asks the policy what to run whenever an executor is free.
"""

from dataclasses import dataclass
from typing import Final, Protocol, runtime_checkable

from isthmus.cloud.elastic.scheduling.profile import Profile
from isthmus.cloud.elastic.scheduling.query import Query

EPSILON: Final = 64
"""Most queries of a batch, as in the paper."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A policy's decision: the queries that run now as one batch, and the batch's gamma.

    If ``queries`` is empty, nothing runs before ``wait_until_s`` (None: until something changes). ``evict`` holds
    queries that the policy gives up: they cannot be in time, or are worth less than the time they would take.

    >>> query = Query(0, "CIFAR10", 0.0, 1.0, utility=0.5)
    >>> Choice(queries=(query,), gamma=-5).gamma
    -5
    """

    queries: tuple[Query, ...] = ()
    gamma: int = 0
    evict: tuple[Query, ...] = ()
    wait_until_s: float | None = None


@runtime_checkable
class CountsExecutors(Protocol):
    """A policy whose decisions depend on how many executors there are. The engine sets their number before ``choose``.

    They differ in speed: it is the number of executors as fast as the one that is to run the batch which would be as
    fast as all together, and so no whole number.
    """

    executors: float


@runtime_checkable
class KeepsToGammas(Protocol):
    """A policy that runs a query only at a gamma that the query permits. The engine refuses such queries otherwise."""

    keeps_to_gammas: bool


@runtime_checkable
class LearnsTimes(Protocol):
    """A policy that learns from the time that its batches take. The engine reports each batch that has run."""

    def ran(self, size: int, took_s: float) -> None:
        """Notes that a batch of ``size`` queries took ``took_s`` seconds."""


class Policy(Protocol):
    """Decides which queries run next and with how many tokens.

    ``gammas`` are the gammas it may pick; they are known once it has a profile. The engine calls ``arrived`` and
    ``left`` once per query. It calls ``left`` also for queries that ``choose`` returned, after ``choose`` has returned.

    >>> policy: Policy = make_policy("otas", paper_profile())
    >>> policy.arrived(Query(0, "CIFAR10", 0.0, 1.0, utility=0.5))
    >>> len(policy.choose(0.0).queries)
    1
    """

    @property
    def gammas(self) -> tuple[int, ...]: ...

    def use(self, profile: Profile) -> None:
        """Plans with ``profile`` from now on.

        The engine calls it at the start, when tasks were added or removed, when an executor's times have changed, and
        before ``choose`` for an executor of another speed than the last one.
        Raises ValueError if the profile lacks a gamma that the policy needs.
        """

    def arrived(self, query: Query) -> None: ...

    def left(self, query: Query) -> None: ...

    def choose(self, now_s: float) -> Choice:
        """Returns what to run at ``now_s``. A second call without a change in between returns the same."""
