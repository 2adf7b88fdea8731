"""Heads on person-centred features: the gain where people differ, and none to lose where they do not."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest
from sklearn.linear_model import LogisticRegression

from isthmus.distill.student.centred import CannotCentre, fit_centred, person_shifts
from isthmus.edge.own_clips.corrections import Correction
from isthmus.edge.own_clips.offset import answer, estimate
from isthmus.edge.own_clips.personal import understand
from isthmus.edge.own_clips.window import Window
from isthmus.proto.person import Centred

CLASSES, WIDTH, CLIPS = 4, 12, 32
STRENGTHS = (0.1,)


@dataclass(frozen=True)
class World:
    """Invented people: features are a class mean, a shift of the person (``spread``) and noise."""

    spread: float
    seed: int = 0

    def class_means(self) -> npt.NDArray[np.float64]:
        return 0.7 * np.random.default_rng(self.seed).standard_normal((2, CLASSES, WIDTH))

    def person(
        self, number: int, classes: Sequence[int] = range(CLASSES), clips: int = CLIPS
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        rng = np.random.default_rng((self.seed, number))
        labels_N = np.array(classes)[np.arange(clips) % len(classes)]
        shift_MD = self.spread * rng.standard_normal((2, 1, WIDTH))
        features_MND = self.class_means()[:, labels_N] + shift_MD + rng.standard_normal((2, clips, WIDTH))
        return features_MND.astype(np.float32), labels_N

    def public(self, people: int = 10) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64], list[str]]:
        made = [self.person(number) for number in range(people)]
        names = [str(number) for number in range(people) for _ in range(CLIPS)]
        return np.concatenate([one[0] for one in made], axis=1), np.concatenate([one[1] for one in made]), names

    def fitted(self) -> tuple[Centred, LogisticRegression]:
        features_MND, labels_N, names = self.public()
        centred = fit_centred(features_MND, np.ones((len(labels_N), 2)), labels_N, names, strengths=STRENGTHS)
        ordinary = LogisticRegression(C=0.1).fit(np.concatenate(list(features_MND), axis=1), labels_N)
        return centred, ordinary

    def accuracies(self, classes: Sequence[int]) -> tuple[float, float]:
        """Return the accuracy of the ordinary head and with the offset, over strangers; half of the clips estimate."""
        centred, ordinary = self.fitted()
        right = []
        for number in range(100, 120):
            features_MND, labels_N = self.person(number, classes, 2 * CLIPS)
            seen, asked = slice(0, CLIPS), slice(CLIPS, None)
            raw_NC = ordinary.predict_proba(np.concatenate(list(features_MND), axis=1))
            logits_MNC, present_NM = centred.heads.logits(features_MND), np.ones((2 * CLIPS, 2))
            offset = estimate(logits_MNC[:, seen], present_NM[seen], raw_NC[seen], centred.person)
            answers_NC = answer(logits_MNC[:, asked], present_NM[asked], offset)
            right.append(
                [float((rows_NC.argmax(axis=1) == labels_N[asked]).mean()) for rows_NC in (raw_NC[asked], answers_NC)]
            )
        before, after = np.mean(right, axis=0)
        return float(before), float(after)


def test_strangers_who_differ_are_answered_better() -> None:
    before, after = World(spread=1.0).accuracies(range(CLASSES))
    assert after > before + 0.08
    before, after = World(spread=1.0).accuracies((0, 2))
    assert after > before + 0.04


def test_where_people_do_not_differ_nothing_is_lost() -> None:
    for classes in (range(CLASSES), (1,)):
        before, after = World(spread=0.0).accuracies(classes)
        assert after > before - 0.015


@pytest.mark.parametrize("classes", [range(CLASSES), (0, 2), (1,)])
def test_a_person_whom_the_base_answers_rightly_loses_nothing(classes: Sequence[int]) -> None:
    """All clips are answered rightly and surely before, and no answer turns wrong:
    without labels, and after 12 corrections that say the same as the answers."""
    world = World(spread=1.0)
    centred, ordinary = world.fitted()
    names = tuple(map(str, range(CLASSES)))
    lost: dict[int, list[npt.NDArray[np.bool_]]] = {0: [], 12: []}
    for number in range(100, 112):
        features_MND, labels_N = world.person(number, classes, 5 * CLIPS)
        raw_NC = ordinary.predict_proba(np.concatenate(list(features_MND), axis=1)).astype(np.float32)
        sure_N = raw_NC[np.arange(len(labels_N)), labels_N] > 0.9
        features_MND, labels_N, raw_NC = features_MND[:, sure_N], labels_N[sure_N], raw_NC[sure_N]
        half = len(labels_N) // 2
        present_NM = np.ones((len(labels_N), 2), np.float32)
        window = Window(tuple(map(str, range(half))), features_MND[:, :half], present_NM[:half], raw_NC[:half])
        for count, wrong in lost.items():
            said = [Correction(str(row), names[labels_N[row]], float(row), "s") for row in range(min(count, half))]
            reading = understand("s", centred, window, said, names)
            answers_NC = reading.answers(features_MND[:, half:], present_NM[half:], raw_NC[half:])
            wrong.append(answers_NC.argmax(axis=1) != labels_N[half:])
    for wrong in lost.values():
        assert sum(map(len, wrong)) > 200
        assert not np.concatenate(wrong).any()


def test_the_person_model_is_that_of_the_world() -> None:
    """Seen through the heads, people differ as much as in the world, and clips of one person as much as its noise."""
    centred, _ = World(spread=1.5).fitted()
    still, _ = World(spread=0.0).fitted()
    assert centred.person.people == 10 and 0.5 < centred.person.fusion < 2
    for modality in range(2):
        between = np.trace(centred.person.between_MCC[modality]) / np.trace(centred.person.within_MCC[modality])
        assert 1.0 < between < 4.5, "a shift of 1.5 has 2.25 times the variance of the noise"
        none = np.trace(still.person.between_MCC[modality]) / np.trace(still.person.within_MCC[modality])
        assert none < 0.15
        assert (centred.person.mean_MCC[modality].argmax(axis=1) == np.arange(CLASSES)).all()
    average_MD = np.mean([World(spread=1.5).person(number)[0].mean(axis=1) for number in range(10)], axis=0)
    np.testing.assert_allclose(centred.heads.centre_MD, average_MD, atol=1e-3)


def test_shifts_of_people_who_lack_classes() -> None:
    """A person's missing classes do not count as a shift; the plain mean would be off by half a class."""
    rng = np.random.default_rng(0)
    labels_N = np.concatenate([np.tile(np.arange(3), 8), np.zeros(8, int)])
    person_N = np.repeat([0, 1, 2, 3], 8)
    class_CD, shift_PD = rng.standard_normal((3, 5)), rng.standard_normal((4, 5))
    class_CD -= class_CD.mean(axis=0)
    found_PD, found_CD = person_shifts(class_CD[labels_N] + shift_PD[person_N], labels_N, person_N, 3)
    np.testing.assert_allclose(found_PD, shift_PD, atol=1e-4)
    np.testing.assert_allclose(found_CD, class_CD, atol=1e-4)


def test_clips_of_nobody_and_without_a_label_are_left_out() -> None:
    features_MND, labels_N, names = World(1.0).public(8)
    present_NM = np.ones((len(labels_N), 2))
    plain = fit_centred(features_MND, present_NM, labels_N, names, strengths=STRENGTHS)
    noise_MND = np.full((2, 5, WIDTH), 99, np.float32)
    more = fit_centred(
        np.concatenate([features_MND, noise_MND], axis=1),
        np.ones((len(labels_N) + 5, 2)),
        np.concatenate([labels_N, [-1, -1, 0, 1, 2]]),
        [*names, "0", "1", "", "", ""],
        strengths=STRENGTHS,
    )
    np.testing.assert_allclose(plain.heads.weights_MCD, more.heads.weights_MCD, atol=1e-6)
    np.testing.assert_allclose(plain.person.between_MCC, more.person.between_MCC, atol=1e-5)


def test_two_classes_and_missing_pictures() -> None:
    features_MND, labels_N, names = World(1.0).public(8)
    kept_N = labels_N < 2
    names = [name for name, kept in zip(names, kept_N, strict=True) if kept]
    present_NM = np.ones((int(kept_N.sum()), 2))
    present_NM[::4, 1] = 0
    features_MND = np.where(present_NM.T[:, :, np.newaxis] > 0, features_MND[:, kept_N], np.nan)
    made = fit_centred(features_MND, present_NM, labels_N[kept_N], names, strengths=STRENGTHS)
    assert made.heads.weights_MCD.shape == (2, 2, WIDTH)
    logits_NC = made.heads.logits(features_MND)[0]
    assert (logits_NC.argmax(axis=1) == labels_N[kept_N]).mean() > 0.6


def test_what_is_refused() -> None:
    features_MND, labels_N, names = World(1.0).public(8)
    present_NM = np.ones((len(labels_N), 2))
    with pytest.raises(CannotCentre, match="1 people"):
        fit_centred(features_MND, present_NM, labels_N, ["one"] * len(names))
    with pytest.raises(CannotCentre, match="too few people"):
        only_first = np.where((labels_N == 3) & (np.array(names) != "0"), 0, labels_N)
        fit_centred(features_MND, present_NM, only_first, names)
    with pytest.raises(CannotCentre, match="lacks sound or picture"):
        mute_NM = present_NM.copy()
        mute_NM[np.array(names) == "3", 0] = 0
        fit_centred(features_MND, mute_NM, labels_N, names, strengths=STRENGTHS)
    with pytest.raises(ValueError, match="not finite"):
        fit_centred(features_MND * np.nan, present_NM, labels_N, names)
    with pytest.raises(ValueError, match="do not fit"):
        fit_centred(features_MND, present_NM[:3], labels_N, names)
    with pytest.raises(ValueError, match="people for"):
        fit_centred(features_MND, present_NM, labels_N, names[:3])
