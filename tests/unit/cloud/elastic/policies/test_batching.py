"""Alg. 1 by example, and against a plain reading of it."""

from hypothesis import given
from hypothesis import strategies as st

from isthmus.cloud.elastic.policies.batching import BatchingRule, BatchQueue
from isthmus.cloud.elastic.scheduling.query import Query


def query(id: int, arrival_s: float, latency_s: float = 1.0, utility: float = 0.3) -> Query:
    return Query(id, "CIFAR10", arrival_s, arrival_s + latency_s, utility)


def ids(queue: BatchQueue) -> list[list[int]]:
    return [[each.id for each in batch.queries] for batch in queue.by_deadline()]


def test_like_queries_share_a_batch() -> None:
    queue = BatchQueue()
    for id in range(3):
        queue.add(query(id, id / 10))
    assert ids(queue) == [[0, 1, 2]]


def test_each_rule_opens_a_new_batch() -> None:
    for rule, other in (
        (BatchingRule(delta_s=0.05), query(1, 0.1)),
        (BatchingRule(epsilon=1), query(1, 0.1)),
        (BatchingRule(), query(1, 0.1, latency_s=1.5)),
        (BatchingRule(), query(1, 0.1, utility=1.2)),
    ):
        queue = BatchQueue(rule)
        queue.add(query(0, 0.0))
        queue.add(other)
        assert len(queue) == 2


def test_a_full_batch_is_passed_over_for_an_older_one() -> None:
    queue = BatchQueue(BatchingRule(epsilon=2))
    queue.add(query(0, 0.0))
    queue.add(query(1, 0.1, utility=2.0))
    queue.add(query(2, 0.2, utility=2.0))
    queue.add(query(3, 0.3))
    assert ids(queue) == [[0, 3], [1, 2]]


def test_what_leaves_takes_its_deadline_along() -> None:
    queue = BatchQueue()
    early, late = query(0, 0.0, latency_s=0.6), query(1, 0.1, latency_s=0.9)
    queue.add(early)
    queue.add(late)
    assert queue.by_deadline()[0].deadline_s == early.deadline_s
    queue.remove(early)
    assert queue.by_deadline()[0].deadline_s == late.deadline_s
    queue.remove(late)
    assert len(queue) == 0


asked = st.lists(
    st.tuples(st.integers(0, 30), st.sampled_from([0.3, 0.6, 1.0, 2.0]), st.sampled_from([0.01, 0.5, 1.0, 2.0])),
    max_size=40,
)


@given(asked, st.integers(1, 4))
def test_equals_a_plain_reading(values: list[tuple[int, float, float]], epsilon: int) -> None:
    rule = BatchingRule(epsilon=epsilon)
    queries, at_s = [], 0.0
    for id, (step, latency_s, utility) in enumerate(values):
        at_s += step / 50
        queries.append(query(id, at_s, latency_s, utility))
    queue = BatchQueue(rule)
    plain: list[list[Query]] = []
    for one in queries:
        queue.add(one)
        for batch in reversed(plain):
            if batch[0].arrival_s + rule.delta_s < one.arrival_s:
                plain.append([one])
                break
            if (
                len(batch) < epsilon
                and abs(min(other.deadline_s for other in batch) - one.deadline_s) <= rule.eta_s
                and abs(batch[0].utility - one.utility) <= rule.mu
            ):
                batch.append(one)
                break
        else:
            plain.append([one])
    plain.sort(key=lambda batch: min(other.deadline_s for other in batch))
    assert ids(queue) == [[other.id for other in batch] for batch in plain]
