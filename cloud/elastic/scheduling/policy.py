"""PURE: what a policy is asked, and what it answers. The engine around it is the same for all.

A policy keeps its own view of the waiting queries, in whatever form it plans with: the engine tells it of each that
comes and each that goes, and asks it what to run whenever an executor is free.
"""

from dataclasses import dataclass
from typing import Final, Protocol

from isthmus.cloud.elastic.scheduling.profile import Profile
from isthmus.cloud.elastic.scheduling.query import Query

EPSILON: Final = 64
"""Most queries of a batch, as in the paper."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What to do now. ``queries`` empty: run nothing before ``wait_until_s`` (None: until something changes).

    ``evict`` are queries the policy gives up: they are worth less than the time they would take, or cannot be in time.
    """

    queries: tuple[Query, ...] = ()
    gamma: int = 0
    evict: tuple[Query, ...] = ()
    wait_until_s: float | None = None


class Policy(Protocol):
    """``gammas``: those it may pick, known once it has a profile. ``arrived`` and ``left`` are each called once for
    every query; ``left`` also for queries that ``choose`` has handed out, and for those only after it returned."""

    @property
    def gammas(self) -> tuple[int, ...]: ...

    def use(self, profile: Profile) -> None:
        """From now on plan with ``profile``: the first, or tasks came or went, or the machine was measured anew.

        Raises ValueError where the profile was not measured at a gamma that the policy needs.
        """

    def arrived(self, query: Query) -> None: ...

    def left(self, query: Query) -> None: ...

    def choose(self, now_s: float) -> Choice:
        """Which of the waiting queries to run at ``now_s``. Changes nothing that a second call would see."""
