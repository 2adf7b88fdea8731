"""The ranks of all waiting requests at once are the ranks of each alone, whatever came, went and lost its place."""

from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.cloud.generation.policies.by_name import learning_lengths
from isthmus.cloud.generation.policies.jitserve import _Gains
from isthmus.cloud.generation.policies.lengths import KnownLengths, LengthPredictor, NearestLengths
from isthmus.cloud.generation.policies.orders import Fair, FirstCome, Order, Shortest
from isthmus.cloud.generation.policies.paced import _Promises
from isthmus.cloud.generation.policies.queue import Queue
from isthmus.cloud.generation.scheduling.policy import Life, Limits, State
from isthmus.cloud.generation.scheduling.request import Request


def learned(name: str) -> LengthPredictor:
    lengths = learning_lengths(name)
    for at in range(40):
        kind = "ab"[at % 2]
        lengths.learn(
            Life(Request(at, range(5 + at), 500, 0.0, kind=kind), [0] * (3 + (at * 7) % (20 + 30 * (at % 2))))
        )
    return lengths


ORDERS = {
    "first come": lambda: FirstCome(),
    "fair": lambda: Fair(),
    "sjf": lambda: Shortest("sjf", learned("sjf")),
    "srpt": lambda: Shortest("srpt", learned("srpt")),
    "hrrn": lambda: Shortest("hrrn", learned("hrrn")),
    "srpt, known": lambda: Shortest("srpt", KnownLengths(lambda id: 5 + id % 3)),
    "srpt, nearest": lambda: Shortest("srpt", NearestLengths()),
    "srpt, cold": lambda: Shortest("srpt", learning_lengths("srpt")),
    "paced": lambda: _Promises(learned("paced"), 16),
    "jitserve": lambda: _Gains(learned("jitserve")),
}


@st.composite
def lives(draw: st.DrawFn) -> list[Life]:
    made = []
    wish = st.one_of(st.none(), st.floats(0.01, 20.0))
    for id in range(draw(st.integers(1, 12))):
        arrival_s, deadline_s = draw(st.floats(0, 400)), draw(wish)
        request = Request(
            id,
            range(draw(st.integers(1, 300))),
            400,
            arrival_s,
            user=draw(st.sampled_from("xy")),
            kind=draw(st.sampled_from("abc")),
            ttft_s=draw(wish),
            tpot_s=draw(st.one_of(st.none(), st.sampled_from([0.01, 0.1, 1.0]))),
            deadline_s=None if deadline_s is None else arrival_s + deadline_s,
        )
        made.append(Life(request))
    return made


def same(found: Any, expected: Any) -> bool:
    """Whether two ranks are equal, apart from the last bits of what was computed in another order."""
    return all(
        a == b if isinstance(a, bool) else a == pytest.approx(b, rel=1e-9) for a, b in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("name", ORDERS)
@settings(max_examples=25)
@given(made=lives(), data=st.data())
def test_the_line_is_in_the_order_of_the_ranks(name: str, made: list[Life], data: st.DataObject) -> None:
    order: Order = ORDERS[name]()
    under_way: dict[int, Life] = {}
    blocks: dict[int, int] = {}
    coming = list(made)
    now_s = 0.0
    for _ in range(8):
        for _ in range(data.draw(st.integers(0, 3))):
            if coming:
                life = coming.pop(0)
                under_way[life.id] = life
                order.arrived(life)
        for id in data.draw(st.lists(st.sampled_from(sorted(under_way) or [-1]), max_size=2, unique=True)):
            if id in blocks:  # preempted: with its tokens aside, or to be computed again
                del blocks[id]
                under_way[id].computed = data.draw(st.sampled_from([0, under_way[id].known - 1]))
            elif id in under_way:
                blocks[id] = 1
                under_way[id].tokens.append(0)
                under_way[id].computed = under_way[id].known - 1
        for id in data.draw(st.lists(st.sampled_from(sorted(under_way) or [-1]), max_size=1)):
            if id in under_way:
                life = under_way.pop(id)
                blocks.pop(id, None)
                order.left(life)
        now_s += data.draw(st.sampled_from([0.0, 0.1, 50.0, 200.0]))
        state = State(under_way, Limits(rows=2), blocks, 100)
        order.look(now_s, state)
        line = order.line(state)
        assert {life.id for life in line} == under_way.keys() - blocks.keys() and len(set(map(id_of, line))) == len(
            line
        )
        ranks = [order.rank(life) for life in line]
        assert all(same(a, b) for a, b in zip(ranks, sorted(ranks), strict=True))


def id_of(life: Life) -> int:
    return life.id


def test_a_queue_has_room_for_all_and_forgets_the_classes_that_nobody_uses() -> None:
    queue = Queue()
    for id in range(3_000):
        life = Life(Request(id, range(3), 4, 0.0, kind=f"kind {id}"))
        queue.arrived(life)
        if id % 3:
            queue.left(life)
    waiting = queue.waiting({})
    assert sorted(waiting.id_N.tolist()) == [float(id) for id in range(0, 3_000, 3)]
    assert all(
        waiting.kinds[kind] == life.request.kind for life, kind in zip(waiting.lives, waiting.kind_N, strict=True)
    )
    assert len(waiting.kinds) <= 2_048


@pytest.mark.parametrize("seed", range(8))
def test_counters_that_are_dropped_change_no_rank(seed: int) -> None:
    """Clients choose the names of users, and there may be always somebody here; so counters must not pile up."""
    random = Random(seed)
    small, whole = Fair(), Fair()
    small._most = small.KNOWN = 8  # type: ignore[misc]
    whole._most = 1 << 60
    here: list[Life] = []
    for id in range(1_500):
        if len(here) < 4 or random.random() < 0.5:
            prompt = range(random.randint(1, 9))
            here.append(Life(Request(id, prompt, 9, arrival_s=float(id), user=f"user {random.choice((id, id % 20))}")))
            for fair in (small, whole):
                fair.arrived(here[-1])
                fair.admitted(here[-1])
        else:
            least = min(range(len(here)), key=lambda at: whole.rank(here[at]))
            here[least].tokens += [1] * random.randint(1, 9)
            gone = here.pop(least)
            for fair in (small, whole):
                fair.left(gone)
        assert [small.rank(life) for life in here] == [whole.rank(life) for life in here]
    assert len(small.counters) < 150 < 300 < len(whole.counters)
