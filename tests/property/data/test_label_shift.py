"""Answers under another class prior, against the definition; and the habits that a device learns."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.data.label_shift import adapted, class_prior
from isthmus.edge.own_clips.habits import LEAST, learn, pseudo_clips


@given(st.integers(0, 2**32 - 1), st.integers(1, 8), st.integers(2, 7))
@settings(max_examples=60, deadline=None)
def test_adapted_answers_are_bayes_rule_with_the_prior_exchanged(seed, rows, classes):
    rng = np.random.default_rng(seed)
    likelihood_NC = rng.gamma(0.5, size=(rows, classes)) + 1e-6
    own_C, prior_C = rng.dirichlet(np.ones(classes)) + 1e-3, rng.dirichlet(np.ones(classes))
    own_C /= own_C.sum()
    under_own_NC = likelihood_NC * own_C
    under_prior_NC = likelihood_NC * prior_C
    answers_NC = (under_own_NC / under_own_NC.sum(axis=1, keepdims=True)).astype(np.float32)
    expected_NC = under_prior_NC / under_prior_NC.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(adapted(answers_NC, prior_C, own_C), expected_NC, atol=1e-4)
    np.testing.assert_allclose(adapted(answers_NC, own_C, own_C), answers_NC, atol=1e-6)


def test_an_answer_that_the_prior_rules_out_stays_as_it_is():
    answers_NC = np.array([[1.0, 0.0]], np.float32)
    np.testing.assert_array_equal(adapted(answers_NC, np.array([0.0, 1.0]), np.array([0.5, 0.5])), answers_NC)


@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(2, 7), st.floats(0.02, 3))
@settings(max_examples=60, deadline=None)
def test_habits_are_a_distribution_that_remembers_what_the_heads_were_trained_on(seed, clips, classes, spread):
    rng = np.random.default_rng(seed)
    local_NC = rng.dirichlet(np.full(classes, spread), clips).astype(np.float32)
    trained_C = rng.dirichlet(np.ones(classes))
    habits = learn("s", local_NC, trained_C)
    shares_C = np.array(habits.shares)
    held_back = pseudo_clips(local_NC)
    assert habits.clips == clips
    assert shares_C.sum() == pytest.approx(1)
    assert held_back >= LEAST
    assert (shares_C >= trained_C * held_back / (1 + held_back) - 1e-6).all()
    own_C = np.maximum(trained_C, 1e-6)
    expected_C = class_prior(local_NC, np.ones(clips), own_C, pseudo_clips=held_back * clips)
    np.testing.assert_allclose(shares_C, expected_C)


def answers_at(sure: float, classes: int = 6) -> np.ndarray:
    """Return answers of a student that gives every clip class 0 with this probability."""
    local_C = np.full(classes, (1 - sure) / (classes - 1), np.float32)
    local_C[0] = sure
    return np.tile(local_C, (30, 1))


@pytest.mark.parametrize(("sure", "expected"), [(0.5, 10.0), (0.76, 0.997), (0.55, 6.69), (0.9, 0.123), (1.0, 0.1)])
def test_the_less_sure_a_student_is_the_less_its_word_counts(sure, expected):
    assert pseudo_clips(answers_at(sure)) == pytest.approx(expected, rel=1e-2)


def test_a_student_that_hardly_tells_its_user_changes_hardly_an_answer():
    """The answers are weak and always wrong in the same way: EM alone would take class 0 for the user's only state."""
    even = np.full(6, 1 / 6)
    local_NC = answers_at(0.5)
    moved_C = np.array(learn("s", local_NC, even).shares)
    credulous_C = np.array(learn("s", local_NC, even, held_back=1).shares)
    assert credulous_C[0] > 0.49
    assert moved_C[0] < 0.25
    sure = np.array(learn("s", answers_at(0.9), even).shares)
    assert sure[0] > 0.85 and sure.min() > 0.01, "no class is ruled out, however sure the student is"


@pytest.mark.parametrize(("apart", "gain"), [(1.2, 0.02), (1.6, 0.04), (2.0, 0.05)])
def test_a_user_of_few_states_is_told_right_more_often(apart, gain):
    """A calibrated classifier of four classes (61, 73 and 82 % accuracy) and a user with only two of them."""
    rng = np.random.default_rng(1)
    means_CD = apart * np.eye(4)

    def answers(labels_N):
        points_ND = means_CD[labels_N] + rng.standard_normal((len(labels_N), 4))
        likelihood_NC = np.exp(-0.5 * np.square(points_ND[:, None] - means_CD).sum(axis=2))
        return (likelihood_NC / likelihood_NC.sum(axis=1, keepdims=True)).astype(np.float32)

    habits = learn("s", answers(rng.choice(2, 60)), np.full(4, 0.25))
    labels_N = rng.choice(2, 2_000)
    told_NC = answers(labels_N)
    read_NC = np.stack([habits.answer(told_C) for told_C in told_NC])
    before, after = ((each_NC.argmax(axis=1) == labels_N).mean() for each_NC in (told_NC, read_NC))
    assert after > before + gain
    assert sum(habits.shares[:2]) > 0.5 + gain


@pytest.mark.parametrize("local_NC", [np.zeros((0, 3), np.float32), np.array([[np.nan, 0.5, 0.5]], np.float32)])
def test_habits_cannot_be_learned_of_nothing(local_NC):
    with pytest.raises(ValueError, match="no clips to learn habits from, or answers that are not finite"):
        learn("s", local_NC, (0.2, 0.3, 0.5))
