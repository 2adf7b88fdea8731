"""The compression policy on a table of links, and how measurements move the estimate."""

import pytest

from isthmus.edge.link.compression import (
    LinkEstimate,
    choose,
    make_policy,
    observe_answer,
    observe_transfer,
    predicted_s,
)
from isthmus.proto.messages import NumberType

POLICY = make_policy(512, (1.0, 2.0), (NumberType.FP32, NumberType.INT8), latency_budget_s=0.1)


def test_settings_run_from_least_to_most_compressed() -> None:
    described = [(setting.ratio, setting.number_type, setting.frame_bytes) for setting in POLICY.settings]
    assert described == [
        (1.0, NumberType.FP32, 4112),
        (2.0, NumberType.FP32, 2064),
        (1.0, NumberType.INT8, 1048),
        (2.0, NumberType.INT8, 536),
    ]


@pytest.mark.parametrize(
    ("throughput_bytes_s", "round_trip_s", "expected"),
    [(1e6, 0.01, 4112), (40e3, 0.02, 2064), (20e3, 0.02, 1048), (8e3, 0.01, 536), (1e6, 0.2, None), (1e3, 0.0, None)],
)
def test_the_least_compressed_setting_within_the_budget(
    throughput_bytes_s: float, round_trip_s: float, expected: int | None
) -> None:
    chosen = choose(POLICY, LinkEstimate(throughput_bytes_s, round_trip_s), None, link_up=True)
    assert (None if chosen is None else chosen.frame_bytes) == expected


def test_no_link_answers_locally_and_an_unknown_one_is_treated_gently() -> None:
    assert choose(POLICY, LinkEstimate(1e6, 0.01), POLICY.settings[0], link_up=False) is None
    assert choose(POLICY, LinkEstimate(), None, link_up=True) == POLICY.settings[-1]


def test_hysteresis_holds_on_the_edge() -> None:
    finest = POLICY.settings[0]
    on_the_edge = LinkEstimate(1e6, 0.09)
    assert choose(POLICY, on_the_edge, finest, link_up=True) == finest
    assert choose(POLICY, on_the_edge, None, link_up=True) is None
    assert choose(POLICY, LinkEstimate(1e6, 0.05), None, link_up=True) == finest


def test_measurements_are_smoothed() -> None:
    first = observe_answer(LinkEstimate(), 1000, elapsed_s=0.11, server_s=0.01)
    assert first.round_trip_s == pytest.approx(0.1)
    second = observe_answer(first, 1000, elapsed_s=0.51, server_s=0.01)
    assert second.round_trip_s == pytest.approx(0.2)
    moved = observe_transfer(second, 1_000_000, elapsed_s=1.2)
    assert moved.throughput_bytes_s == pytest.approx(1e6)
    assert observe_transfer(moved, 100, elapsed_s=1.0) == moved
    assert predicted_s(moved, POLICY.settings[0]) == pytest.approx(0.2 + 0.01 + 4112e-6)


@pytest.mark.parametrize(("budget_s", "margin"), [(0.0, 0.2), (-1.0, 0.2), (0.1, 1.0)])
def test_a_policy_that_makes_no_sense(budget_s: float, margin: float) -> None:
    with pytest.raises(ValueError, match="latency budget"):
        make_policy(512, (1.0,), (NumberType.FP32,), budget_s, margin)
    with pytest.raises(ValueError, match="at least one"):
        make_policy(512, (), (NumberType.FP32,), 0.1)
