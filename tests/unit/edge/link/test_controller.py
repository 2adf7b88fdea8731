"""The choice between cloud and own answer: what moves it, and what it never does."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.edge.link import controller
from isthmus.edge.link.compression import Setting, make_policy
from isthmus.edge.link.controller import LinkHistory
from isthmus.proto.messages import NumberType, PublicMeasure

RATIOS = (1.0, 2.0, 3.0)
BUDGET_S = 0.3
POLICY = make_policy(512, RATIOS, tuple(NumberType), BUDGET_S)
SMALLEST, LARGEST = POLICY.settings[-1], POLICY.settings[0]
WORTH = controller.worths(POLICY, None, RATIOS)


def after(elapsed_s: list[float], setting: Setting = SMALLEST, every_s: float = 1.0) -> tuple[LinkHistory, float]:
    """Return the history after answers that took so long, one clip after the other, and the time."""
    history, now_s = LinkHistory(), 0.0
    for sequence, each in enumerate(elapsed_s):
        history = controller.sent(history, sequence, setting.frame_bytes, now_s)
        history = controller.arrived(history, sequence, now_s + each)
        now_s += max(every_s, each)
    return history, now_s


def chosen(history: LinkHistory, now_s: float, current: Setting | None = None) -> Setting | None:
    return controller.decide(POLICY, history, WORTH, current, BUDGET_S, now_s).setting


def test_the_cloud_is_asked_before_anything_is_known() -> None:
    assert chosen(LinkHistory(), 0.0) is not None


def test_a_cloud_that_is_worth_nothing_is_never_asked() -> None:
    measured = PublicMeasure(100, 0.7, 0.5, (), (0.7, 0.69, 0.6))
    worth = controller.worths(POLICY, measured, RATIOS)
    assert max(worth) <= 0
    history, now_s = after([0.05] * 20)
    assert controller.decide(POLICY, history, worth, None, BUDGET_S, now_s).setting is None


def test_the_ratio_that_is_worth_most_is_asked_on_a_quick_link() -> None:
    worth = controller.worths(POLICY, PublicMeasure(100, 0.6, 0.5, (), (0.62, 0.7, 0.61)), RATIOS)
    history, now_s = after([0.02] * 20)
    setting = controller.decide(POLICY, history, worth, None, BUDGET_S, now_s).setting
    assert setting is not None and setting.ratio == 2.0


def test_a_slow_link_gets_the_smallest_frames_and_larger_ones_are_tried_again_later() -> None:
    history, now_s = after([0.1] * 10)
    history = controller.sent(history, 100, LARGEST.frame_bytes, now_s)
    history = controller.arrived(history, 100, now_s + 1.5)
    small = chosen(history, now_s + 2)
    assert small is not None and small.frame_bytes < LARGEST.frame_bytes / 4
    quick, later_s = after([0.02] * 20)
    easy = chosen(quick, later_s)
    assert easy is not None and easy.frame_bytes > small.frame_bytes


def test_a_late_answer_moves_the_estimate() -> None:
    quick, now_s = after([0.05] * 10)
    slow, _ = after([0.05] * 5 + [0.9] * 5)
    before = controller.probability(quick, SMALLEST.frame_bytes, BUDGET_S, now_s)
    assert controller.probability(slow, SMALLEST.frame_bytes, BUDGET_S, now_s) < before - 0.3


def test_silence_lowers_the_probability_the_longer_it_lasts_and_an_answer_ends_it() -> None:
    history, now_s = after([0.05] * 10)
    waiting = controller.sent(history, 50, SMALLEST.frame_bytes, now_s)
    at = [controller.probability(waiting, SMALLEST.frame_bytes, BUDGET_S, now_s + wait_s) for wait_s in (0.1, 1, 5, 50)]
    assert at == sorted(at, reverse=True) and at[0] > 0.9 > 0.1 > at[-1]
    heard = controller.arrived(waiting, 50, now_s + 50)
    assert controller.overdue_s(heard, now_s + 60) == 0.0
    assert controller.probability(heard, SMALLEST.frame_bytes, BUDGET_S, now_s + 50) > 0.8


def test_a_connection_that_owes_an_answer_is_replaced_after_growing_times() -> None:
    history, now_s = LinkHistory(), 0.0
    waits = []
    for sequence in range(5):
        history = controller.sent(history, sequence, 100, now_s)
        began_s = now_s
        while not controller.is_stuck(history, now_s):
            now_s += 0.25
        waits.append(now_s - began_s)
        history = controller.renewed(history, now_s)
        assert not history.in_flight
    assert waits == pytest.approx([2.25, 4.25, 8.25, 12.25, 12.25])
    history = controller.arrived(controller.sent(history, 9, 100, now_s), 9, now_s + 0.1)
    assert history.renewals == 0


def test_a_broken_stream_is_opened_again_within_a_second() -> None:
    history = LinkHistory()
    for attempt in range(20):
        history = controller.broke(history, float(attempt), 0.999)
        assert chosen(history, history.reopen_at_s - 1e-6) is None
        assert history.reopen_at_s <= attempt + controller.REOPEN_MOST_S
        assert chosen(history, history.reopen_at_s) is not None


def test_too_many_unanswered_frames_stop_the_questions() -> None:
    history = LinkHistory()
    for sequence in range(controller.MOST_IN_FLIGHT):
        history = controller.sent(history, sequence, 100, 0.0)
    assert chosen(history, 0.1) is None
    assert chosen(controller.closed(history), 0.1) is not None


def test_an_answer_tells_that_earlier_frames_are_lost() -> None:
    history = LinkHistory()
    for sequence in range(3):
        history = controller.sent(history, sequence, 100, float(sequence))
    history = controller.arrived(history, 2, 2.1)
    assert [each.elapsed_s for each in history.samples] == [math.inf, math.inf, pytest.approx(0.1)]
    assert controller.arrived(history, 1, 3.0) == history, "twice, or unknown"


@given(
    st.lists(st.one_of(st.floats(0.001, 3.0), st.just(math.inf)), max_size=30),
    st.floats(0.01, 2.0),
    st.floats(0, 100),
    st.integers(0, len(POLICY.settings) - 1),
)
@settings(max_examples=80, deadline=None)
def test_probabilities_are_probabilities_and_more_time_never_lowers_them(
    elapsed_s: list[float], budget_s: float, later_s: float, place: int
) -> None:
    history, now_s = LinkHistory(), 0.0
    for sequence, each in enumerate(elapsed_s):
        setting = POLICY.settings[(sequence * 5) % len(POLICY.settings)]
        history = controller.sent(history, sequence, setting.frame_bytes, now_s)
        now_s += 1.0
        if math.isfinite(each):
            history = controller.arrived(history, sequence, now_s + each)
            now_s += each
    assert len(history.samples) <= controller.MOST_SAMPLES
    size = POLICY.settings[place].frame_bytes
    p = controller.probability(history, size, budget_s, now_s + later_s)
    assert 0 <= p <= 1
    assert controller.probability(history, size, 2 * budget_s, now_s + later_s) >= p - 1e-9
    assert controller.probability(history, size, 0.0, now_s) == 0.0


def test_a_rate_seen_in_a_download_holds_until_a_frame_shows_another() -> None:
    assumed = controller.assumed_rate(LinkHistory(), 2_000.0, 0.0)
    assert chosen(assumed, 0.0) == chosen(LinkHistory(), 0.0), "no answer yet: nothing to conclude from"
    known = controller.arrived(controller.sent(assumed, 0, SMALLEST.frame_bytes, 0.0), 0, 0.1)
    large, small = (controller.probability(known, each.frame_bytes, BUDGET_S, 1.0) for each in (LARGEST, SMALLEST))
    assert large < small
    assert controller.assumed_rate(known, 1e9, 1.0).byte_s == known.byte_s
