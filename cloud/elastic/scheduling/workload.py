"""PURE: makes queries to serve: the paper's six kinds, with a random arrival rate or that of a recorded trace.

A trace is scaled by the rate at which the machine serves gamma 0. So a laptop gets the same relative load as the
paper's graphics card. Axes: N queries, T steps of equal length.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from isthmus.cloud.elastic.scheduling.profile import Profile
from isthmus.cloud.elastic.scheduling.query import Query

Float64s = npt.NDArray[np.float64]

LOW_PER_S: Final = 200.0
HIGH_PER_S: Final = 700.0
"""The paper's synthetic rate varies between these."""
WANDER_PER_S: Final = 40.0
"""Standard deviation of the change of the rate within one second. Our choice: the paper does not state it."""
MAX_STEPS: Final = 10_000_000


@dataclass(frozen=True)
class QueryKind:
    """Queries of one task with the same requested latency and utility."""

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
"""The paper's six kinds, equally frequent."""


def kinds_of(tasks: Sequence[str]) -> tuple[QueryKind, ...]:
    """Returns the paper's kinds for other tasks: they replace CIFAR10, CIFAR100 and EuroSAT, in this order.

    With fewer than three tasks, tasks repeat. Raises ValueError without tasks.
    """
    if not tasks:
        raise ValueError("there are no tasks to query")
    places = {name: tasks[place % len(tasks)] for place, name in enumerate(("CIFAR10", "CIFAR100", "EuroSAT"))}
    return tuple(QueryKind(places[kind.task], kind.latency_s, kind.utility) for kind in PAPER_KINDS)


def wandering_rates(rng: np.random.Generator, duration_s: float, step_s: float = 1.0) -> Float64s:
    """Returns a random walk of the rate, reflected at LOW_PER_S and HIGH_PER_S: queries per second by step, (T,)."""
    steps = max(1, round(duration_s / step_s))
    walk_T = rng.uniform(LOW_PER_S, HIGH_PER_S) + np.cumsum(rng.normal(0, WANDER_PER_S * step_s**0.5, steps))
    span = HIGH_PER_S - LOW_PER_S
    folded_T = np.mod(walk_T - LOW_PER_S, 2 * span)
    return LOW_PER_S + np.minimum(folded_T, 2 * span - folded_T)


def rates_of_counts(arrivals_N: Float64s, window_s: float, step_s: float = 1.0) -> Float64s:
    """Returns the rates of a recorded trace that is replayed faster: queries per second at each step, (T,).

    ``arrivals_N`` are the times of the trace. Each ``window_s`` seconds of it are replayed in ``step_s`` seconds; the
    paper replays two minutes per second. Raises ValueError for no arrivals, or more than MAX_STEPS steps.
    """
    if len(arrivals_N) == 0:
        raise ValueError("the trace has no arrivals")
    if not np.ptp(arrivals_N) / window_s < MAX_STEPS:
        raise ValueError(f"the trace has over {MAX_STEPS:,} steps; replay more of its seconds per second")
    counts_T: Float64s = np.bincount(((arrivals_N - arrivals_N.min()) / window_s).astype(np.int64)).astype(np.float64)
    return np.divide(counts_T, step_s, out=counts_T)


def scaled(rates_T: Float64s, mean_per_s: float) -> Float64s:
    """Scales ``rates_T`` to the mean ``mean_per_s``."""
    return rates_T * (mean_per_s / float(rates_T.mean()))


def poisson_arrivals(rng: np.random.Generator, rates_T: Float64s, step_s: float = 1.0) -> Float64s:
    """Returns arrival times (N,), ascending, of a Poisson process whose rate is constant within each step."""
    counts_T = rng.poisson(rates_T * step_s)
    starts_N = np.repeat(np.arange(len(rates_T)) * step_s, counts_T)
    return np.sort(starts_N + rng.uniform(0, step_s, len(starts_N)))


def make_queries(rng: np.random.Generator, arrivals_N: Float64s, kinds: Sequence[QueryKind]) -> list[Query]:
    """Makes one query per arrival with a uniformly drawn kind. Ids count from 0 in order of arrival."""
    drawn_N = rng.integers(0, len(kinds), len(arrivals_N)).tolist()
    queries = []
    for id, (arrival_s, drawn) in enumerate(zip(arrivals_N.tolist(), drawn_N, strict=True)):
        kind = kinds[drawn]
        queries.append(Query(id, kind.task, arrival_s, arrival_s + kind.latency_s, kind.utility))
    return queries


def queries_at_load(rng: np.random.Generator, rates_T: Float64s, load: float, profile: Profile) -> list[Query]:
    """Makes queries of the paper's kinds at a mean rate of ``load`` times what the machine serves at gamma 0.

    If the profile does not have the paper's tasks, the kinds ask about the profile's tasks. Raises ValueError for a
    profile without tasks or without gamma 0.

    >>> queries = queries_at_load(np.random.default_rng(0), np.full(2, 100.0), load=0.5, profile=paper_profile())
    >>> queries == sorted(queries, key=lambda query: query.arrival_s)
    True
    """
    if 0 not in profile.gammas:
        raise ValueError("the profile was not measured at gamma 0, which the load is relative to")
    arrivals_N = poisson_arrivals(rng, scaled(rates_T, load * profile.capacity_per_s(0)))
    papers = {kind.task for kind in PAPER_KINDS} <= profile.accuracy.keys()
    return make_queries(rng, arrivals_N, PAPER_KINDS if papers else kinds_of(tuple(profile.accuracy)))
