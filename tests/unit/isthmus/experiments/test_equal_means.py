"""Every method gets the same number of public clips, and as many gradient steps."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from isthmus.distill.release import Release
from isthmus.distill.selection import Selection
from isthmus.experiments.personal.cells.offline import at_equal_steps, cut, steps_per_epoch
from tests.rigs.distill.release import tiny_recipe


@pytest.mark.parametrize(("clips", "steps"), [(1, 1), (11, 1), (12, 1), (13, 1), (14, 2), (24, 2), (27, 3)])
def test_a_last_batch_of_one_clip_is_no_step(clips: int, steps: int) -> None:
    assert steps_per_epoch(clips, 12) == steps


@pytest.mark.parametrize(("clips", "epochs"), [(48, 3), (12, 12), (144, 2), (500, 2), (0, 3)])
def test_other_numbers_of_clips_get_other_numbers_of_epochs(clips: int, epochs: int) -> None:
    recipe = tiny_recipe()  # three epochs in two rounds, batches of twelve
    release = Release(Path("nowhere"), recipe)
    vars(release).update(public=None, teacher_outputs=None, teacher=None)
    assert at_equal_steps(release, clips, 48).recipe.personalise.train.epochs == epochs
    assert at_equal_steps(release, clips, 0).recipe == recipe
    changed = dataclasses.replace(recipe.personalise, train=dataclasses.replace(recipe.personalise.train, epochs=3))
    assert at_equal_steps(release, 48, 48).recipe.personalise == changed


def test_a_pick_is_cut_by_the_farthest_of_each_row() -> None:
    found = Selection.of(np.array([7, 3, 9, 1, 4, 8]), ("said",))
    assert cut(found, 4, 3).indices_S.tolist() == [7, 3, 1, 4], "the third of both rows is left out"
    assert cut(found, 5, 3).indices_S.tolist() == [7, 3, 9, 1, 4]
    assert cut(found, 9, 3).indices_S.tolist() == found.indices_S.tolist() and cut(found, 9, 3).notes == ("said",)
