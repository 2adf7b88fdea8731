"""Corrections: the result is the minimum of the stated sum, for any corrections."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from isthmus.edge.own_clips.corrections import Correction, learned, least_certain, said

Float64s = npt.NDArray[np.float64]
SOME = settings(max_examples=30)
sizes = st.tuples(st.integers(0, 2**32), st.integers(1, 6), st.integers(2, 4), st.integers(1, 5))


def clips(size: tuple[int, int, int, int]) -> tuple[Float64s, Float64s, Float64s]:
    """Return scores, features and the corrected classes of clips."""
    seed, count, classes, width = size
    rng = np.random.default_rng(seed)
    said_KC = np.eye(classes)[rng.integers(0, classes, count)]
    return 2 * rng.standard_normal((count, classes)), rng.standard_normal((count, width)), said_KC


def loss(change_CE: Float64s, scores_KC: Float64s, features_KE: Float64s, said_KC: Float64s, penalty: float) -> float:
    moved_KC = scores_KC + features_KE @ change_CE.T
    total_K = np.log(np.exp(moved_KC).sum(axis=1))
    return float((total_K - (said_KC * moved_KC).sum(axis=1)).sum() + penalty / 2 * (change_CE**2).sum())


@SOME
@given(sizes, st.floats(0.1, 20))
def test_the_change_is_the_minimum(size: tuple[int, int, int, int], penalty: float) -> None:
    scores_KC, features_KE, said_KC = clips(size)
    made_CE = learned(scores_KC, features_KE, said_KC, penalty=penalty)
    shape = made_CE.shape
    least = minimize(lambda flat: loss(flat.reshape(shape), scores_KC, features_KE, said_KC, penalty), made_CE.ravel())
    assert loss(made_CE, scores_KC, features_KE, said_KC, penalty) <= float(least.fun) + 1e-6
    np.testing.assert_allclose(made_CE.sum(axis=0), 0, atol=1e-6)


@SOME
@given(sizes)
def test_a_corrected_clip_is_never_answered_worse(size: tuple[int, int, int, int]) -> None:
    scores_KC, features_KE, said_KC = (part[:1] for part in clips(size))
    made_CE = learned(scores_KC, features_KE, said_KC)
    before, after = (
        float((np.exp(each) / np.exp(each).sum() * said_KC).sum())
        for each in (scores_KC, scores_KC + features_KE @ made_CE.T)
    )
    assert after >= before - 1e-9


@SOME
@given(sizes)
def test_contradictions_are_weighed(size: tuple[int, int, int, int]) -> None:
    """If a clip is said to be two classes, both gain, and equal scores stay equal."""
    scores_KC, features_KE, _ = clips(size)
    even_KC = np.zeros_like(scores_KC[:1])
    half_KC = np.zeros_like(even_KC)
    half_KC[0, :2] = 0.5
    of_pair = learned(
        np.repeat(even_KC, 2, axis=0), np.repeat(features_KE[:1], 2, axis=0), np.eye(scores_KC.shape[1])[:2]
    )
    moved_C = features_KE[0] @ of_pair.T
    assert moved_C[0] == pytest.approx(moved_C[1], abs=1e-6) and moved_C[0] >= moved_C.min() - 1e-9
    once = learned(even_KC, features_KE[:1], half_KC)
    assert (features_KE[0] @ once.T)[0] == pytest.approx((features_KE[0] @ once.T)[1], abs=1e-6)


def test_what_was_said() -> None:
    def one(clip: str, label: str) -> Correction:
        return Correction(clip, label, 0.0, "s")

    told = (one("b", "sad"), one("a", "happy"), one("b", "happy"), one("gone", "sad"), one("a", "no class"))
    shares_NC = said(told, ("a", "b", "c"), ("happy", "sad"))
    np.testing.assert_allclose(shares_NC, np.array([[1, 0], [0.5, 0.5], [0, 0]]))


def test_the_least_certain_clip() -> None:
    answers_NC = np.array([[0.5, 0.5, 0], [0.6, 0.3, 0.1], [0.4, 0.35, 0.25]])
    assert least_certain(answers_NC, np.array([True, True, True])) == 0
    assert least_certain(answers_NC, np.array([False, True, True])) == 2
    assert least_certain(answers_NC, np.array([False, False, False])) is None


def test_nothing_said_changes_nothing_and_bad_numbers_are_refused() -> None:
    assert not learned(np.zeros((0, 3)), np.zeros((0, 4)), np.zeros((0, 3))).any()
    scores_KC, features_KE, said_KC = clips((0, 3, 3, 2))
    for broken in (
        (scores_KC * np.nan, features_KE, said_KC),
        (scores_KC, features_KE * np.inf, said_KC),
        (scores_KC, features_KE, said_KC * 2),
        (scores_KC[:2], features_KE, said_KC),
        (scores_KC, features_KE[:1], said_KC),
    ):
        with pytest.raises(ValueError):
            learned(*broken)
