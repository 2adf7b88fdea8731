"""When calls are due, and the figures of what became of them."""

import numpy as np
import pytest

from isthmus.cloud.load.arrivals import poisson, replayed
from isthmus.cloud.load.outcomes import Sent, figures


def test_poisson_arrivals_have_their_rate_and_its_spread() -> None:
    times_N = poisson(50.0, 200.0, seed=1)
    assert (np.diff(times_N) >= 0).all() and times_N[0] >= 0 and times_N[-1] < 200
    gaps_N = np.diff(times_N)
    assert len(times_N) == pytest.approx(10_000, rel=0.04)
    assert gaps_N.std() == pytest.approx(gaps_N.mean(), rel=0.05), "gaps are exponential"
    assert np.array_equal(times_N, poisson(50.0, 200.0, seed=1))


def test_a_trace_keeps_its_shape_at_another_rate() -> None:
    trace_N = np.array([10.0, 10.0, 11.0, 19.0, 20.0])
    assert replayed(trace_N, 4.0, 100.0) == pytest.approx([0.0, 0.0, 0.1, 0.9, 1.0])
    assert len(replayed(trace_N, 4.0, 0.5)) == 3
    for wrong in ([1.0], [1.0, 1.0]):
        with pytest.raises(ValueError, match="different times"):
            replayed(np.array(wrong), 1.0, 1.0)
    for rate, duration in ((0.0, 1.0), (1.0, -1.0), (float("nan"), 1.0)):
        with pytest.raises(ValueError, match="positive"):
            poisson(rate, duration, 0)


def test_late_answers_are_answers_but_no_goodput() -> None:
    sent = [Sent(0.0, 0.0, 0.010, "ok"), Sent(0.1, 0.002, 0.300, "ok"), Sent(0.2, 0.0, 0.001, "Busy")]
    found = figures(sent, 2.0, 0.2)
    assert (found["sent"], found["answered_per_s"], found["goodput_per_s"]) == (3, 1.0, 0.5)
    assert found["errors"] == {"Busy": 1}
    assert found["latency_ms"]["p50"] == pytest.approx(155.0)
    assert found["in_time_share"] == pytest.approx(1 / 3, abs=1e-4)
    assert figures([], 1.0, 1.0)["latency_ms"] is None
    assert "right_share" not in found


def test_right_answers_count_within_the_deadline() -> None:
    sent = [
        Sent(0.0, 0.0, 0.010, "ok", True),
        Sent(0.1, 0.0, 0.300, "ok", True),
        Sent(0.2, 0.0, 0.010, "ok", False),
        Sent(0.3, 0.0, 0.001, "Busy"),
    ]
    found = figures(sent, 2.0, 0.2)
    assert found["right_share"] == pytest.approx(2 / 3, abs=1e-4) and found["right_in_time_share"] == 0.25
