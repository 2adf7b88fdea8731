"""The experiment on habits, with invented people whose classifier is known."""

import dataclasses

import numpy as np
import pytest

from isthmus.experiments.personal.cells.cells import Cell, Outputs
from isthmus.experiments.personal.findings.habits import Pair, habits_part, user_of
from tests.rigs.distill.cells import cell

CLASSES = 4


def outputs(seed: int, clips: int) -> Outputs:
    """Return outputs of a calibrated classifier with an accuracy of about two thirds."""
    rng = np.random.default_rng(seed)
    labels_N = rng.integers(0, CLASSES, clips)
    points_NC = 1.5 * np.eye(CLASSES)[labels_N] + rng.standard_normal((clips, CLASSES))
    answers_NC = np.exp(1.5 * points_NC)
    answers_NC = (answers_NC / answers_NC.sum(axis=1, keepdims=True)).astype(np.float32)
    return Outputs(answers_NC, answers_NC, answers_NC, answers_NC, labels_N)


def people() -> tuple[list[Cell], dict[str, Pair]]:
    cells: list[Cell] = []
    found: dict[str, Pair] = {}
    for place, client in enumerate("abcd"):
        for method in ("all", "kept", "cluster"):
            made = cell(client, method, 0, 0.5, selected_per_class=(10.0,) * CLASSES)
            cells.append(made)
            found[made.asked.name] = (outputs(2 * place, 60), outputs(2 * place + 1, 80))
    return cells, found


def test_users_of_few_classes_gain_and_the_tables_say_so() -> None:
    (section,) = habits_part(*people())
    as_they_are, few = section.tables
    assert [row[0] for row in as_they_are.rows] == ["all", "kept"], "cluster's heads learned from a selection"
    rows = {row[0]: row[1:] for row in few.rows}
    assert len(few.header) == 1 + CLASSES
    gains = [float(text.replace("*", "").split(" ±")[0]) for text in rows["habits (the default)"]]
    oracle = [float(text.replace("*", "").split(" ±")[0]) for text in rows["(the true shares of the selection clips)"]]
    assert gains[0] > 5 and gains[0] > gains[2]
    few_classes = list(zip(oracle, gains, strict=True))[:-1]
    assert all(best >= gain for best, gain in few_classes)


def test_clips_that_lack_a_modality_are_read_too() -> None:
    cells, found = people()
    read = {"both": 0.5, "sound": 0.5, "picture": 0.6}
    cells = [one if one.asked.method == "cluster" else dataclasses.replace(one, masks_read=read) for one in cells]
    (section,) = habits_part(cells, found)
    _, by_mask, _ = section.tables
    assert by_mask.header == ("method", "both captured", "sound captured", "picture captured")
    assert [row[0] for row in by_mask.rows] == ["all", "kept"]
    for row in by_mask.rows:
        assert row[1].startswith("50.0, +0.0") and row[2].startswith("50.0, +0.0")
        assert row[3].startswith("40.0, **+20.0 ± 0.0**")


def test_what_cannot_be_measured_is_left_out() -> None:
    cells, found = people()
    assert habits_part([one for one in cells if one.asked.method != "all"], found) == []
    other = [dataclasses.replace(one, asked=dataclasses.replace(one.asked, scenario="insensitive")) for one in cells]
    assert habits_part(other, found) == []
    kept = next(one for one in cells if one.asked.method == "kept")
    user = user_of(kept, cells, found[kept.asked.name])
    assert user is not None
    assert user.right(None) == pytest.approx(user.right(user.trained_C))
    few = {name: (outputs(1, 4), outputs(2, 2)) for name in found}
    (section,) = habits_part(cells, few)
    assert "No person has enough clips" in section.tables[1].note
