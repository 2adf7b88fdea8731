"""The offset against its formulas in plain loops, and what must hold for every person."""

import tracemalloc
from dataclasses import replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.data.class_shares import softmax as shares_of
from isthmus.edge.own_clips.offset import BASE_SHARE, Offset, answer, corrected, estimate, mixed, scores
from isthmus.edge.own_clips.offset.hypotheses import MOST_HYPOTHESES, OWN_WAY
from isthmus.proto.person import PersonModel
from tests.rigs.edge.offset_by_hand import Person, by_hand, softmax

Float64s = npt.NDArray[np.float64]
SOME = settings(max_examples=30)


people = st.builds(Person, st.integers(0, 2**32), st.integers(1, 18), st.integers(2, 5))
whole_people = st.builds(Person, st.integers(0, 2**32), st.integers(1, 18), st.integers(2, 5), both=st.just(True))


@SOME
@given(people)
def test_the_estimate_is_that_of_the_formulas(person: Person) -> None:
    made, wanted = person.estimate(), by_hand(person)
    np.testing.assert_allclose(made.offset_MC, wanted.offsets, rtol=1e-2, atol=1e-2)
    np.testing.assert_allclose(made.prior_C, wanted.prior, atol=2e-3)
    answers_NC = answer(person.logits_MNC, person.present_NM, made)
    for n, row_C in enumerate(answers_NC):
        by_hand_C = softmax(wanted.scores(person.logits_MNC[:, n], person.present_NM[n]))
        np.testing.assert_allclose(row_C, by_hand_C, atol=0.01)


@SOME
@given(st.integers(0, 2**32), st.integers(2, 5))
def test_an_own_way_moves_the_mean_of_a_gaussian(seed: int, classes: int) -> None:
    """If the heads are right about Gaussian clips, the scores are the log-likelihoods around the person's own means."""
    rng = np.random.default_rng(seed)
    root_CC = rng.standard_normal((classes, classes)) / 4
    covariance_CC = root_CC @ root_CC.T + np.eye(classes)  # no eigenvalue below the floor of G
    mean_CC = covariance_CC - np.diag(covariance_CC) / 2  # logits for which log p(L | c) is L_c and what all share
    model = PersonModel(
        *(
            np.stack([part_CC, part_CC]).astype(np.float64)
            for part_CC in (mean_CC, 1e-9 * np.eye(classes), covariance_CC)
        )
    )
    label_N = np.arange(20 * classes) % classes
    said_NC = np.eye(classes)[label_N]
    own_CC = 0.5 * rng.standard_normal((classes, classes))
    logits_NC = (mean_CC + own_CC)[label_N]
    sound_alone = np.tile([1.0, 0.0], (len(label_N), 1))
    made = estimate(np.stack([logits_NC, logits_NC]), sound_alone, said_NC, model, said_NC)
    spread = OWN_WAY * 20 + 1 - OWN_WAY
    learnt_CC = mean_CC + OWN_WAY * 20 / spread * own_CC
    clips_KC = rng.standard_normal((7, classes)) @ root_CC.T + mean_CC[rng.integers(classes, size=7)]
    found_KC = scores(np.stack([clips_KC, clips_KC]), sound_alone[:7], made)
    difference_CC = np.eye(classes) - 1 / classes
    inverse_CC = np.linalg.pinv(difference_CC @ covariance_CC @ difference_CC)
    around_KCC = clips_KC[:, np.newaxis] - learnt_CC
    likelihood_KC = -np.einsum("kcd,de,kce->kc", around_KCC, inverse_CC, around_KCC) / 2
    np.testing.assert_allclose(found_KC - found_KC[:, :1], likelihood_KC - likelihood_KC[:, :1], atol=1e-3)


@SOME
@given(people)
def test_without_own_ways_every_clip_counts_alike(person: Person) -> None:
    made = person.estimate(own_way=0.0)
    assert made.ways is None
    said_NC = np.eye(person.raw_NC.shape[1])[np.zeros(len(person.raw_NC), int)]
    known = person.estimate(own_way=0.0, known_NC=said_NC)
    for m in (0, 1):
        here_N = person.present_NM[:, m] > 0
        if here_N.any():
            total_CC = person.model.between_MCC[m] + person.model.within_MCC[m] / here_N.sum()
            gain_CC = np.linalg.solve(total_CC, person.model.between_MCC[m])
            observed_C = person.logits_MNC[m, here_N].mean(axis=0) - person.model.mean_MCC[m, 0]
            np.testing.assert_allclose(known.offset_MC[m], observed_C @ gain_CC, rtol=1e-2, atol=1e-2)


@SOME
@given(people)
def test_every_answer_is_a_distribution_and_no_class_is_ruled_out(person: Person) -> None:
    made = person.estimate()
    classes = person.raw_NC.shape[1]
    assert np.isfinite(made.offset_MC).all() and made.clips == len(person.raw_NC)
    assert made.prior_C.sum() == pytest.approx(1) and made.prior_C.min() >= 0.1 / classes - 1e-12
    np.testing.assert_allclose(answer(person.logits_MNC, person.present_NM, made).sum(axis=1), 1, atol=1e-5)


@SOME
@given(whole_people, st.integers(0, 2**32))
def test_a_shift_of_all_clips_is_taken_out(person: Person, seed: int) -> None:
    """If people can differ without bound, a person and the same person shifted get the same answers."""
    far_MCC = 1e9 * np.stack([np.eye(person.raw_NC.shape[1], dtype=np.float32)] * 2)
    model = replace(person.model, between_MCC=far_MCC)
    shift_MC = 5 * np.random.default_rng(seed).standard_normal((2, person.raw_NC.shape[1]))
    shifted_MNC = person.logits_MNC + shift_MC[:, np.newaxis]
    here, there = person.estimate(model=model), person.estimate(model=model, logits_MNC=shifted_MNC)
    np.testing.assert_allclose(there.offset_MC - here.offset_MC, shift_MC, atol=0.02)
    of_here, of_there = (
        answer(logits_MNC, person.present_NM, made)
        for logits_MNC, made in ((person.logits_MNC, here), (shifted_MNC, there))
    )
    np.testing.assert_allclose(of_here, of_there, atol=0.02)


@SOME
@given(people)
def test_people_who_do_not_differ_have_no_offset(person: Person) -> None:
    made = person.estimate(model=replace(person.model, between_MCC=np.zeros_like(person.model.between_MCC)))
    assert not made.offset_MC.any()


@SOME
@given(st.integers(0, 2**32), st.integers(2, 5))
def test_fewer_clips_give_a_smaller_offset(seed: int, classes: int) -> None:
    """The same mean from fewer clips is believed less; from none, not at all."""
    person = Person(seed, 1, classes, both=True)
    known_NC = np.eye(classes)[:1]
    sizes = []
    for clips in (0, 1, 10, 300):
        sample = (np.repeat(person.logits_MNC, clips, axis=1), np.repeat(person.present_NM, clips, axis=0))
        said_NC = np.repeat(known_NC, clips, axis=0)
        made = estimate(*sample, said_NC, person.model, said_NC)
        # In the metric of the shift between people the size can only grow.
        inverse_MCC = np.linalg.inv(person.model.between_MCC)
        sizes.append(float(np.einsum("mc,mcd,md->", made.offset_MC, inverse_MCC, made.offset_MC)))
    assert sizes[0] == 0
    assert all(less <= more * (1 + 1e-3) + 1e-9 for less, more in pairwise(sizes))


@SOME
@given(whole_people)
def test_both_modalities_share_their_answers(person: Person) -> None:
    """With sound and picture exchanged, the offsets are exchanged. A picture moves the offset of the sound."""
    model = person.model
    swapped = PersonModel(
        model.mean_MCC[::-1], model.between_MCC[::-1], model.within_MCC[::-1], model.fusion, model.people
    )
    here, there = person.estimate(), person.estimate(logits_MNC=person.logits_MNC[::-1], model=swapped)
    np.testing.assert_allclose(here.offset_MC, there.offset_MC[::-1], rtol=1e-3, atol=1e-4)
    certain_MNC = person.logits_MNC.copy()
    certain_MNC[1] = 0
    certain_MNC[1, :, 0] = 1e3
    flat = replace(model, between_MCC=model.between_MCC * np.array([1, 0])[:, np.newaxis, np.newaxis])
    moved = person.estimate(logits_MNC=certain_MNC, model=flat, own_way=0.0)
    gain_CC = np.linalg.solve(model.between_MCC[0] + model.within_MCC[0] / len(person.raw_NC), model.between_MCC[0])
    of_class_0 = (person.logits_MNC[0].mean(axis=0) - model.mean_MCC[0, 0]) @ gain_CC
    np.testing.assert_allclose(moved.offset_MC[0], of_class_0, rtol=1e-2, atol=1e-2)


@SOME
@given(people)
def test_an_absent_modality_counts_for_nothing(person: Person) -> None:
    hidden_MNC = np.where(person.present_NM.T[:, :, np.newaxis] > 0, person.logits_MNC, np.nan)
    here, there = person.estimate(), person.estimate(logits_MNC=hidden_MNC)
    np.testing.assert_array_equal(here.offset_MC, there.offset_MC)
    np.testing.assert_array_equal(
        answer(person.logits_MNC, person.present_NM, here), answer(hidden_MNC, person.present_NM, there)
    )
    sound_alone = person.estimate(present_NM=np.tile([1.0, 0.0], (len(person.raw_NC), 1)))
    assert not sound_alone.offset_MC[1].any(), "nobody has seen this person's face"


@SOME
@given(people, st.integers(0, 2**32))
def test_the_order_of_the_clips_does_not_matter(person: Person, seed: int) -> None:
    order_N = np.random.default_rng(seed).permutation(len(person.raw_NC))
    other = person.estimate(
        logits_MNC=person.logits_MNC[:, order_N], present_NM=person.present_NM[order_N], raw_NC=person.raw_NC[order_N]
    )
    np.testing.assert_allclose(person.estimate().offset_MC, other.offset_MC, rtol=1e-2, atol=1e-3)


@SOME
@given(people)
def test_what_a_person_said_replaces_the_answer(person: Person) -> None:
    """If every clip is known, one turn is enough, and the raw answers do not matter."""
    classes = person.raw_NC.shape[1]
    known_NC = np.eye(classes)[np.arange(len(person.raw_NC)) % classes]
    made = person.estimate(known_NC=known_NC)
    flat_NC = np.full_like(person.raw_NC, 1 / classes)
    np.testing.assert_array_equal(made.offset_MC, person.estimate(known_NC=known_NC, raw_NC=flat_NC).offset_MC)
    nothing_known = person.estimate(known_NC=np.zeros_like(known_NC))
    np.testing.assert_array_equal(nothing_known.offset_MC, person.estimate().offset_MC)


@SOME
@given(st.integers(0, 2**32), st.integers(2, 5), st.integers(1, 50))
def test_clips_that_are_all_alike(seed: int, classes: int, clips: int) -> None:
    person = Person(seed, 1, classes)
    logits_MNC, present_NM = np.repeat(person.logits_MNC, clips, axis=1), np.repeat(person.present_NM, clips, axis=0)
    made = estimate(logits_MNC, present_NM, np.repeat(person.raw_NC, clips, axis=0), person.model)
    answers_NC = answer(logits_MNC, present_NM, made)
    assert np.isfinite(answers_NC).all() and np.ptp(answers_NC, axis=0).max() < 1e-6


@SOME
@given(whole_people)
def test_another_head_gets_the_same_correction(person: Person) -> None:
    made = replace(person.estimate(), ways=None)
    sums_NC = person.model.fusion * person.logits_MNC.sum(axis=0)
    plain_NC = np.stack([softmax(row_C) for row_C in np.maximum(sums_NC, sums_NC.max(axis=1, keepdims=True) - 15)])
    clipped_MNC = np.stack([np.log(plain_NC) / person.model.fusion, np.zeros_like(plain_NC)])
    np.testing.assert_allclose(
        corrected(plain_NC, person.present_NM, made), answer(clipped_MNC, person.present_NM, made), atol=1e-5
    )
    unmoved = Offset(np.zeros_like(made.offset_MC), np.full_like(made.prior_C, 1 / len(made.prior_C)), 0)
    np.testing.assert_allclose(corrected(plain_NC, person.present_NM, unmoved), plain_NC, atol=1e-6)


@SOME
@given(whole_people)
def test_the_ordinary_head_has_its_share(person: Person) -> None:
    """Between both answers, and equal to them if they agree."""
    made = person.estimate()
    own_NC = scores(person.logits_MNC, person.present_NM, made)
    both_NC = shares_of(mixed(own_NC, person.raw_NC))
    by_hand_NC = shares_of(own_NC) ** (1 - BASE_SHARE) * np.maximum(person.raw_NC, 1e-9) ** BASE_SHARE
    np.testing.assert_allclose(both_NC, by_hand_NC / by_hand_NC.sum(axis=1, keepdims=True), atol=1e-6)
    np.testing.assert_allclose(shares_of(mixed(own_NC, shares_of(own_NC))), shares_of(own_NC), atol=1e-5)


@SOME
@given(st.integers(2, 6), st.integers(5, 60), st.integers(0, 2**32))
def test_the_prior_is_narrow_for_few_classes_and_even_for_all(classes: int, clips: int, seed: int) -> None:
    person = Person(seed, clips * classes, classes, both=True)
    one_NC, all_NC = (
        np.eye(classes)[label_N] for label_N in (np.zeros(clips * classes, int), np.arange(clips * classes) % classes)
    )
    of_one, of_all = (person.estimate(known_NC=known_NC).prior_C for known_NC in (one_NC, all_NC))
    assert of_one[0] > 0.8 and of_one.argmax() == 0
    np.testing.assert_allclose(of_all, 1 / classes, atol=0.05)


def test_what_is_refused() -> None:
    person = Person(0, 4, 3, both=True)
    broken_MNC = person.logits_MNC.copy()
    broken_MNC[1, 2, 0] = np.nan
    neither_NM = person.present_NM.copy()
    neither_NM[0] = 0
    refusals: list[tuple[dict[str, object], str]] = [
        ({"logits_MNC": broken_MNC}, "not finite"),
        ({"logits_MNC": person.logits_MNC[:, :, :2]}, "3 classes are wanted"),
        ({"logits_MNC": person.logits_MNC[0]}, "logits of shape"),
        ({"present_NM": neither_NM}, "without sound and without picture"),
        ({"present_NM": person.present_NM * 0.5}, "neither 0 nor 1"),
        ({"present_NM": person.present_NM[:2]}, "present of shape"),
        ({"raw_NC": person.raw_NC * 2}, "does not sum to 1"),
        ({"raw_NC": person.raw_NC * np.nan}, "undefined"),
        ({"raw_NC": person.raw_NC[:3]}, "4 x 3 is wanted"),
        ({"known_NC": np.full((4, 3), 0.1)}, "does not sum to 1"),
        ({"known_NC": np.full((4, 3), np.nan)}, "undefined"),
        ({"known_NC": np.zeros((4, 2))}, "known answers have shape"),
    ]
    for changed, words in refusals:
        with pytest.raises(ValueError, match=words):
            person.estimate(**changed)
    with pytest.raises(ValueError, match="not finite"):
        answer(broken_MNC, person.present_NM, person.estimate())


def test_nothing_seen_changes_nothing() -> None:
    person = Person(0, 3, 3, both=True)
    made = estimate(np.zeros((2, 0, 3)), np.zeros((0, 2)), np.zeros((0, 3)), replace(person.model, fusion=1.0))
    assert made.clips == 0 and not made.offset_MC.any()
    plain_NC = np.stack([softmax(row_C) for row_C in person.logits_MNC.sum(axis=0)])
    np.testing.assert_allclose(answer(person.logits_MNC, person.present_NM, made), plain_NC, atol=1e-6)


@pytest.mark.parametrize("classes", [MOST_HYPOTHESES + 1, 100])
def test_many_classes_fit_into_a_devices_memory(classes: int) -> None:
    """A person of four classes is told from all others, with a full window and every pair of clip and hypothesis."""
    person = Person(0, 200, classes, both=True)
    shown = np.array([3, 5, 8, 13])
    said_NC = np.eye(classes)[shown[np.arange(200) % 4]]
    person.estimate(known_NC=said_NC)  # What numpy loads at its first call is not counted.
    tracemalloc.start()
    made = person.estimate(known_NC=said_NC)
    _, most_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert made.prior_C[shown].sum() > 0.6 and set(np.argsort(-made.prior_C)[:4]) == set(shown)
    assert most_bytes < 64e6


def people_of_six_classes(rng: np.random.Generator) -> PersonModel:
    """Return how people differ and how their clips scatter, with heads that are right about both."""
    root_MCC = rng.standard_normal((2, 6, 6)) / 2
    within_MCC = root_MCC @ root_MCC.transpose(0, 2, 1) + 0.5 * np.eye(6)
    mean_MCC = within_MCC - np.diagonal(within_MCC, axis1=1, axis2=2)[:, np.newaxis] / 2
    return PersonModel(mean_MCC, within_MCC / 2, within_MCC, 1.0, 20)


def test_which_classes_a_person_shows_is_found_and_helps() -> None:
    """People drawn from the model itself, whose shift looks like a class: their few classes must not be mistaken."""
    own_mass, gains = [], []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        model = people_of_six_classes(rng)
        few = int(rng.integers(2, 7))
        shown = rng.permutation(6)[:few]
        label_N = np.repeat(shown, 40 // few)
        shift_MC = np.stack([rng.multivariate_normal(np.zeros(6), part_CC) for part_CC in model.between_MCC])
        noise_MNC = np.stack(
            [rng.multivariate_normal(np.zeros(6), part_CC, len(label_N)) for part_CC in model.within_MCC]
        )
        logits_MNC = model.mean_MCC[:, label_N] + shift_MC[:, np.newaxis] + noise_MNC
        raw_NC = shares_of(logits_MNC.sum(axis=0))
        both_NM = np.ones((len(label_N), 2))
        made = estimate(logits_MNC, both_NM, raw_NC, model)
        after_NC = shares_of(mixed(scores(logits_MNC, both_NM, made), raw_NC))
        own_mass.append(float(made.prior_C[shown].sum()) - few / 6)
        gains.append(float((after_NC.argmax(axis=1) == label_N).mean() - (raw_NC.argmax(axis=1) == label_N).mean()))
    assert np.mean(own_mass) > 0.1, "the prior gathers on the classes that are shown"
    assert np.mean(gains) > 0.05 and np.mean(np.array(gains) < -0.05) < 0.2


@pytest.mark.parametrize("few", [1, 2, 3, 6])
@pytest.mark.parametrize("clips", [4, 8, 24, 60])
def test_a_person_whom_the_base_student_tells_rightly_loses_nothing(few: int, clips: int) -> None:
    """Clips beyond where their class lies in most people, so that the base student is sure of each and right."""
    for seed in range(10):
        rng = np.random.default_rng(seed)
        model = people_of_six_classes(rng)
        label_N = rng.permutation(6)[:few][np.arange(clips) % few]
        noise_MNC = np.stack(
            [rng.multivariate_normal(np.zeros(6), part_CC / 25, clips) for part_CC in model.within_MCC]
        )
        logits_MNC = 1.5 * model.mean_MCC[:, label_N] + noise_MNC
        raw_NC = shares_of(logits_MNC.sum(axis=0))
        assert (raw_NC.argmax(axis=1) == label_N).all()
        both_NM = np.ones((clips, 2))
        made = estimate(logits_MNC, both_NM, raw_NC, model)
        after_NC = shares_of(mixed(scores(logits_MNC, both_NM, made), raw_NC))
        assert (after_NC.argmax(axis=1) == label_N).all()
