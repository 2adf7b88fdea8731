"""How often the device's guard would have been right: its label-free estimates against the true change per update."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from scipy.stats import spearmanr

from isthmus.edge.own_clips import guard
from isthmus.edge.own_clips.guard import DEFAULT_ESTIMATOR, DEFAULT_MARGIN, Estimator
from isthmus.experiments.personal.cells.cells import Cell, Outputs
from isthmus.experiments.personal.findings import figures
from isthmus.experiments.personal.findings.paired import difference
from isthmus.experiments.personal.findings.report import Section, picture_name
from isthmus.experiments.personal.findings.tables import Table, points

NO_UPDATE: Final = ("all", "own", "oracle")
"""Methods whose student is never offered to a device."""

Pair = tuple[Outputs, Outputs]
"""(on the selection clips, on the test clips)."""


@dataclass(frozen=True)
class Update:
    """One update offered to a device. ``estimated``: change of each label-free estimate on the selection clips.

    ``true``: change of accuracy on the test clips. ``thresholds`` is not included, because cells do not keep it.
    """

    cell: Cell
    estimated: Mapping[Estimator, float]
    true: float


def update(cell: Cell, outputs: Pair) -> Update:
    """Return what the guard estimated for a cell, and the true change that it could not see."""
    seen, unseen = outputs
    old = guard.Outputs(seen.old_local_NC, seen.old_taught_NC)
    new = guard.Outputs(seen.new_local_NC, seen.new_taught_NC)
    before, after = guard.estimates(old, new, old), guard.estimates(new, old, old)
    right_before = (unseen.old_local_NC.argmax(axis=1) == unseen.labels_N).mean()
    right_after = (unseen.new_local_NC.argmax(axis=1) == unseen.labels_N).mean()
    return Update(cell, {each: after[each] - before[each] for each in before}, float(right_after - right_before))


def table(updates: Sequence[Update], title: str) -> Table:
    """Return one row per estimate: how well it predicts, and whether following it helps."""
    worse = [each.true < 0 for each in updates]
    rows = [
        (
            "(no guard)",
            "",
            "",
            "0 %",
            f"{100 * np.mean(worse):.0f} %",
            _mean_points([each.true for each in updates]),
        )
    ]
    for estimator in Estimator:
        if not all(estimator in each.estimated for each in updates):
            continue
        estimates = [each.estimated[estimator] for each in updates]
        margin = DEFAULT_MARGIN if estimator is DEFAULT_ESTIMATOR else 0.0
        accepted = [value >= margin for value in estimates]
        kept = [each.true if accept else 0.0 for each, accept in zip(updates, accepted, strict=True)]
        right = [accept == (each.true >= 0) for each, accept in zip(updates, accepted, strict=True)]
        rows.append(
            (
                estimator.value + (" (the default)" if estimator is DEFAULT_ESTIMATOR else ""),
                _correlation(estimates, [each.true for each in updates]),
                f"{100 * np.mean(right):.0f} %",
                f"{100 * (1 - np.mean(accepted)):.0f} %",
                f"{100 * np.mean([value < 0 for value in kept]):.0f} %",
                _mean_points(kept),
            )
        )
    header = ("estimate", "rank correlation", "guard right", "refused", "made worse", "mean change, points")
    note = (
        f"{len(updates)} updates. Rank correlation (Spearman) of the estimated change on the selection clips with the "
        "true one on the test clips. The default has the guard's margin, the others none. Right: accepted and not "
        "worse, or refused and worse. A refused update changes nothing. Updates of one client or seed are not "
        "independent of each other."
    )
    return Table(title, header, tuple(rows), note)


def guard_part(cells: Sequence[Cell], outputs: Mapping[str, Pair], who: str = "") -> list[Section]:
    """Return the section about the guard, if there are updates to judge. ``who``: the users, for its title."""
    updates = [
        update(cell, outputs[cell.asked.name])
        for cell in cells
        if cell.asked.method not in NO_UPDATE and cell.asked.scenario == "sensitive" and cell.asked.name in outputs
    ]
    if not updates:
        return []
    dots = [(each.estimated[DEFAULT_ESTIMATOR], each.true) for each in updates]
    return [
        Section(
            f"The guarded update{who}",
            (table(updates, "Label-free estimates against the truth"), _by_method(updates)),
            {picture_name("guard", who): figures.estimate_against_truth(dots, DEFAULT_ESTIMATOR.value)},
            "Before a device swaps in its new student, it compares both on its own unlabelled clips.",
        )
    ]


def _by_method(updates: Sequence[Update]) -> Table:
    rows = []
    for method in dict.fromkeys(each.cell.asked.method for each in updates):
        own = [each for each in updates if each.cell.asked.method == method]
        kept = [each.true if each.estimated[DEFAULT_ESTIMATOR] >= DEFAULT_MARGIN else 0.0 for each in own]
        rows.append(
            (
                method,
                str(len(own)),
                f"{100 * np.mean([each.true < 0 for each in own]):.0f} %",
                f"{100 * np.mean([value < 0 for value in kept]):.0f} %",
                _mean_points([each.true for each in own]),
                _mean_points(kept),
            )
        )
    header = ("method", "updates", "made worse", "with the guard", "mean change, points", "with the guard")
    return Table(f"By method, with the guard's default estimate ({DEFAULT_ESTIMATOR.value})", header, tuple(rows))


def _mean_points(values: Sequence[float]) -> str:
    return points(difference(dict(enumerate(values)), dict.fromkeys(range(len(values)), 0.0)))


def _correlation(xs: Sequence[float], ys: Sequence[float]) -> str:
    if len(set(xs)) < 2 or len(set(ys)) < 2:
        return "(constant)"
    return f"{float(spearmanr(xs, ys).statistic):+.2f}"
