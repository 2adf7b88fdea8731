"""The spread between persons: variance components that are known, found again on persons that were not fitted on."""

import numpy as np
import numpy.typing as npt
import pytest

from isthmus.data.clip import Listing
from isthmus.data.spread import Spread, person_spread, spread_of


def _drawn(between: float, habits: float, *, persons: int = 24, takes: int = 8, seed: int = 0) -> Spread:
    """Return what is found in clips whose variance within person and class is 1 in each of 5 directions."""
    rng = np.random.default_rng(seed)
    classes, width = 4, 5
    labels_N = np.tile(np.repeat(np.arange(classes), takes), persons)
    person_N = np.repeat(np.arange(persons), classes * takes)
    apart_CD = 3 * np.eye(classes, width)
    shift_PD = np.sqrt(between) * rng.normal(size=(persons, width))
    habit_PCD = np.sqrt(habits) * rng.normal(size=(persons, classes, width))
    clips_ND = apart_CD[labels_N] + shift_PD[person_N] + habit_PCD[person_N, labels_N]
    clips_ND += rng.normal(size=clips_ND.shape)
    scale_D = np.array([1, 100, 0.01, 1, 5])
    return person_spread(clips_ND * scale_D, labels_N, np.array([f"p{person:02d}" for person in person_N]))


@pytest.mark.parametrize(("between", "habits"), [(0.0, 0.0), (0.5, 0.0), (2.0, 0.3)])
def test_variances_that_are_known_are_found(between: float, habits: float) -> None:
    found = [_drawn(between, habits, seed=seed) for seed in range(4)]
    # Habits of few classes have a mean, and that mean is a shift of the person.
    assert np.mean([each.between for each in found]) == pytest.approx(between, abs=0.05 + 0.3 * between)
    assert np.mean([each.habits for each in found]) == pytest.approx(habits, abs=0.03 + 0.2 * habits)
    assert found[0].persons == 24
    assert found[0].clips == 24 * 4 * 8


def test_persons_who_lack_a_class_are_left_out_and_too_few_are_refused() -> None:
    rng = np.random.default_rng(0)
    labels_N = np.tile([0, 0, 1, 1], 5)
    persons_N = np.repeat(["a", "b", "c", "d", "e"], 4)
    clips_ND = rng.normal(size=(20, 3)) + labels_N[:, None]
    labels_N[-2:] = 0  # e shows class 0 alone
    assert person_spread(clips_ND, labels_N, persons_N).persons == 4
    labels_N[-6:] = 0
    with pytest.raises(ValueError, match="3 persons with clips of all 2 classes"):
        person_spread(clips_ND, labels_N, persons_N)


@pytest.mark.parametrize("labels", [[0, 0, 0, 0, 0, 0, 0, 0], [0, 1, 0, 1, 0, 1, 0, 1]])
def test_one_class_or_single_clips_are_refused(labels: list[int]) -> None:
    persons_N = np.repeat(["a", "b", "c", "d"], 2)
    clips_ND: npt.NDArray[np.float64] = np.random.default_rng(0).normal(size=(8, 3))
    with pytest.raises(ValueError, match=r"classes|two clips of one class"):
        person_spread(clips_ND, np.array(labels), persons_N)


def test_a_set_without_persons_is_refused() -> None:
    listing = Listing("ave", ("Bark", "Bus"), refs=(), damaged=())
    with pytest.raises(ValueError, match="0 persons"):
        spread_of(listing)
