"""The scheduler: best model by number, warmed profiles, and the chapter's throughput rule in the engine."""

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.cloud.elastic.policies.by_name import make_policy
from isthmus.cloud.elastic.policies.throughput import ThroughputRule
from isthmus.cloud.elastic.scheduling.engine import Engine
from isthmus.cloud.elastic.scheduling.profile import BadProfile, MachineKey, Profile
from isthmus.cloud.elastic.scheduling.query import Query
from isthmus.cloud.elastic.scheduling.simulate import simulate
from isthmus.cloud.elastic.warm.profiled import Profiled, Table, warmed_profile

TABLE: Table = {
    "vanilla": {0: 0.9, 8: 0.6, 16: 0.2},
    "tuned-8": {0: 0.88, 8: 0.85, 16: 0.5},
    "tuned-16": {0: 0.6, 8: 0.7, 16: 0.8},
}
GAMMAS = (-16, -8, 0, 2)
RATES = {-16: 400, -8: 200, 0: 100, 2: 80}


def profile() -> Profile:
    latency_s = {gamma: (1 / rate, 64 / rate) for gamma, rate in RATES.items()}
    shares = {-16: 0.2, -8: 0.6, 0: 0.9, 2: 0.92}
    return Profile(MachineKey("p", "cpu", 1, "float32", "m"), GAMMAS, (1, 64), {"birds": shares}, latency_s)


def test_the_best_model_of_each_number() -> None:
    models = Profiled(TABLE)
    assert models.best() == {0: "vanilla", 8: "tuned-8", 16: "tuned-16"}
    assert models.ranked(8) == ("tuned-8", "tuned-16", "vanilla")
    assert Profiled({"b": {0: 0.5}, "a": {0: 0.5}, "c": {}}).ranked(0) == ("a", "b")
    assert models.warmed(GAMMAS) == {-16: 0.8, -8: 0.85, 0: 0.9}


def test_the_vanilla_model_stays_where_another_is_better_by_luck_at_most() -> None:
    table = {"vanilla": {0: 0.66, 8: 0.60}, "tuned-8": {0: 0.67, 8: 0.65}, "tuned-16": {0: 0.665, 8: 0.64}}
    unknown, few, many = Profiled(table), Profiled(table, 1_000), Profiled(table, 10_000)
    assert unknown.ranked(0) == ("tuned-8", "tuned-16", "vanilla"), (
        "nobody says how many pictures: the best is the best"
    )
    assert few.ranked(0) == ("vanilla", "tuned-8", "tuned-16"), "one standard error is 1.5 points"
    assert many.ranked(0)[0] == "tuned-8"
    assert few.best() == {0: "vanilla", 8: "tuned-8"}
    assert few.warmed([-8, 0]) == {-8: 0.65, 0: 0.66}
    del table["vanilla"]
    assert Profiled(table, 1_000).ranked(0) == ("tuned-8", "tuned-16")


@given(st.dictionaries(st.sampled_from(["vanilla", "a", "b", "c"]), st.floats(0, 1), min_size=1), st.integers(0, 10**6))
def test_whoever_comes_first_is_no_worse_than_the_best_by_more_than_noise(
    shares: dict[str, float], pictures: int
) -> None:
    order = Profiled({name: {4: share} for name, share in shares.items()}, pictures).ranked(4)
    best = max(shares.values())
    assert sorted(order) == sorted(shares)
    noise = math.sqrt(best * (1 - best) / pictures) if pictures else 0.0
    assert best - shares[order[0]] <= noise
    others = [shares[name] for name in order if name != "vanilla"]
    assert others == sorted(others, reverse=True)


def test_a_warmed_profile_plans_with_the_best_models_accuracy() -> None:
    warmed = warmed_profile(profile(), "birds", Profiled(TABLE))
    assert warmed.accuracy["birds"] == {-16: 0.8, -8: 0.85, 0: 0.9, 2: 0.92}
    assert warmed.models == {"birds": {-16: "tuned-16", -8: "tuned-8", 0: "vanilla"}}
    assert Profile.from_json(warmed.to_json()) == warmed
    assert warmed.without_task("birds").models == {}
    with pytest.raises(ValueError, match="not profiled at 16"):
        warmed_profile(profile(), "birds", Profiled({"vanilla": {0: 0.9, 8: 0.6}}))
    with pytest.raises(BadProfile, match="models for a task"):
        dataclasses.replace(profile(), models={"fish": {0: "vanilla"}})


@given(st.floats(0, 1_000))
def test_the_rule_is_the_smallest_number_that_keeps_up(rate: float) -> None:
    rule = ThroughputRule()
    rule.use(profile())
    wanted = next((gamma for gamma in (0, -8, -16) if RATES[gamma] > rate), -16)
    assert rule.gamma_for(rate) == wanted


def served(rate: float, seconds: float = 3.0) -> list[int]:
    """The gammas of the batches under steady arrivals."""
    warmed = warmed_profile(profile(), "birds", Profiled(TABLE))
    queries = [Query(id, "birds", id / rate, id / rate + 1.0, 1.0) for id in range(int(rate * seconds))]
    run = simulate(Engine(warmed, make_policy("throughput", warmed)), queries, _luck(len(queries)))
    assert all(outcome is not None for outcome in run.outcomes)
    return [batch.gamma for batch in run.batches]


def _luck(count: int) -> "object":
    import numpy as np

    return np.full(count, 0.5)


@pytest.mark.parametrize(("rate", "gamma"), [(50, 0), (150, -8), (300, -16)])
def test_in_the_engine_it_settles_on_the_number_for_the_load(rate: float, gamma: int) -> None:
    gammas = served(rate)
    later = gammas[len(gammas) // 2 :]
    assert later.count(gamma) > 0.6 * len(later)


def test_a_profile_without_reduction_is_refused() -> None:
    prompted = Profile(MachineKey("p", "cpu", 1, "f", "m"), (2,), (1,), {}, {2: (0.1,)})
    with pytest.raises(ValueError, match="no gamma of 0 or below"):
        make_policy("throughput", prompted)
