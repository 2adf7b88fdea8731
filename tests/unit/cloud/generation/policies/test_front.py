"""The front of several replicas: dispatch to the freest, order while they are full, failures, drain; and who moves."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.cloud.generation.policies.front import FIRST_PAUSE_S, MOST_PAUSE_S, Front
from isthmus.cloud.generation.policies.orders import Fair
from isthmus.cloud.generation.scheduling.engine import Overloaded
from isthmus.cloud.generation.scheduling.policy import Life, Limits
from isthmus.cloud.generation.scheduling.replicas import Standing, freest, moves
from isthmus.cloud.generation.scheduling.request import Request
from isthmus.proto.errors import InvalidInput


def life(id: int, prompt: int = 16, user: str = "") -> Life:
    return Life(Request(id, range(prompt), 16, arrival_s=float(id), user=user))


def test_the_freest_replica_gets_the_next_request() -> None:
    front = Front([Limits(rows=4, blocks=32), Limits(rows=4, blocks=64)])
    for id in range(3):
        front.submit(life(id))
    assert front.send(0.0) == [(0, 1), (1, 1), (2, 0)]


def test_while_all_are_full_the_order_decides_who_is_next() -> None:
    front = Front([Limits(rows=1, blocks=8)], Fair())
    for id, user in enumerate(["heavy", "heavy", "light"]):
        front.submit(life(id, user=user))
    assert front.send(0.0) == [(0, 0)]
    front.ended(0)
    assert front.send(0.0) == [(2, 0)], "the user who was served less is before an earlier request"


def test_a_replica_that_fails_for_days_is_tried_again_after_the_longest_pause() -> None:
    front = Front([Limits(rows=1, blocks=16)])
    for _ in range(2_000):
        front.lost(0, 5.0)
    front.submit(life(0))
    assert front.send(5.0) == [] and front.next_try_s(5.0) == 5.0 + MOST_PAUSE_S
    assert front.send(5.0 + MOST_PAUSE_S) == [(0, 0)]


def test_a_request_that_lost_its_replica_waits_with_its_old_rank_and_not_for_the_lost_one() -> None:
    front = Front([Limits(rows=1, blocks=16), Limits(rows=1, blocks=8)])
    for id in range(3):
        front.submit(life(id))
    assert front.send(0.0) == [(0, 0), (1, 1)]
    front.lost(0, 0.0)
    front.wait_again(0)
    assert front.send(0.0) == [] and front.next_try_s(0.0) == FIRST_PAUSE_S
    front.ended(1)
    assert front.send(0.5) == [(0, 1)]
    assert front.send(FIRST_PAUSE_S) == [(2, 0)]
    front.lost(0, 1.0)
    assert front.next_try_s(1.0) == 1.0 + 2 * FIRST_PAUSE_S
    front.answered(0)
    assert front.next_try_s(1.0) is None


def test_too_many_and_too_long_ones_are_refused() -> None:
    front = Front([Limits(rows=1, blocks=2)], max_requests=1)
    with pytest.raises(InvalidInput, match="more than any replica"):
        front.submit(life(0, prompt=40))
    front.submit(life(1))
    with pytest.raises(Overloaded):
        front.submit(life(2))


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 8), st.booleans(), st.booleans()), min_size=1, max_size=6))
def test_moves_go_from_less_free_to_freer_replicas_and_each_is_in_one_pair(
    drawn: list[tuple[int, int, bool, bool]],
) -> None:
    standings = [
        Standing(at, 50, used if rows else 0, rows, 0, draining, ready)
        for at, (used, rows, draining, ready) in enumerate(drawn)
    ]
    pairs = moves(standings, least_gap=2.0)
    named = [id for pair in pairs for id in pair]
    assert len(set(named)) == len(named)
    for source, target in pairs:
        assert standings[target].open and standings[source].rows
        assert standings[source].draining or standings[target].freeness > standings[source].freeness + 2.0
    best = freest(standings)
    assert best is None or standings[best].freeness == max(each.freeness for each in standings)
