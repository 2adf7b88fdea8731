"""PURE: what a run of requests shows: times, goodput, waste, and fairness between users. All times in seconds."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from isthmus.cloud.generation.scheduling.request import Outcome
from isthmus.cloud.generation.scheduling.simulate import End, Run


def report(run: Run) -> dict[str, Any]:
    """Returns the figures of a run; times are over the requests that finished.

    ``goodput`` is the share of all requests that were in time, ``goodput_tokens`` their share of the tokens that were
    generated in all. ``occupancy`` is the mean number of rows that decode in a step.
    """
    done = [end for end in run.ends if end.outcome is Outcome.FINISHED]
    tokens = sum(len(end.life.tokens) for end in run.ends)
    everyone = len(run.ends) + len(run.refused)
    in_time = [end for end in done if end.in_time]
    return {
        "requests": everyone,
        "refused": len(run.refused),
        "outcomes": {each.value: sum(end.outcome is each for end in run.ends) for each in Outcome},
        "seconds": run.end_s,
        "tokens": tokens,
        "tokens_per_s": tokens / run.end_s if run.end_s else 0.0,
        "goodput": len(in_time) / max(1, everyone),
        "goodput_tokens": sum(len(end.life.tokens) for end in in_time) / max(1, tokens),
        "latency_s": _spread([end.end_s - end.life.request.arrival_s for end in done]),
        "ttft_s": _spread([ttft_s(end) for end in done]),
        "tpot_s": _spread(
            [(end.end_s - _first_s(end)) / (len(end.life.tokens) - 1) for end in done if len(end.life.tokens) > 1]
        ),
        "largest_gap_s": _spread([end.life.largest_gap_s for end in done]),
        "steps": run.steps,
        "busy": run.busy_s / run.end_s if run.end_s else 0.0,
        "occupancy": run.rows / max(1, run.steps),
        "preempted": sum(end.life.preempted for end in run.ends),
        "swapped": sum(end.life.swapped for end in run.ends),
        "shared_tokens": sum(end.life.shared for end in run.ends),
        "recomputed_tokens": sum(end.life.recomputed for end in run.ends),
    }


def by_user(run: Run) -> dict[str, dict[str, float]]:
    """Returns for each user: tokens served, and the mean time to the first token."""
    ends: dict[str, list[End]] = defaultdict(list)
    for end in run.ends:
        if end.outcome is Outcome.FINISHED:
            ends[end.life.request.user].append(end)
    return {
        user: {
            "tokens": float(sum(len(end.life.tokens) for end in of)),
            "ttft_s": float(np.mean([ttft_s(end) for end in of])),
        }
        for user, of in sorted(ends.items())
    }


def jain(served: Sequence[float]) -> float:
    """Returns Jain's index of fairness: 1 if all are served alike, 1 / n if one alone is.

    >>> jain([2.0, 2.0]), jain([4.0, 0.0])
    (1.0, 0.5)
    """
    total = sum(each * each for each in served)
    return sum(served) ** 2 / (len(served) * total) if total else 1.0


def ttft_s(end: End) -> float:
    """Returns the time from a request's arrival to its first token."""
    return _first_s(end) - end.life.request.arrival_s


def _first_s(end: End) -> float:
    first_s = end.life.first_token_s
    assert first_s is not None, "a finished answer has a token"
    return first_s


def _spread(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    at = np.percentile(values, [50, 95, 99])
    return {"mean": float(np.mean(values)), "p50": float(at[0]), "p95": float(at[1]), "p99": float(at[2])}
