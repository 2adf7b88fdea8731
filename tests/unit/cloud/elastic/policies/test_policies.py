"""Each policy on the same few queries, and the order of the policies under load."""

from dataclasses import replace

import numpy as np
import pytest

from isthmus.cloud.elastic.policies.baselines import Clipper
from isthmus.cloud.elastic.policies.by_name import POLICIES, Policy, make_policy
from isthmus.cloud.elastic.policies.infaas import (
    LITTLE_MEMORY_BYTES,
    PAPER_MEMORY_BYTES,
    SIZES,
    Infaas,
    ModelsInMemory,
    freest,
    loading_executor,
    memory_named,
    sizes_profile,
)
from isthmus.cloud.elastic.policies.priced import DEARER, LONGEST, Priced
from isthmus.cloud.elastic.scheduling.engine import Engine, Work
from isthmus.cloud.elastic.scheduling.policy import EPSILON, Choice
from isthmus.cloud.elastic.scheduling.profile import paper_profile
from isthmus.cloud.elastic.scheduling.query import IN_TIME, Batch, Outcome, Query
from isthmus.cloud.elastic.scheduling.simulate import draws, simulate
from isthmus.cloud.elastic.scheduling.workload import queries_at_load, wandering_rates
from isthmus.proto.errors import InvalidInput

PROFILE = paper_profile()


def queries(count: int, *, task: str = "CIFAR100", utility: float = 1.0, latency_s: float = 0.6) -> list[Query]:
    return [Query(id, task, 0.0, latency_s, utility) for id in range(count)]


def told(name: str, waiting: list[Query]) -> Policy:
    policy = make_policy(name, PROFILE)
    for query in waiting:
        policy.arrived(query)
    return policy


@pytest.mark.parametrize("name", [*POLICIES, "fixed:-5"])
def test_nothing_waits_nothing_runs(name: str) -> None:
    assert make_policy(name, PROFILE).choose(0.0).queries == ()


@pytest.mark.parametrize("name", ["priced", "exact"])
def test_alone_a_query_gets_the_most_accurate_gamma(name: str) -> None:
    assert told(name, queries(1)).choose(0.0).gamma == 8


@pytest.mark.parametrize("name", ["priced", "exact", "otas"])
def test_a_crowd_is_hurried(name: str) -> None:
    crowd = [Query(id, "CIFAR10", 0.0, 0.6, 0.3) for id in range(500)]
    choice = told(name, crowd).choose(0.1)
    assert choice.gamma < 0
    assert choice.queries


def test_our_batches_hold_what_wants_one_gamma() -> None:
    crowd = [Query(id, "CIFAR100" if id % 2 else "CIFAR10", 0.0, 0.6, 1.0 if id % 2 else 0.3) for id in range(300)]
    policy = told("priced", crowd)
    assert isinstance(policy, Priced) and policy.price_per_s(0.0) > 0
    choice = policy.choose(0.0)
    assert len({query.task for query in choice.queries}) == 1


def test_our_batches_are_in_time_to_the_last_query() -> None:
    crowd = [Query(id, "CIFAR100", 0.0, 0.02 + 0.001 * id, 1.0) for id in range(200)]
    choice = told("priced", crowd).choose(0.0)
    end_s = PROFILE.batch_time_s(choice.gamma, len(choice.queries))
    assert all(query.deadline_s >= end_s for query in choice.queries)


@pytest.mark.parametrize("latency_s", [0.3, 0.6, 5.0, 60.0])
@pytest.mark.parametrize("fixed_s", [0.0, 0.01, 0.5])
def test_our_batches_are_short_but_no_dearer_for_it_than_bearable(latency_s: float, fixed_s: float) -> None:
    """``fixed_s``: of every batch, beside what its images take."""
    profile = replace(
        PROFILE, latency_s={gamma: tuple(s + fixed_s for s in times) for gamma, times in PROFILE.latency_s.items()}
    )
    policy = make_policy("priced", profile)
    for query in queries(300, latency_s=latency_s):
        policy.arrived(query)
    choice = policy.choose(0.0)
    size, times_s = len(choice.queries), profile.times_s(choice.gamma)
    if not size:
        assert latency_s < min(profile.batch_time_s(gamma, 1) for gamma in profile.gammas)
        return
    costs_s = [times_s[n] / n for n in range(1, EPSILON + 1)]
    too_dear = size == 1 or times_s[size - 1] / (size - 1) > (1 + DEARER) * min(costs_s)
    assert times_s[size] <= LONGEST * latency_s or too_dear
    could_hold_more = size < EPSILON and times_s[size + 1] <= LONGEST * latency_s
    assert not could_hold_more or times_s[size + 1] > latency_s


def test_a_deadline_too_near_for_the_best_gamma_gets_a_faster_one() -> None:
    choice = told("priced", queries(1, latency_s=0.0085)).choose(0.0)
    assert [query.id for query in choice.queries] == [0]
    assert PROFILE.batch_time_s(choice.gamma, 1) <= 0.0085


def test_what_is_worth_little_runs_when_nothing_else_waits() -> None:
    policy = told("priced", queries(3, utility=0.0))
    assert len(policy.choose(0.0).queries) == 3


def test_many_different_utilities_stay_few_kinds() -> None:
    policy = Priced()
    policy.use(PROFILE)
    for id, utility in enumerate(np.geomspace(1e-3, 1.0, 5_000).tolist()):
        policy.arrived(Query(id, "CIFAR10", 0.0, 1.0, utility))
    assert len(policy._kinds) < 40
    assert len(policy.choose(0.0).queries) == 64


def test_a_task_that_goes_leaves_its_queries_to_the_executor() -> None:
    for name in ("priced", "exact", "otas"):
        policy = told(name, queries(2))
        policy.use(PROFILE.without_task("CIFAR100"))
        assert policy.choose(0.0).queries or name != "priced"


def test_unknown_names_and_gammas_are_told() -> None:
    for name in ("best", "fixed:x", "fixed:3"):
        with pytest.raises(ValueError):
            make_policy(name, PROFILE)
    with pytest.raises(ValueError, match="sizes_profile"):
        Engine(PROFILE, Infaas())


def test_infaas_pays_for_loading_and_keeps_to_one_task() -> None:
    profile = sizes_profile(PROFILE)
    assert profile.batch_time_s(0, 64) == pytest.approx(PROFILE.batch_time_s(0, 64))
    assert profile.batch_time_s(-1, 64) < PROFILE.batch_time_s(0, 64) < profile.batch_time_s(1, 64)
    engine, takes_s = Engine(profile, Infaas()), loading_executor()
    for id, task in enumerate(["CIFAR10", "CIFAR100", "CIFAR10"]):
        engine.submit(Query(id, task, 0.0, 10.0, 1.0), 0.0)
    first = engine.next_work(0.0).work
    assert first is not None and [query.task for query in first.batch.queries] == ["CIFAR10", "CIFAR10"]
    base = next(size for size in SIZES if size.level == first.gamma)
    assert takes_s(first) == pytest.approx(base.load_s + first.predicted_s)
    assert takes_s(first) == pytest.approx(first.predicted_s)


@pytest.mark.parametrize("seconds", [(0.004, 0.003), (0.004, 0.001), (0.001, 0.9)])
def test_sizes_follow_from_a_profile_of_a_busy_machine_too(seconds: tuple[float, float]) -> None:
    base = replace(PROFILE, gammas=(0,), sizes=(1, 8), accuracy={"t": {0: 0.9}}, latency_s={0: seconds})
    found = sizes_profile(base)
    assert found.latency_s[0] == pytest.approx(seconds)
    for small, large, given in zip(found.latency_s[-1], found.latency_s[1], seconds, strict=True):
        assert 0 < small <= given <= large


def test_infaas_sends_a_batch_to_the_executor_that_holds_its_model() -> None:
    base = SIZES[1]
    profile = sizes_profile(PROFILE)
    takes_s = loading_executor(memory_bytes=base.memory_bytes, executors=2)

    def loading_s(task: str, now_s: float) -> float:
        work = Work(0, Batch((Query(0, task, now_s, 100.0, 1.0),)), 0, now_s, profile.batch_time_s(0, 1))
        return takes_s(work) - work.predicted_s

    assert [loading_s(task, 0.0) for task in ("a", "b")] == [pytest.approx(base.load_s)] * 2, "one model on each"
    for now_s, task in ((10.0, "b"), (10.0, "a"), (20.0, "a"), (30.0, "a"), (40.0, "b")):
        assert loading_s(task, now_s) == pytest.approx(0)
    assert freest([0, 1], [3.0, 2.0], [True, True]) == 1 and freest([0], [9.0, 0.0], [False, True]) == 0


def test_the_model_used_longest_ago_makes_room() -> None:
    small, base, large = SIZES
    models = ModelsInMemory(2 * base.memory_bytes)
    assert models.use("a", base) == (True, [])
    assert models.use("b", base) == (True, [])
    assert models.use("a", base) == (False, [])
    assert models.use("a", small) == (True, [("b", 0)])
    assert models.use("b", base) == (True, [("a", 0)])
    assert models.use("b", large) == (True, [("a", -1), ("b", 0)])  # more than there is: it runs, alone
    assert models.use("b", large) == (False, [])


def test_with_the_papers_memory_no_model_is_ever_loaded_and_with_little_only_the_base_ones_are_there() -> None:
    tasks = ("a", "b", "c")
    plenty, little = (ModelsInMemory(of, tasks) for of in (PAPER_MEMORY_BYTES, LITTLE_MEMORY_BYTES))
    assert not any(plenty.use(task, size)[0] for _ in range(2) for task in tasks for size in SIZES)
    assert [little.use(task, SIZES[1])[0] for task in tasks] == [False, False, False]
    assert little.use("a", SIZES[0]) == (True, [("a", 0)])


@pytest.mark.parametrize(
    ("name", "memory_bytes"),
    [("priced", None), ("fixed:-5", None), ("infaas", PAPER_MEMORY_BYTES), ("infaas:1.04", 1_040_000_000)],
)
def test_the_name_of_infaas_says_its_memory(name: str, memory_bytes: int | None) -> None:
    assert memory_named(name) == memory_bytes


@pytest.mark.parametrize("name", ["infaas:", "infaas:much", "infaas:-1", "infaas:nan", "infaas:inf"])
def test_impossible_memories_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"such as infaas:1\.04"):
        memory_named(name)


def test_clipper_grows_by_one_until_a_batch_is_too_slow_and_then_shrinks_by_a_tenth() -> None:
    clipper = Clipper()
    clipper.use(PROFILE)
    for query in queries(400):  # 0.6 s requested, so a batch may take 0.3 s
        clipper.arrived(query)
    for size in range(1, 41):
        assert len(clipper.choose(0.0).queries) == clipper.largest == size
        clipper.ran(size, 0.29)
    assert len(clipper.choose(0.0).queries) == 41
    clipper.ran(41, 0.31)
    assert clipper.largest == 36
    clipper.ran(10, 0.1)  # it was not full, so it proves nothing
    assert clipper.largest == 36
    for _ in range(60):
        clipper.choose(0.0)
        clipper.ran(clipper.largest, 9.0)
    assert clipper.largest == 1


def test_dynamic_batching_fills_a_preferred_size_or_waits_for_the_delay() -> None:
    policy = make_policy("dynamic:4+8:5", PROFILE)
    assert policy.gammas == (0,)
    assert policy.choose(0.0) == Choice()
    for query in queries(3):
        policy.arrived(query)
    first_s = min(query.arrival_s for query in queries(3))
    assert policy.choose(first_s) == Choice(wait_until_s=first_s + 0.005)
    assert [query.id for query in policy.choose(first_s + 0.005).queries] == [0, 1, 2], "as it is, after the delay"
    for query in queries(11)[3:]:
        policy.arrived(query)
    filled = policy.choose(first_s).queries
    assert [query.id for query in filled] == list(range(8)), "the largest size that is filled, at once"
    for query in filled:
        policy.left(query)
    assert policy.choose(first_s).queries == (), "3 wait for a fourth"


def test_dynamic_batching_without_settings_takes_what_waits() -> None:
    policy = make_policy("dynamic:", PROFILE)
    for query in queries(70):
        policy.arrived(query)
    assert [query.id for query in policy.choose(0.0).queries] == list(range(64))
    waiting = make_policy("dynamic::5", PROFILE)
    for query in queries(64):
        waiting.arrived(query)
    assert len(waiting.choose(0.0).queries) == 64, "a batch that cannot grow does not wait"


@pytest.mark.parametrize("settings", ["many", "0", "65", "8:soon", "8:-1", "8:inf", "8:nan", "8,16:1"])
def test_impossible_settings_of_dynamic_batching_are_refused(settings: str) -> None:
    with pytest.raises(ValueError, match=r"such as dynamic:16\+32:5"):
        make_policy(f"dynamic:{settings}", PROFILE)


def test_under_overload_clippers_batches_meet_the_goal_and_those_of_pets_do_not() -> None:
    asked = [Query(id, "CIFAR100", id / 450, id / 450 + 0.1, 1.0) for id in range(2_000)]  # 365 per second are served
    luck_N = np.full(len(asked), 0.5)
    clipper, pets = (
        simulate(Engine(PROFILE, make_policy(name, PROFILE)), asked, luck_N) for name in ("clipper", "pets")
    )
    settled = [batch for batch in clipper.batches if batch.start_s > 2]
    assert (
        np.mean([batch.end_s - batch.start_s for batch in settled])
        < 0.05
        < max(batch.end_s - batch.start_s for batch in settled)
    )
    assert max(batch.size for batch in settled) < 20 < 40 < max(batch.size for batch in pets.batches)


def test_queries_that_permit_one_gamma_run_at_it_together_and_count_in_the_price() -> None:
    """At 1.5 times the load, a third of the queries insists on gamma 0. All of them run at it or not at all."""
    rng = np.random.default_rng(3)
    asked = [
        replace(query, gammas=frozenset({0})) if query.id % 3 == 0 else query
        for query in queries_at_load(rng, wandering_rates(rng, 6), 1.5, PROFILE)
    ]
    fixed = {query.id for query in asked if query.gammas}
    engine = Engine(PROFILE, make_policy("priced", PROFILE))
    ran: list[Work] = []

    def takes_s(work: Work) -> float:
        ran.append(work)
        return PROFILE.batch_time_s(work.gamma, len(work.batch))

    run = simulate(engine, asked, draws(rng, len(asked)), takes_s)
    gammas = {query.id: work.gamma for work in ran for query in work.batch.queries}
    assert {gammas[id] for id in fixed & gammas.keys()} == {0}
    assert min(gammas.values()) < 0, "the others are merged"
    assert sum(len(work.batch) for work in ran if work.gamma == 0) / sum(work.gamma == 0 for work in ran) > 4
    free = [replace(query, gammas=None) for query in asked]
    most = simulate(Engine(PROFILE, make_policy("priced", PROFILE)), free, draws(rng, len(free))).expected_utility
    assert 0.6 * most < run.expected_utility < most


@pytest.mark.parametrize("name", ["exact", "otas", "pets", "clipper", "throughput", "fixed:0"])
def test_a_policy_that_cannot_keep_to_a_gamma_refuses_to_try(name: str) -> None:
    engine = Engine(PROFILE, make_policy(name, PROFILE))
    with pytest.raises(InvalidInput, match="ask its operator for --elastic-policy priced"):
        engine.submit(Query(0, "CIFAR10", 0.0, 1.0, 1.0, frozenset({0})), 0.0)
    engine.submit(Query(0, "CIFAR10", 0.0, 1.0, 1.0), 0.0)


def test_a_query_that_permits_only_slow_gammas_is_not_run_at_fast_ones_to_be_in_time() -> None:
    policy = told("priced", [Query(0, "CIFAR100", 0.0, 0.0075, 1.0, frozenset({8, -20}))])
    assert policy.choose(0.0).gamma == -20, "8 tokens more would take 9.6 ms"
    policy = told("priced", [Query(0, "CIFAR100", 0.0, 0.0075, 1.0, frozenset({8}))])
    assert policy.choose(0.0).queries == ()


def test_under_overload_ours_comes_first() -> None:
    rng = np.random.default_rng(5)
    asked = queries_at_load(rng, wandering_rates(rng, 12), 1.6, PROFILE)
    luck_N = draws(rng, len(asked))
    earned = {
        name: simulate(Engine(PROFILE, make_policy(name, PROFILE)), asked, luck_N).expected_utility
        for name in ("priced", "exact", "otas", "pets", "fixed:0")
    }
    assert earned["priced"] == max(earned.values())
    assert earned["priced"] > 1.18 * earned["pets"]
    assert earned["priced"] > 1.18 * earned["fixed:0"]
    assert earned["exact"] >= earned["otas"]


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_time_that_some_callers_give_costs_the_others_nothing(share: float) -> None:
    rng = np.random.default_rng(7)
    asked = queries_at_load(rng, wandering_rates(rng, 5), 1.5, PROFILE)
    patient = [replace(query, deadline_s=query.arrival_s + 60) if rng.random() < share else query for query in asked]
    luck_N = draws(rng, len(asked))
    hasty, mixed = (
        simulate(Engine(PROFILE, make_policy("priced", PROFILE)), each, luck_N) for each in (asked, patient)
    )
    assert mixed.expected_utility > 0.995 * hasty.expected_utility
    assert mixed.share(Outcome.LATE) == 0
    evicted = sum(
        outcome is Outcome.EVICTED and query.deadline_s - query.arrival_s < 2
        for query, outcome in zip(patient, mixed.outcomes, strict=True)
    )
    assert evicted <= hasty.outcomes.count(Outcome.EVICTED)


def test_a_burst_of_patient_queries_is_forgotten_once_others_arrive() -> None:
    """As after a load generator has warmed a server up, with a minute for each of its queries."""
    rng = np.random.default_rng(8)
    asked = queries_at_load(rng, wandering_rates(rng, 5), 1.2, PROFILE)
    luck_N = draws(rng, len(asked))
    clean = simulate(Engine(PROFILE, make_policy("priced", PROFILE)), asked, luck_N)
    policy = Priced()
    engine = Engine(PROFILE, policy)
    for number in range(1_000):
        fixed = frozenset({PROFILE.gammas[number % len(PROFILE.gammas)]})
        query = Query(10**6 + number, "CIFAR10", -4.0 + number / 500, 56.0, 1.0, fixed)
        policy.arrived(query)
        policy.left(query)
    after = simulate(engine, asked, luck_N)
    assert after.expected_utility > 0.995 * clean.expected_utility


def test_a_burst_of_patient_queries_is_worked_off_before_all_of_it_is_urgent() -> None:
    """As a nightly job beside people who wait. With its first latency as weight, a third of it was never answered."""
    rng = np.random.default_rng(1)
    asked = queries_at_load(rng, np.full(13, 1.0), 0.8, PROFILE)
    job = [Query(0, "CIFAR100", 1.0, 11.0, 1.0) for _ in range(1_500)]
    together = sorted([*asked, *job], key=lambda query: query.arrival_s)
    together = [replace(query, id=id) for id, query in enumerate(together)]
    run = simulate(Engine(PROFILE, make_policy("priced", PROFILE)), together, draws(rng, len(together)))
    of_job = [outcome for query, outcome in zip(together, run.outcomes, strict=True) if query.deadline_s == 11.0]
    assert len(of_job) == len(job) and sum(outcome in IN_TIME for outcome in of_job) > 0.98 * len(job)


def test_a_choice_is_the_same_when_asked_again() -> None:
    waiting = queries(40, latency_s=60.0) + [replace(one, id=one.id + 100) for one in queries(9, latency_s=0.3)]
    policy = told("priced", waiting)
    assert policy.choose(0.05) == policy.choose(0.05)


def test_ten_times_overload_goes_on_doing_useful_work() -> None:
    rng = np.random.default_rng(6)
    asked = queries_at_load(rng, wandering_rates(rng, 3), 10, PROFILE)
    engine = Engine(PROFILE, make_policy("priced", PROFILE), max_waiting=2_000)
    run = simulate(engine, asked, draws(rng, len(asked)))
    assert engine.waiting == 0
    # Even the least accurate gamma earns this much on the dearest sixth of the queries.
    dearest = sum(query.utility for query in asked if query.utility == 1.0)
    assert run.expected_utility > 0.3 * dearest
    assert run.share(Outcome.LATE) == 0
