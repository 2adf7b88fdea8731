"""The clairvoyant bound: above every policy, above the best of all schedules, and close to the best possible."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.cloud.elastic.policies import infaas
from isthmus.cloud.elastic.policies.by_name import POLICIES, make_policy
from isthmus.cloud.elastic.scheduling.bound import clairvoyant_bound
from isthmus.cloud.elastic.scheduling.engine import Engine
from isthmus.cloud.elastic.scheduling.profile import paper_profile
from isthmus.cloud.elastic.scheduling.query import Query
from isthmus.cloud.elastic.scheduling.simulate import simulate
from isthmus.cloud.elastic.scheduling.workload import PAPER_KINDS, make_queries, poisson_arrivals

PROFILE = paper_profile()


@settings(max_examples=12)
@given(st.integers(0, 10**6), st.sampled_from([50.0, 400.0, 1500.0]), st.floats(0.05, 1.5))
def test_no_policy_passes_it(seed: int, rate_per_s: float, duration_s: float) -> None:
    rng = np.random.default_rng(seed)
    queries = make_queries(rng, poisson_arrivals(rng, np.full(3, rate_per_s), duration_s / 3), PAPER_KINDS)
    bound = clairvoyant_bound(queries, PROFILE, 64)
    assert bound <= sum(query.utility for query in queries)
    for name in [*POLICIES, "fixed:-20", "fixed:8"]:
        run = simulate(Engine(PROFILE, make_policy(name, PROFILE)), queries, np.zeros(len(queries)))
        assert run.expected_utility <= bound + 1e-9


@settings(max_examples=25)
@given(
    st.lists(
        st.tuples(st.sampled_from(sorted(PROFILE.accuracy)), st.integers(0, 5), st.integers(1, 12), st.integers(1, 5)),
        min_size=1,
        max_size=3,
    )
)
def test_no_schedule_passes_it(asked: list[tuple[str, int, int, int]]) -> None:
    """Every order and gamma of up to three queries, alone or with the next of the order in one batch."""
    queries = [
        Query(id, task, arrival / 200, arrival / 200 + latency / 100, float(utility))
        for id, (task, arrival, latency, utility) in enumerate(asked)
    ]
    best = 0.0
    for order in itertools.permutations(queries):
        for joins in itertools.product([False, True], repeat=len(order) - 1):
            batches: list[list[Query]] = [[order[0]]]
            for query, join in zip(order[1:], joins, strict=True):
                if join:
                    batches[-1].append(query)
                else:
                    batches.append([query])
            for gammas in itertools.product((None, *PROFILE.gammas[::2]), repeat=len(batches)):
                clock_s, utility = 0.0, 0.0
                for batch, gamma in zip(batches, gammas, strict=True):
                    if gamma is None:
                        continue
                    clock_s = max(clock_s, *(query.arrival_s for query in batch))
                    clock_s += PROFILE.batch_time_s(gamma, len(batch))
                    utility += sum(
                        PROFILE.accuracy_of(query.task, gamma) * query.utility
                        for query in batch
                        if clock_s <= query.deadline_s
                    )
                best = max(best, utility)
    assert clairvoyant_bound(queries, PROFILE, 3, slot_s=0.01) >= best - 1e-9


@settings(max_examples=8)
@given(st.integers(0, 10**6), st.sampled_from([2, 3, 8]), st.sampled_from([100.0, 400.0, 600.0]))
def test_no_policy_passes_it_with_several_executors(seed: int, executors: int, rate_per_s: float) -> None:
    rng = np.random.default_rng(seed)
    queries = make_queries(rng, poisson_arrivals(rng, np.full(3, executors * rate_per_s), 0.2), PAPER_KINDS)
    bound = clairvoyant_bound(queries, PROFILE, 64, executors=executors)
    assert bound >= clairvoyant_bound(queries, PROFILE, 64) * (1 - 1e-3)
    for name in POLICIES:
        engine = Engine(PROFILE, make_policy(name, PROFILE), executors=executors)
        run = simulate(engine, queries, np.zeros(len(queries)))
        assert run.expected_utility <= bound + 1e-9
        assert sum(engine.outcomes.values()) == len(queries)


@pytest.mark.parametrize(("name", "least"), [("exact", 0.95), ("otas", 0.93), ("infaas", 0.93)])
def test_rivals_lose_little_with_several_executors(name: str, least: float) -> None:
    shares = []
    for executors in (1, 4):
        rng = np.random.default_rng(5)
        rate_per_s = 1.25 * executors * PROFILE.capacity_per_s(0)
        queries = make_queries(rng, poisson_arrivals(rng, np.full(1, rate_per_s), 3.0), PAPER_KINDS)
        bound = clairvoyant_bound(queries, PROFILE, 64, executors=executors)
        luck_N = np.zeros(len(queries))
        if name == "infaas":
            profile, policy, takes_s = infaas.simulated(PROFILE, infaas.PAPER_MEMORY_BYTES, executors)
            run = simulate(Engine(profile, policy, adapts=False, executors=executors), queries, luck_N, takes_s)
        else:
            run = simulate(Engine(PROFILE, make_policy(name, PROFILE), executors=executors), queries, luck_N)
        shares.append(run.expected_utility / bound)
    assert shares[1] >= max(least, shares[0] - 0.02)


@pytest.mark.parametrize("executors", [1, 2, 4, 8])
def test_priced_is_near_it_with_any_number_of_executors(executors: int) -> None:
    rng = np.random.default_rng(5)
    rate_per_s = 1.25 * executors * PROFILE.capacity_per_s(0)
    queries = make_queries(rng, poisson_arrivals(rng, np.full(1, rate_per_s), 3.0), PAPER_KINDS)
    engine = Engine(PROFILE, make_policy("priced", PROFILE), executors=executors)
    run = simulate(engine, queries, np.zeros(len(queries)))
    assert run.expected_utility >= 0.97 * clairvoyant_bound(queries, PROFILE, 64, executors=executors)


def test_with_time_for_all_it_is_the_best_accuracy() -> None:
    queries = [Query(id, "CIFAR100", float(id), id + 1.0, 1.0) for id in range(5)]
    assert clairvoyant_bound(queries, PROFILE, 64) == pytest.approx(5 * 0.898)
    assert clairvoyant_bound([], PROFILE, 64) == 0.0


def test_with_no_time_at_all_it_is_nearly_nothing() -> None:
    queries = [Query(id, "CIFAR100", 0.0, 0.0005, 1.0) for id in range(100)]
    assert clairvoyant_bound(queries, PROFILE, 64, slot_s=0.0005) < 2
