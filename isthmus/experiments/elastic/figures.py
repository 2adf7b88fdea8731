"""Pictures of one workload served by every policy, after figures 3.3 to 3.18 of Chen 2025, chapter 3.

Each function turns plain data into PNG bytes, without pyplot's global state.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from isthmus.cloud.elastic.scheduling.profile import Profile
from isthmus.cloud.elastic.scheduling.query import IN_TIME, Outcome, Query
from isthmus.cloud.elastic.scheduling.simulate import Ran, Run
from isthmus.data.files import write_atomically
from isthmus.distill.figures import png

Floats = npt.NDArray[np.float64]

OUTCOME_GROUPS: Final[Mapping[str, frozenset[Outcome]]] = {
    "correct in time": frozenset({Outcome.CORRECT_IN_TIME}),
    "wrong in time": frozenset({Outcome.WRONG_IN_TIME}),
    "late": frozenset({Outcome.LATE}),
    "evicted": frozenset({Outcome.EVICTED, Outcome.FAILED}),
}


def _png(draw: Callable[[Axes], None], title: str, x: str, y: str, *, legend: bool = True) -> bytes:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    draw(axes)
    axes.set(title=title, xlabel=x, ylabel=y)
    if legend:
        figure.legend(fontsize=8, loc="outside right upper")
    axes.grid(alpha=0.3)
    return png(figure)


def utility_over_time(runs: Mapping[str, Run]) -> bytes:
    def draw(axes: Axes) -> None:
        for name, run in runs.items():
            ends_s = [batch.end_s for batch in run.batches]
            axes.plot(ends_s, np.cumsum([batch.utility for batch in run.batches]), label=name)

    return _png(draw, "Expected utility over time", "s", "utility so far")


def utility_by_policy(runs: Mapping[str, Run], bound: float) -> bytes:
    def draw(axes: Axes) -> None:
        axes.barh(list(runs), [run.expected_utility for run in runs.values()])
        axes.axvline(bound, color="black", linestyle="--", label="clairvoyant bound")

    return _png(draw, "Expected utility by policy", "utility", "")


def distribution(runs: Mapping[str, Run], what: Callable[[Run], Sequence[float]], title: str, x: str) -> bytes:
    """Draw the cumulative distribution of ``what``, one curve per policy."""

    def draw(axes: Axes) -> None:
        for name, run in runs.items():
            values = np.sort(np.asarray(what(run), dtype=np.float64))
            if len(values):
                axes.step(values, np.arange(1, len(values) + 1) / len(values), where="post", label=name)

    return _png(draw, title, x, "cumulative share")


def gamma_shares(runs: Mapping[str, Run], gammas: Sequence[int]) -> bytes:
    def draw(axes: Axes) -> None:
        left = np.zeros(len(runs))
        for gamma in gammas:
            shares = np.array(
                [
                    sum(batch.size for batch in run.batches if batch.gamma == gamma)
                    / max(1, sum(batch.size for batch in run.batches))
                    for run in runs.values()
                ]
            )
            axes.barh(list(runs), shares, left=left, label=f"{gamma:+d}" if gamma else "0")
            left += shares

    return _png(draw, "Share of each gamma, by queries run", "share", "")


def outcome_shares(runs: Mapping[str, Run]) -> bytes:
    def draw(axes: Axes) -> None:
        left = np.zeros(len(runs))
        for label, outcomes in OUTCOME_GROUPS.items():
            shares = np.array([sum(run.share(outcome) for outcome in outcomes) for run in runs.values()])
            axes.barh(list(runs), shares, left=left, label=label)
            left += shares

    return _png(draw, "How queries ended", "share of all queries", "")


def gamma_and_load(run: Run, queries: Sequence[Query]) -> bytes:
    def draw(axes: Axes) -> None:
        axes.step(*_per_second(queries), where="post", color="grey", label="arriving, 1/s")
        other = axes.twinx()
        other.plot([batch.start_s for batch in run.batches], [batch.gamma for batch in run.batches], ".", markersize=3)
        other.set_ylabel("gamma")

    return _png(draw, "Gamma and load over time", "s", "queries per second")


def incoming_and_served(run: Run, queries: Sequence[Query]) -> bytes:
    def draw(axes: Axes) -> None:
        axes.step(*_per_second(queries), where="post", label="incoming")
        axes.step(*_served_per_second(run.batches), where="post", label="run")
        in_time = [query for query, outcome in zip(queries, run.outcomes, strict=True) if outcome in IN_TIME]
        axes.step(*_per_second(in_time), where="post", label="answered in time, by arrival")

    return _png(draw, "Incoming and served per second", "s", "queries per second")


def accuracy_and_throughput(profile: Profile) -> bytes:
    def draw(axes: Axes) -> None:
        rates = [profile.capacity_per_s(gamma) for gamma in profile.gammas]
        for task, shares in profile.accuracy.items():
            axes.plot(rates, [shares[gamma] for gamma in profile.gammas], "o-", label=task)
        for gamma, rate in zip(profile.gammas, rates, strict=True):
            axes.annotate(f"{gamma}", (rate, axes.get_ylim()[0]), fontsize=8)

    return _png(draw, "Accuracy against throughput, by gamma", "images per second", "accuracy")


def throughput_by_size(profile: Profile) -> bytes:
    def draw(axes: Axes) -> None:
        sizes = [1, 2, 4, 8, 16, 32, 64]
        for gamma in profile.gammas:
            axes.plot(sizes, [profile.capacity_per_s(gamma, size) for size in sizes], "o-", label=f"gamma {gamma}")
        axes.set_xscale("log", base=2)

    return _png(draw, "Throughput by batch size", "batch size", "images per second")


def _per_second(queries: Sequence[Query]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    counts_T = np.bincount([int(query.arrival_s) for query in queries] or [0])
    return np.arange(len(counts_T)), counts_T


def _served_per_second(batches: Sequence[Ran]) -> tuple[npt.NDArray[np.int64], Floats]:
    ends = [int(batch.end_s) for batch in batches] or [0]
    counts_T: Floats = np.bincount(ends, weights=[batch.size for batch in batches] or [0]).astype(np.float64)
    return np.arange(len(counts_T)), counts_T


def draw_all(
    out: Path, profile: Profile, queries: Sequence[Query], runs: Mapping[str, Run], bound: float, ours: str
) -> list[Path]:
    """Write every picture of one workload into ``out``. ``ours``: the policy that is shown over time."""
    pictures = {
        "utility_over_time": utility_over_time(runs),
        "utility_by_policy": utility_by_policy(runs, bound),
        "batch_accuracy": distribution(
            runs, lambda run: [batch.accuracy for batch in run.batches], "Accuracy of batches", "accuracy"
        ),
        "batch_size": distribution(
            runs, lambda run: [float(batch.size) for batch in run.batches], "Size of batches", "queries"
        ),
        "waiting_time": distribution(runs, lambda run: run.waits_s, "Waiting time of queries run", "s"),
        "run_time": distribution(
            runs, lambda run: [batch.end_s - batch.start_s for batch in run.batches], "Run time of batches", "s"
        ),
        "gamma_shares": gamma_shares(runs, profile.gammas),
        "outcome_shares": outcome_shares(runs),
        "gamma_and_load": gamma_and_load(runs[ours], queries),
        "incoming_and_served": incoming_and_served(runs[ours], queries),
        "accuracy_and_throughput": accuracy_and_throughput(profile),
        "throughput_by_size": throughput_by_size(profile),
    }
    paths = []
    for name, picture in pictures.items():
        path = out / f"{name}.png"
        write_atomically(path, picture)
        paths.append(path)
    return paths
