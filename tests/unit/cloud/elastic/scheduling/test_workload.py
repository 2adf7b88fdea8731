"""Generated loads: their rates, their scale, their kinds; and the simulator on them."""

import numpy as np
import pytest

from isthmus.cloud.elastic.policies.by_name import make_policy
from isthmus.cloud.elastic.scheduling.engine import Engine
from isthmus.cloud.elastic.scheduling.profile import paper_profile
from isthmus.cloud.elastic.scheduling.query import Outcome
from isthmus.cloud.elastic.scheduling.simulate import draws, simulate
from isthmus.cloud.elastic.scheduling.workload import (
    HIGH_PER_S,
    LOW_PER_S,
    PAPER_KINDS,
    kinds_of,
    poisson_arrivals,
    queries_at_load,
    rates_of_counts,
    scaled,
    wandering_rates,
)


def test_the_rate_wanders_within_its_walls() -> None:
    rates_T = wandering_rates(np.random.default_rng(0), 1_800)
    assert len(rates_T) == 1_800
    assert LOW_PER_S <= rates_T.min() < 250 and 650 < rates_T.max() <= HIGH_PER_S
    assert np.abs(np.diff(rates_T)).max() < 250


def test_arrivals_follow_the_rate() -> None:
    arrivals_N = poisson_arrivals(np.random.default_rng(0), np.array([0.0, 1_000.0, 100.0]))
    assert np.all(np.diff(arrivals_N) >= 0) and arrivals_N[0] >= 1.0
    assert 900 < np.sum(arrivals_N < 2) < 1_100 and 60 < np.sum(arrivals_N >= 2) < 140


def test_a_trace_is_played_faster_and_scaled() -> None:
    rates_T = rates_of_counts(np.array([3.0, 4.0, 130.0]), window_s=60)
    assert rates_T.tolist() == [2.0, 0.0, 1.0]
    assert scaled(rates_T, 10).mean() == pytest.approx(10)
    with pytest.raises(ValueError):
        rates_of_counts(np.array([]), 60)
    with pytest.raises(ValueError, match="steps"):
        rates_of_counts(np.array([0.0, 1e9]), 1e-6)


def test_load_is_counted_by_gamma_0() -> None:
    profile = paper_profile()
    rng = np.random.default_rng(3)
    queries = queries_at_load(rng, wandering_rates(rng, 60), 1.5, profile)
    assert len(queries) == pytest.approx(60 * 1.5 * profile.capacity_per_s(0), rel=0.03)
    assert [query.id for query in queries] == list(range(len(queries)))
    assert {(query.task, query.utility) for query in queries} == {(kind.task, kind.utility) for kind in PAPER_KINDS}


def test_other_tasks_take_the_papers_places() -> None:
    assert [kind.task for kind in kinds_of(["x", "y"])] == ["x", "x", "y", "y", "x", "x"]
    with pytest.raises(ValueError):
        kinds_of([])


def test_a_run_adds_up() -> None:
    profile = paper_profile()
    rng = np.random.default_rng(4)
    queries = queries_at_load(rng, wandering_rates(rng, 5), 1.0, profile)
    engine = Engine(profile, make_policy("priced", profile))
    run = simulate(engine, queries, draws(rng, len(queries)))
    assert None not in run.outcomes
    assert sum(run.share(outcome) for outcome in Outcome) == pytest.approx(1)
    assert sum(batch.utility for batch in run.batches) == pytest.approx(run.expected_utility)
    assert run.utility == pytest.approx(run.expected_utility, rel=0.05)
    assert all(left.end_s <= right.start_s + 1e-9 for left, right in zip(run.batches, run.batches[1:], strict=False))
    assert min(run.waits_s) >= -1e-9
    assert engine.outcomes.total() == len(queries)


def test_the_same_seed_gives_the_same_run() -> None:
    profile = paper_profile()

    def once() -> float:
        rng = np.random.default_rng(9)
        queries = queries_at_load(rng, wandering_rates(rng, 3), 2.0, profile)
        return simulate(Engine(profile, make_policy("exact", profile)), queries, draws(rng, len(queries))).utility

    assert once() == once()
