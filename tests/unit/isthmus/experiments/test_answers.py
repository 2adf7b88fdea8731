"""Recall, calibration and changed answers stand beside every accuracy, by both heads."""

import numpy as np
import pytest

from isthmus.experiments.personal.cells.cells import Outputs
from isthmus.experiments.personal.findings import tables
from isthmus.experiments.personal.findings.answers import answers_table, by_cell, by_client, of_answers
from tests.rigs.distill.cells import cell


def answers(told: list[int], sure: float = 1.0) -> np.ndarray:
    """Return probabilities over two classes that answer ``told``, each with confidence ``sure``."""
    rows = np.full((len(told), 2), 1 - sure, np.float32)
    rows[np.arange(len(told)), told] = sure
    return rows


def outputs(labels: list[int], base: list[int], own: list[int], taught: list[int], sure: float = 1.0) -> Outputs:
    return Outputs(
        old_local_NC=answers(base),
        new_local_NC=answers(own, sure),
        old_taught_NC=answers(base),
        new_taught_NC=answers(taught),
        labels_N=np.array(labels),
    )


def test_recall_weighs_classes_and_not_clips() -> None:
    found = of_answers(outputs([0, 0, 0, 1], base=[1, 0, 0, 0], own=[0, 0, 0, 0], taught=[0, 1, 1, 1], sure=0.9))
    own, taught = found["own head"], found["teacher's head"]
    assert (own.accuracy, own.recall, own.changed) == (0.75, 0.5, 0.25)
    assert own.calibration == pytest.approx(0.15), "sure by 0.9 and right on three of four"
    assert (taught.accuracy, taught.recall, taught.changed) == (0.5, pytest.approx(2 / 3), 1.0)


def test_every_method_has_a_row_and_every_cell_its_scores() -> None:
    base, other = cell("a", "all", 0, 0.5), cell("a", "cluster", 0, 0.75)
    of_base = outputs([0, 1, 1, 0], base=[0, 0, 1, 1], own=[0, 0, 1, 1], taught=[0, 0, 1, 1])
    of_other = outputs([0, 1, 1, 0], base=[0, 0, 1, 1], own=[0, 1, 1, 1], taught=[0, 0, 1, 1])
    found = {base.asked.name: (of_base, of_base), other.asked.name: (of_other, of_other)}
    made = answers_table([base, other], found, "Answers")
    assert len(made.header) == 9
    assert made.rows[0] == ("all", "50.0", "50.0", "50.0", "0 %", "50.0", "50.0", "50.0", "0 %")
    assert made.rows[1] == ("cluster", "75.0", "75.0", "25.0", "25 %", "50.0", "50.0", "50.0", "0 %")
    scores = by_cell(found)[other.asked.name]
    assert scores["own head"] == {"accuracy": 0.75, "recall": 0.75, "calibration": 0.25, "changed": 0.25}
    assert scores["teacher's head"]["changed"] == 0.0
    of_client = by_client([base, other], by_cell(found))["a"]["students, sensitive, all classes"]
    assert list(of_client) == ["all", "cluster"]
    settings = {"test_clips": 20, "clips_per_cluster": 3, "upload_share": 1.0}
    assert of_client["cluster"]["0"] == [{**settings, **scores}]


def test_people_made_worse_by_over_two_points_are_counted() -> None:
    base = [cell(person, "all", seed, 0.5) for person in "abc" for seed in (0, 1)]
    after = {"a": 0.485, "b": 0.45, "c": 0.9}
    other = [cell(person, "kept", seed, after[person]) for person in "abc" for seed in (0, 1)]
    made = tables.by_person([*base, *other], "all", ("all", "kept"), "People")
    assert made.rows[-1] == ("worse than all by over 2 points", "", "", "1 of 3")
