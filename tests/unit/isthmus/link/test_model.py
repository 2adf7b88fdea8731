"""The model of a link: when packets arrive, that they keep their order, and that the same seed gives the same link."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.link.model import PACKET_BYTES, Direction, LinkState, Phase, Trace, next_distance, transmit


def arrivals(direction: Direction, sent: list[tuple[float, int]], key: str = "0/up") -> list[float]:
    state, found = LinkState(), []
    for at_s, size in sent:
        state, arrives_s = transmit(direction, state, at_s, size, key=key)
        found.append(arrives_s)
    return found


def test_a_rate_makes_packets_wait_for_each_other() -> None:
    slow = Direction((Phase(rate_bytes_s=1_000, delay_s=0.1),))
    assert arrivals(slow, [(0, 500), (0, 500), (5, 100)]) == pytest.approx([0.6, 1.1, 5.2])


def test_a_stall_holds_what_was_sent_and_a_rate_goes_on_after_it() -> None:
    link = Direction((Phase(for_s=1, rate_bytes_s=1_000), Phase(for_s=2, stall=True), Phase(rate_bytes_s=1_000)))
    assert arrivals(link, [(0.5, 1_000)]) == pytest.approx([3.5]), "half before the stall, half after it"
    assert arrivals(link, [(1.5, 0)]) == pytest.approx([3.0])


def test_a_stall_without_end_delivers_nothing_and_neither_does_a_repeated_one() -> None:
    assert arrivals(Direction((Phase(stall=True),)), [(0, 1)]) == [math.inf]
    assert arrivals(Direction((Phase(for_s=1, stall=True),), repeat=True), [(0, 1)]) == [math.inf]


def test_a_trace_delivers_at_its_times_and_repeats() -> None:
    """Packets share an opportunity if they fit in; one that nobody used is lost (Mahimahi)."""
    link = Direction((Phase(trace=Trace((0.010, 0.010, 0.050))),))
    assert arrivals(link, [(0, 1_500), (0, 700), (0, 800), (0, 1)]) == pytest.approx([0.010, 0.010, 0.010, 0.050])
    assert arrivals(link, [(0.020, 3_000)]) == pytest.approx([0.060]), "the second packet leaves in the next turn"
    assert arrivals(link, [(0.0505, 10)]) == pytest.approx([0.060])


def test_lost_packets_arrive_after_they_were_sent_again() -> None:
    lossy = Direction((Phase(loss=0.3, delay_s=0.05),))
    found = arrivals(lossy, [(10.0 * number, 100) for number in range(2_000)])
    late = [arrives_s - 10.0 * number > 0.06 for number, arrives_s in enumerate(found)]
    assert 0.25 < sum(late) / len(late) < 0.35
    assert min(each - 10 * number for number, each in enumerate(found)) == pytest.approx(0.05)


@given(
    st.lists(st.tuples(st.floats(0, 0.5), st.integers(1, PACKET_BYTES)), min_size=1, max_size=40),
    st.lists(
        st.builds(
            Phase,
            for_s=st.floats(0.05, 2),
            rate_bytes_s=st.none() | st.floats(100, 1e6),
            delay_s=st.floats(0, 0.3),
            jitter_s=st.floats(0, 0.3),
            loss=st.floats(0, 0.5),
            stall=st.booleans(),
        ),
        min_size=1,
        max_size=4,
    ),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_nothing_arrives_early_or_out_of_order_and_the_same_seed_is_the_same_link(
    gaps: list[tuple[float, int]], phases: list[Phase], repeat: bool
) -> None:
    direction = Direction(tuple(phases), repeat=repeat)
    times = itertools.accumulate(gap for gap, _ in gaps)
    sent = [(at_s, size) for at_s, (_, size) in zip(times, gaps, strict=True)]
    found = arrivals(direction, sent)
    assert all(arrives_s >= at_s for arrives_s, (at_s, _) in zip(found, sent, strict=True))
    assert found == sorted(found)
    assert found == arrivals(direction, sent)


@given(st.floats(0, 1e5), st.lists(st.floats(0.001, 50), min_size=1, max_size=5), st.booleans())
@settings(max_examples=100, deadline=None)
def test_every_moment_is_in_a_phase_that_ends_later(at_s: float, lengths: list[float], repeat: bool) -> None:
    direction = Direction(tuple(Phase(for_s=each) for each in lengths), repeat=repeat)
    _, phase, end_s = direction.at(at_s)
    assert end_s > at_s
    assert phase in direction.phases


def test_distances_have_their_mean() -> None:
    found = [next_distance(50.0, "key", number) for number in range(4_000)]
    assert min(found) >= 1
    assert 47 < sum(found) / len(found) < 53


@pytest.mark.parametrize(
    ("phase", "said"),
    [
        ({"for_s": 0.0}, "for_s must be above 0"),
        ({"for_s": math.nan}, "for_s must be above 0"),
        ({"rate_bytes_s": 0.0}, "'stall: true' stops the link"),
        ({"rate_bytes_s": 1.0, "trace": Trace((1.0,))}, "not both"),
        ({"loss": 1.0}, "loss is a share"),
        ({"delay_s": -1.0}, "delay_s must be a number from 0 on"),
        ({"jitter_s": math.inf}, "jitter_s"),
        ({"cut_at_byte": (5, -1)}, "cut_at_byte must be 0 or more"),
    ],
)
def test_a_phase_that_cannot_be_is_refused(phase: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Direction((Phase(**phase),))  # type: ignore[arg-type]


def test_a_phase_without_end_must_be_the_last() -> None:
    with pytest.raises(ValueError, match="phase 1 never ends"):
        Direction((Phase(), Phase()))
    with pytest.raises(ValueError, match="phase 1 never ends"):
        Direction((Phase(),), repeat=True)
