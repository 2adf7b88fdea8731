"""PURE: what became of each call, and the figures of a run."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

GOOD: Final = "ok"


@dataclass(frozen=True, slots=True)
class Sent:
    """A call: when it was due, how late it was sent, how long its answer took since it was due, and how it ended.

    ``outcome``: ``GOOD``, or the name of the error. ``right``: whether the answer was right; None: nobody knows. Times
    are seconds.
    """

    due_s: float
    lag_s: float
    latency_s: float
    outcome: str
    right: bool | None = None


def figures(sent: Sequence[Sent], duration_s: float, deadline_s: float) -> dict[str, Any]:
    """Return the figures of a run: rates per second, latencies of good answers in milliseconds, and errors by name.

    Latency counts from the time at which a call was due, so time that it waited within the load generator counts too.
    Goodput is the rate of good answers within the deadline. If it is known which answers were right, two shares are
    there too: of right answers among all answers, and of calls answered rightly within the deadline among all calls.
    """
    good_s = np.array([each.latency_s for each in sent if each.outcome == GOOD])
    in_time = int((good_s <= deadline_s).sum())
    errors = Counter(each.outcome for each in sent if each.outcome != GOOD)
    return {
        **_rightness(sent, deadline_s),
        "sent": len(sent),
        "sent_per_s": round(len(sent) / duration_s, 2),
        "answered_per_s": round(len(good_s) / duration_s, 2),
        "goodput_per_s": round(in_time / duration_s, 2),
        "in_time_share": round(in_time / len(sent), 4) if sent else 0.0,
        "latency_ms": percentiles_ms(good_s),
        "errors": dict(sorted(errors.items())),
        "generator_lag_ms": percentiles_ms(np.array([each.lag_s for each in sent])),
    }


def _rightness(sent: Sequence[Sent], deadline_s: float) -> dict[str, float]:
    known = [each for each in sent if each.right is not None]
    if not known:
        return {}
    in_time = sum(each.latency_s <= deadline_s for each in known if each.right)
    return {
        "right_share": round(sum(bool(each.right) for each in known) / len(known), 4),
        "right_in_time_share": round(in_time / len(sent), 4),
    }


def percentiles_ms(seconds_N: Any) -> dict[str, float] | None:
    """Return percentiles of times, in milliseconds; None if there are none."""
    if not len(seconds_N):
        return None
    found = np.percentile(seconds_N, [50, 90, 99, 99.9]) * 1e3
    return {name: round(float(each), 3) for name, each in zip(("p50", "p90", "p99", "p99.9"), found, strict=True)}
