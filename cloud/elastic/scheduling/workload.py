"""PURE: queries to serve: six kinds as in the paper, arriving at a rate that wanders or follows a recorded trace.

A trace is scaled to a machine by the rate at which that serves gamma 0, so that a laptop meets the same relative load
as the paper's card (spec 2, section 8). Axes: N queries, T steps of equal length.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from isthmus.cloud.elastic.scheduling.profile import Profile
from isthmus.cloud.elastic.scheduling.query import Query

Floats = npt.NDArray[np.float64]

LOW_PER_S: Final = 200.0
HIGH_PER_S: Final = 700.0
"""Between these the paper's synthetic rate wanders."""
WANDER_PER_S: Final = 40.0
"""Standard deviation of a rate's change within one second. The paper is silent on it: ours."""
MAX_STEPS: Final = 10_000_000


@dataclass(frozen=True)
class QueryKind:
    task: str
    latency_s: float
    utility: float


PAPER_KINDS: Final = (
    QueryKind("CIFAR10", 0.6, 0.3),
    QueryKind("CIFAR10", 1.0, 0.01),
    QueryKind("CIFAR100", 0.6, 1.0),
    QueryKind("CIFAR100", 1.0, 0.2),
    QueryKind("EuroSAT", 0.6, 0.3),
    QueryKind("EuroSAT", 1.0, 0.01),
)
"""The paper's six; each is asked equally often."""


def kinds_of(tasks: Sequence[str]) -> tuple[QueryKind, ...]:
    """The paper's kinds for other tasks: the first takes CIFAR10's place, the second CIFAR100's, the third EuroSAT's.

    With fewer than three they come round again. Raises ValueError for none.
    """
    if not tasks:
        raise ValueError("no tasks to ask about")
    places = {name: tasks[place % len(tasks)] for place, name in enumerate(("CIFAR10", "CIFAR100", "EuroSAT"))}
    return tuple(QueryKind(places[kind.task], kind.latency_s, kind.utility) for kind in PAPER_KINDS)


def wandering_rates(rng: np.random.Generator, duration_s: float, step_s: float = 1.0) -> Floats:
    """A random walk of the rate, reflected at LOW_PER_S and HIGH_PER_S: one value for each step, (T,)."""
    steps = max(1, round(duration_s / step_s))
    walk_T = rng.uniform(LOW_PER_S, HIGH_PER_S) + np.cumsum(rng.normal(0, WANDER_PER_S * step_s**0.5, steps))
    span = HIGH_PER_S - LOW_PER_S
    folded_T = np.mod(walk_T - LOW_PER_S, 2 * span)
    return LOW_PER_S + np.minimum(folded_T, 2 * span - folded_T)


def rates_of_counts(arrivals_N: Floats, window_s: float, step_s: float = 1.0) -> Floats:
    """A recorded trace played faster: what came within ``window_s`` of it comes within ``step_s``, (T,) per second.

    The paper plays two minutes as one second. Raises ValueError for no arrivals, or more than MAX_STEPS steps.
    """
    if len(arrivals_N) == 0:
        raise ValueError("a trace without arrivals")
    if not np.ptp(arrivals_N) / window_s < MAX_STEPS:
        raise ValueError(f"a trace of over {MAX_STEPS:,} steps; play more of its time as one")
    counts_T: Floats = np.bincount(((arrivals_N - arrivals_N.min()) / window_s).astype(np.int64)).astype(np.float64)
    return np.divide(counts_T, step_s, out=counts_T)


def scaled(rates_T: Floats, mean_per_s: float) -> Floats:
    """The same course with another mean."""
    return rates_T * (mean_per_s / float(rates_T.mean()))


def poisson_arrivals(rng: np.random.Generator, rates_T: Floats, step_s: float = 1.0) -> Floats:
    """Arrival times (N,), ascending, of a Poisson process whose rate holds through each step."""
    counts_T = rng.poisson(rates_T * step_s)
    starts_N = np.repeat(np.arange(len(rates_T)) * step_s, counts_T)
    return np.sort(starts_N + rng.uniform(0, step_s, len(starts_N)))


def make_queries(rng: np.random.Generator, arrivals_N: Floats, kinds: Sequence[QueryKind]) -> list[Query]:
    """A query at each arrival, its kind drawn evenly; ids count from 0 in order of arrival."""
    drawn_N = rng.integers(0, len(kinds), len(arrivals_N)).tolist()
    queries = []
    for id, (arrival_s, drawn) in enumerate(zip(arrivals_N.tolist(), drawn_N, strict=True)):
        kind = kinds[drawn]
        queries.append(Query(id, kind.task, arrival_s, arrival_s + kind.latency_s, kind.utility))
    return queries


def queries_at_load(rng: np.random.Generator, rates_T: Floats, load: float, profile: Profile) -> list[Query]:
    """A trace scaled so that its mean is ``load`` times what the machine serves at gamma 0, and asked with the paper's
    kinds, on the profile's own tasks where they are not the paper's. Raises ValueError for a profile without tasks or
    without gamma 0."""
    if 0 not in profile.gammas:
        raise ValueError("the profile was not measured at gamma 0, which load is counted by")
    arrivals_N = poisson_arrivals(rng, scaled(rates_T, load * profile.capacity_per_s(0)))
    papers = {kind.task for kind in PAPER_KINDS} <= profile.accuracy.keys()
    return make_queries(rng, arrivals_N, PAPER_KINDS if papers else kinds_of(tuple(profile.accuracy)))
