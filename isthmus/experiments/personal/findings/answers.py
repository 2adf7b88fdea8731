"""What the answers of each method are worth beside accuracy: recall over classes, calibration and changed answers."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Final

import numpy as np

from isthmus.experiments.personal.cells.cells import Cell, Outputs
from isthmus.experiments.personal.findings.scores import Scores, scores
from isthmus.experiments.personal.findings.tables import Table, in_order, pick

HEADS: Final = ("own head", "teacher's head")
"""The student's own head, and the teacher's head on the student's features, with which the paper predicts."""

_COLUMNS: Final = ("accuracy", "recall", "calibration")


def of_answers(answers: Outputs) -> dict[str, Scores]:
    """Return head -> scores of the student's answers. ``changed`` compares with the base student by the same head."""
    own, taught = HEADS
    return {
        own: scores(answers.new_local_NC, answers.old_local_NC, answers.labels_N),
        taught: scores(answers.new_taught_NC, answers.old_taught_NC, answers.labels_N),
    }


def by_cell(outputs: Mapping[str, tuple[Outputs, Outputs]]) -> dict[str, dict[str, dict[str, float]]]:
    """Return name of the cell -> head -> score -> value on the test clips, rounded to four digits, for result.json."""
    return {
        name: {
            head: {key: round(value, 4) for key, value in asdict(each).items()}
            for head, each in of_answers(on_test).items()
        }
        for name, (_, on_test) in outputs.items()
    }


def by_client(cells: Sequence[Cell], scores_of: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return client -> scenario and classes -> method -> seed -> scores of each cell, as ``by_cell`` returned them."""
    found: dict[str, Any] = {}
    for cell in cells:
        asked = cell.asked
        task = f"students, {asked.scenario}, {asked.classes or 'all'} classes"
        of_method = found.setdefault(asked.client, {}).setdefault(task, {}).setdefault(asked.method, {})
        settings = {"clips_per_cluster": asked.clips_per_cluster, "upload_share": asked.upload_share}
        of_method.setdefault(str(asked.seed), []).append(
            {"test_clips": cell.test_clips, **settings, **scores_of.get(asked.name, {})}
        )
    return found


def answers_table(cells: Sequence[Cell], outputs: Mapping[str, tuple[Outputs, Outputs]], title: str) -> Table:
    """Return accuracy, recall, calibration error and share of changed answers of each method, by both heads."""
    rows = []
    for method in in_order(c.asked.method for c in cells):
        own = [of_answers(outputs[c.asked.name][1]) for c in pick(cells, method=method)]
        row = [method]
        for head in HEADS:
            row += [f"{100 * np.mean([getattr(each[head], key) for each in own]):.1f}" for key in _COLUMNS]
            row.append(f"{100 * np.mean([each[head].changed for each in own]):.0f} %")
        rows.append(tuple(row))
    names = ("accuracy, %", "recall, %", "calibration error, points", "changed")
    header = ("method", *(f"{head}: {name}" for head in HEADS for name in names))
    note = (
        "Means over cells (client, seed). Recall: unweighted average over the classes that occur. Calibration error: "
        "expected, ten bins; a cell has few clips, so it is too high. Changed: share of answers that differ from the "
        "base student's by the same head."
    )
    return Table(title, header, tuple(rows), note)
