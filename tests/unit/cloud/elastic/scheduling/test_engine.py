"""The engine's rules, one by one; tests/property has them all at once under random loads."""

import pytest

from isthmus.cloud.elastic.policies.baselines import FixedGamma
from isthmus.cloud.elastic.policies.by_name import Choice, Fifo
from isthmus.cloud.elastic.scheduling.engine import Engine, Overloaded
from isthmus.cloud.elastic.scheduling.profile import paper_profile
from isthmus.cloud.elastic.scheduling.query import Batch, Outcome, Query
from isthmus.proto.errors import InvalidInput


def query(id: int, arrival_s: float = 0.0, latency_s: float = 1.0) -> Query:
    return Query.asked(id, "CIFAR10", arrival_s, latency_s, 0.3)


def engine(**settings: int) -> Engine:
    return Engine(paper_profile(), Fifo(), **settings)


def test_queries_run_together_and_end_once() -> None:
    served = engine()
    for id in range(3):
        served.submit(query(id), 0.0)
    work = served.next_work(0.0).work
    assert work is not None and [each.id for each in work.batch.queries] == [0, 1, 2]
    assert work.predicted_s == pytest.approx(paper_profile().batch_time_s(0, 3))
    assert served.next_work(0.0).work is None
    settled = served.finished(work, [True, False, None], 0.02)
    assert [outcome for _, outcome in settled] == [
        Outcome.CORRECT_IN_TIME,
        Outcome.WRONG_IN_TIME,
        Outcome.ANSWERED_IN_TIME,
    ]
    with pytest.raises(KeyError):
        served.finished(work, [True] * 3, 0.02)
    with pytest.raises(KeyError):
        served.failed(work, 0.02)


def test_an_answer_after_the_deadline_is_late() -> None:
    served = engine()
    served.submit(query(1), 0.0)
    work = served.next_work(0.0).work
    assert work is not None
    assert served.finished(work, [True], 1.01) == [(work.batch.queries[0], Outcome.LATE)]


def test_the_hopeless_are_evicted_before_they_cost_anything() -> None:
    served = engine()
    served.submit(query(1, latency_s=0.5), 0.0)
    served.submit(query(2, latency_s=2.0), 0.0)
    decision = served.next_work(0.495)
    assert [each.id for each in decision.evicted] == [1]
    assert decision.work is not None and [each.id for each in decision.work.batch.queries] == [2]
    assert served.outcomes[Outcome.EVICTED] == 1


def test_a_broken_batch_fails_its_queries_and_nothing_else() -> None:
    served = engine()
    served.submit(query(1), 0.0)
    work = served.next_work(0.0).work
    served.submit(query(2), 0.0)
    assert work is not None
    assert served.failed(work, 0.01) == [(work.batch.queries[0], Outcome.FAILED)]
    after = served.next_work(0.01).work
    assert after is not None and after.batch.queries[0].id == 2


def test_no_more_wait_than_may() -> None:
    served = engine(max_waiting=2)
    served.submit(query(1), 0.0)
    served.submit(query(2), 0.0)
    with pytest.raises(Overloaded):
        served.submit(query(3), 0.0)
    assert served.waiting == 2


def test_bad_queries_are_not_taken() -> None:
    served = engine()
    served.submit(query(1), 0.0)
    with pytest.raises(InvalidInput, match="already"):
        served.submit(query(1), 0.0)
    with pytest.raises(InvalidInput, match="registered"):
        served.submit(Query(2, "birds", 0.0, 1.0, 1.0), 0.0)
    for latency_s, utility in (
        (-1.0, 1.0),
        (0.0, 1.0),
        (1e9, 1.0),
        (float("nan"), 1.0),
        (1.0, float("nan")),
        (1.0, -1),
    ):
        with pytest.raises(InvalidInput):
            Query.asked(3, "CIFAR10", 0.0, latency_s, utility)


def test_a_caller_that_left_frees_its_place() -> None:
    served = engine()
    served.submit(query(1), 0.0)
    assert served.cancel(1) == query(1)
    assert served.cancel(1) is None
    assert served.next_work(0.0).work is None
    served.submit(query(2), 0.0)
    work = served.next_work(0.0).work
    assert work is not None
    assert served.cancel(2) is None
    assert len(served.finished(work, [None], 0.1)) == 1


def test_a_clock_that_goes_back_stands_still() -> None:
    served = engine()
    served.submit(query(1, arrival_s=100.0, latency_s=0.5), 100.0)
    work = served.next_work(0.0).work
    assert work is not None and work.started_s == 100.0


def test_memory_splits_a_batch() -> None:
    profile = paper_profile()
    with_memory = type(profile)(
        profile.key,
        profile.gammas,
        profile.sizes,
        profile.accuracy,
        profile.latency_s,
        dict.fromkeys(profile.gammas, (100, 6400)),
    )
    served = Engine(with_memory, Fifo(), memory_limit_bytes=500)
    for id in range(12):
        served.submit(query(id), 0.0)
    sizes = []
    while work := served.next_work(0.0).work:
        assert with_memory.memory_bytes(0, len(work.batch)) <= 500
        sizes.append(len(work.batch))
        served.finished(work, [True] * len(work.batch), 0.0)
    assert sizes == [5, 5, 2]


def test_waiting_says_until_when() -> None:
    class Idle(Fifo):
        def choose(self, now_s: float) -> Choice:
            return Choice(wait_until_s=0.9)

    served = Engine(paper_profile(), Idle())
    assert served.next_work(0.0).wait_until_s == 0.9
    served.submit(query(1, latency_s=0.5), 0.0)
    assert served.next_work(0.0).wait_until_s == pytest.approx(0.5 - paper_profile().batch_time_s(0, 1))


def test_a_policy_that_invents_queries_is_stopped() -> None:
    class Inventive(Fifo):
        def choose(self, now_s: float) -> Choice:
            return Choice((query(7),), 0)

    with pytest.raises(ValueError, match="not waiting"):
        Engine(paper_profile(), Inventive()).next_work(0.0)


def test_batches_know_their_deadline_and_split_in_order() -> None:
    batch = Batch((query(1, 0.1, 1.0), query(2, 0.2, 0.6), query(3, 0.3, 1.0)))
    assert (batch.first_arrival_s, batch.deadline_s, batch.utility) == (0.1, pytest.approx(0.8), 0.3)
    assert [[each.id for each in part.queries] for part in batch.split(2)] == [[1, 2], [3]]
    with pytest.raises(ValueError):
        Batch(())


def test_a_lost_batch_runs_once_more_where_time_allows() -> None:
    served = engine(executors=2)
    for id, latency_s in ((1, 1.0), (2, 0.02), (3, 1.0)):
        served.submit(query(id, latency_s=latency_s), 0.0)
    first = served.next_work(0.0).work
    assert first is not None and len(first.batch) == 3
    assert [(each.id, outcome) for each, outcome in served.lost(first, 0.02)] == [(2, Outcome.FAILED)]
    again = served.next_work(0.02).work
    assert again is not None and [each.id for each in again.batch.queries] == [1, 3]
    assert served.cancel(1) is None, "it runs"
    assert [each.id for each, _ in served.lost(again, 0.05)] == [1, 3], "a second loss is the last"
    assert (served.waiting, served.running, served.outcomes[Outcome.FAILED]) == (0, 0, 3)
    with pytest.raises(KeyError):
        served.lost(again, 0.05)


def uneven() -> Engine:
    """Two free executors at time 1, of which the first has taken three times as long as the profile says."""
    profile = paper_profile()
    served = Engine(profile, FixedGamma(0), executors=2)
    for id in range(32):
        served.submit(query(id, latency_s=100.0), 0.0)
    first, second = served.next_work(0.0, 0).work, None
    assert first is not None and first.executor == 0
    for id in range(32, 64):
        served.submit(query(id, latency_s=100.0), 0.0)
    second = served.next_work(0.0).work
    assert second is not None and second.executor == 1, "the only free one"
    served.finished(second, [True] * 32, profile.batch_time_s(0, 32))
    served.finished(first, [True] * 32, 3 * profile.batch_time_s(0, 32))
    return served


def test_the_fastest_free_executor_takes_the_next_batch_and_is_planned_with_its_own_time() -> None:
    served, profile = uneven(), paper_profile()
    assert served.pace_of(0) > 1.5 and served.pace_of(1) == 1
    assert 1 < served.pace < served.pace_of(0) and served.fastest([0, 1]) == 1
    for id in (100, 101):
        served.submit(query(id, 1.0, latency_s=10.0 * id), 1.0)
    first = served.next_work(1.0).work
    served.submit(query(102, 1.0), 1.0)
    second = served.next_work(1.0).work
    assert first is not None and second is not None and served.next_work(1.0).work is None
    assert (first.executor, first.predicted_s) == (1, profile.batch_time_s(0, len(first.batch)))
    slowed = profile.slowed(served.pace_of(0))
    assert (second.executor, second.predicted_s) == (0, slowed.batch_time_s(0, len(second.batch)))


def test_a_slow_executor_leaves_to_a_fast_one_what_it_cannot_answer_in_time() -> None:
    served, profile = uneven(), paper_profile()
    latency_s = 1.2 * profile.batch_time_s(0, 1)
    served.submit(query(100, 1.0, latency_s), 1.0)
    decision = served.next_work(1.0, 0)
    assert (decision.work, decision.evicted) == (None, ()), "too slow, and nobody's fault"
    found = served.next_work(1.0, 1)
    assert found.work is not None and [each.id for each in found.work.batch.queries] == [100]
    served.count_on([0])
    served.submit(query(101, 1.0, latency_s), 1.0)
    served.failed(found.work, 1.0)
    assert [each.id for each in served.next_work(1.0, 0).evicted] == [101], "no faster one is there now"


def test_only_a_free_executor_that_is_counted_on_gets_work() -> None:
    served = engine(executors=2)
    for id in range(2):
        served.submit(query(id), 0.0)
    work = served.next_work(0.0, 1).work
    assert work is not None
    for executor in (1, 2):
        with pytest.raises(ValueError, match="not free"):
            served.next_work(0.0, executor)
    with pytest.raises(ValueError, match="at least 1"):
        served.count_on([])


def test_a_free_executor_gets_work_while_one_that_plans_no_longer_count_on_ends_its_batch() -> None:
    served = engine(executors=2)
    served.submit(query(0), 0.0)
    ending = served.next_work(0.0, 1).work
    assert ending is not None
    served.count_on([0])
    served.submit(query(1), 0.0)
    work = served.next_work(0.0).work
    assert work is not None and work.executor == 0
    served.submit(query(2), 0.0)
    assert served.next_work(0.0).work is None, "all that plans count on are busy"
    served.finished(ending, [True] * len(ending.batch), 0.1)
    assert served.next_work(0.1).work is None
