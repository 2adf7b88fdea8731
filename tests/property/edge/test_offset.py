"""The offset against its formulas in plain loops, and what must hold for every person."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import digamma, gammaln

from isthmus.edge.own_clips.offset import BASE_SHARE, Offset, answer, corrected, estimate, log_gamma, mixed, scores
from isthmus.edge.own_clips.offset import digamma as own_digamma
from isthmus.edge.own_clips.offset import softmax as shares_of
from isthmus.proto.person import PersonModel

Float64s = npt.NDArray[np.float64]
SOME = settings(max_examples=30)


class Person:
    """Random clips of one person, and a random model of people."""

    def __init__(self, seed: int, clips: int, classes: int, *, both: bool = False) -> None:
        rng = np.random.default_rng(seed)
        self.logits_MNC = 2 * rng.standard_normal((2, clips, classes))
        self.present_NM = np.ones((clips, 2))
        if not both:
            missing_N = rng.integers(0, 3, clips)
            self.present_NM[missing_N < 2, missing_N[missing_N < 2]] = 0
        self.raw_NC = rng.dirichlet(np.ones(classes), clips)
        spread = rng.standard_normal((2, 2, classes, classes + 2))
        between_MCC, within_MCC = (part @ part.transpose(0, 2, 1) for part in spread)
        mean_MCC = rng.standard_normal((2, classes, classes)) + 2 * np.eye(classes)
        self.model = PersonModel(
            *(part.astype(np.float32) for part in (mean_MCC, between_MCC, within_MCC)), float(rng.uniform(0.5, 1)), 10
        )

    def estimate(self, **changed: object) -> Offset:
        given_here = {
            "logits_MNC": self.logits_MNC,
            "present_NM": self.present_NM,
            "raw_NC": self.raw_NC,
            "model": self.model,
        }
        return estimate(**{**given_here, **changed})  # type: ignore[arg-type]


people = st.builds(Person, st.integers(0, 2**32), st.integers(1, 12), st.integers(2, 5))
whole_people = st.builds(Person, st.integers(0, 2**32), st.integers(1, 12), st.integers(2, 5), both=st.just(True))


def softmax(scores_C: Float64s) -> Float64s:
    powers_C: Float64s = np.exp(scores_C - scores_C.max())
    shares_C: Float64s = powers_C / powers_C.sum()
    return shares_C


def prior_by_hand(counts: Float64s) -> Float64s:
    """Return the class prior for these sums of answers, evenness by evenness and class by class."""
    classes, clips = len(counts), float(sum(counts))
    evidence, logs = [], []
    for a in (0.3, 1.0, 3.0, 10.0, 30.0):
        terms = [math.lgamma(a + count) - math.lgamma(a) for count in counts]
        evidence.append(math.lgamma(classes * a) - math.lgamma(classes * a + clips) + sum(terms))
        logs.append(np.array([digamma(a + count) - digamma(classes * a + clips) for count in counts]))
    weights = softmax(np.array(evidence))
    mean_log = sum((weight * log for weight, log in zip(weights, logs, strict=True)), np.zeros(classes))
    return 0.9 * softmax(mean_log) + 0.1 / classes


def by_hand(person: Person) -> tuple[list[Float64s], Float64s]:
    """Return offsets and prior by the formulas, clip by clip."""
    model, classes = person.model, person.raw_NC.shape[1]
    clips = range(len(person.raw_NC))
    answers = [row.copy() for row in person.raw_NC]
    offsets = [np.zeros(classes), np.zeros(classes)]
    prior = np.full(classes, 1 / classes)
    for _ in range(40):
        for m in (0, 1):
            here = [n for n in clips if person.present_NM[n, m]]
            if here:
                mean_logits = sum((person.logits_MNC[m, n] for n in here), np.zeros(classes)) / len(here)
                mean_answers = sum((answers[n] for n in here), np.zeros(classes)) / len(here)
                variance = model.between_MCC[m] + model.within_MCC[m] / len(here)
                gain = np.linalg.inv(variance) @ model.between_MCC[m]
                offsets[m] = (mean_logits - mean_answers @ model.mean_MCC[m]) @ gain
        prior = prior_by_hand(sum(answers, np.zeros(classes)))
        moved = []
        for n in clips:
            shifted = [person.logits_MNC[m, n] - offsets[m] for m in (0, 1) if person.present_NM[n, m]]
            factor = model.fusion if len(shifted) == 2 else 1.0
            found = factor * sum(shifted, np.zeros(classes)) + np.log(classes * prior)
            moved.append(softmax(0.7 * found + 0.3 * np.log(np.maximum(person.raw_NC[n], 1e-9))))
        still = max(float(np.abs(a - b).max()) for a, b in zip(moved, answers, strict=True)) < 1e-4
        answers = moved
        if still:
            break
    return offsets, prior


@SOME
@given(people)
def test_the_estimate_is_that_of_the_formulas(person: Person) -> None:
    made = person.estimate()
    offsets, prior_C = by_hand(person)
    np.testing.assert_allclose(made.offset_MC, offsets, rtol=1e-2, atol=1e-3)
    np.testing.assert_allclose(made.prior_C, prior_C, atol=1e-3)
    answers_NC = answer(person.logits_MNC, person.present_NM, made)
    for n, row_C in enumerate(answers_NC):
        shifted = [person.logits_MNC[m, n] - made.offset_MC[m] for m in (0, 1) if person.present_NM[n, m]]
        factor = person.model.fusion if len(shifted) == 2 else 1.0
        prior = np.log(len(row_C) * made.prior_C)
        np.testing.assert_allclose(row_C, softmax(factor * sum(shifted, np.zeros(len(row_C))) + prior), atol=1e-6)


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
    moved = person.estimate(logits_MNC=certain_MNC, model=flat)
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
    np.testing.assert_allclose(made.prior_C, prior_by_hand(known_NC.sum(axis=0)))
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
    made = person.estimate()
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
    assert of_one[0] > 0.85 and of_one.argmax() == 0
    np.testing.assert_allclose(of_all, 1 / classes, atol=1e-9)


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


@given(st.lists(st.floats(1e-3, 1e6), min_size=1, max_size=20))
def test_the_gamma_functions_are_scipys(values: list[float]) -> None:
    given_A = np.array(values)
    assert np.allclose(own_digamma(given_A), digamma(given_A), rtol=1e-12, atol=1e-12)
    assert np.allclose(log_gamma(given_A), gammaln(given_A), rtol=1e-13, atol=1e-12)
