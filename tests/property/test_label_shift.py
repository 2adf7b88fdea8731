"""Answers under another class prior, against the definition; and the habits that a device learns."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.data.label_shift import adapted, class_prior
from isthmus.edge.habits import learn


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


@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(2, 7))
@settings(max_examples=60, deadline=None)
def test_habits_are_a_distribution_that_half_remembers_what_the_heads_were_trained_on(seed, clips, classes):
    rng = np.random.default_rng(seed)
    local_NC = rng.dirichlet(np.full(classes, 0.3), clips).astype(np.float32)
    trained_C = rng.dirichlet(np.ones(classes))
    habits = learn("s", local_NC, trained_C)
    shares_C = np.array(habits.shares)
    assert habits.clips == clips
    assert shares_C.sum() == pytest.approx(1)
    assert (shares_C >= trained_C / 2 - 1e-6).all()
    assert np.allclose(shares_C, class_prior(local_NC, np.ones(clips), np.maximum(trained_C, 1e-6), pseudo_clips=clips))


def test_a_user_of_few_states_is_told_right_more_often():
    """Answers of a calibrated classifier of four classes, to a user who knows two of them."""
    rng = np.random.default_rng(1)
    means_CD = 1.2 * np.eye(4)

    def answers(labels_N):
        points_ND = means_CD[labels_N] + rng.standard_normal((len(labels_N), 4))
        likelihood_NC = np.exp(-0.5 * np.square(points_ND[:, None] - means_CD).sum(axis=2))
        return (likelihood_NC / likelihood_NC.sum(axis=1, keepdims=True)).astype(np.float32)

    habits = learn("s", answers(rng.choice(2, 60)), np.full(4, 0.25))
    labels_N = rng.choice(2, 2_000)
    told_NC = answers(labels_N)
    read_NC = np.stack([habits.answer(told_C) for told_C in told_NC])
    before, after = ((each_NC.argmax(axis=1) == labels_N).mean() for each_NC in (told_NC, read_NC))
    assert after > before + 0.03
    assert sum(habits.shares[:2]) > 0.58


@pytest.mark.parametrize("local_NC", [np.zeros((0, 3), np.float32), np.array([[np.nan, 0.5, 0.5]], np.float32)])
def test_habits_cannot_be_learned_of_nothing(local_NC):
    with pytest.raises(ValueError, match="no clips, or answers that are no numbers"):
        learn("s", local_NC, (0.2, 0.3, 0.5))
