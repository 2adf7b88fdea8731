"""Class shares learned from few clips, against their formulas in plain loops and scipy."""

import math

import numpy as np
import numpy.typing as npt
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import digamma, gammaln
from scipy.special import softmax as softmax_of_scipy

from isthmus.data.class_shares import class_prior, log_gamma, softmax
from isthmus.data.class_shares import digamma as own_digamma

Float64s = npt.NDArray[np.float64]

sums = st.lists(st.floats(0, 1e4), min_size=2, max_size=8)


def prior_by_hand(counts: list[float]) -> Float64s:
    """Return the class prior for these sums of answers, evenness by evenness and class by class."""
    classes, clips = len(counts), sum(counts)
    evidence, logs = [], []
    for a in (0.3, 1.0, 3.0, 10.0, 30.0):
        terms = [math.lgamma(a + count) - math.lgamma(a) for count in counts]
        evidence.append(math.lgamma(classes * a) - math.lgamma(classes * a + clips) + sum(terms))
        logs.append(np.array([digamma(a + count) - digamma(classes * a + clips) for count in counts]))
    weights = softmax_of_scipy(np.array(evidence))
    mean_log = sum((weight * log for weight, log in zip(weights, logs, strict=True)), np.zeros(classes))
    prior: Float64s = 0.9 * softmax_of_scipy(mean_log) + 0.1 / classes
    return prior


@given(sums)
def test_the_prior_is_that_of_the_formulas(counts: list[float]) -> None:
    np.testing.assert_allclose(class_prior(np.array(counts)), prior_by_hand(counts), rtol=1e-9, atol=1e-12)


@given(sums)
def test_the_prior_belongs_to_the_counts(counts: list[float]) -> None:
    """Equal counts have equal shares, larger ones no smaller shares, and no class is ruled out."""
    prior_C = class_prior(np.array(counts))
    order_C = np.argsort(counts, kind="stable")
    assert (np.diff(prior_C[order_C]) > -1e-12).all()
    assert math.isclose(prior_C.sum(), 1) and prior_C.min() > 0.1 / len(counts) - 1e-12
    np.testing.assert_allclose(class_prior(np.full(len(counts), counts[0])), 1 / len(counts))


def test_few_clips_of_one_class_narrow_the_prior() -> None:
    shares = [class_prior(np.array([float(clips), 0, 0, 0, 0, 0]))[0] for clips in (0, 1, 4, 9, 100)]
    assert math.isclose(shares[0], 1 / 6)
    assert shares == sorted(shares) and shares[2] > 0.4 and shares[4] > 0.9


@given(st.lists(st.floats(1e-3, 1e6), min_size=1, max_size=20))
def test_the_gamma_functions_are_scipys(values: list[float]) -> None:
    given_A = np.array(values)
    assert np.allclose(own_digamma(given_A), digamma(given_A), rtol=1e-12, atol=1e-12)
    assert np.allclose(log_gamma(given_A), gammaln(given_A), rtol=1e-13, atol=1e-12)


@given(st.lists(st.floats(-800, 800), min_size=1, max_size=9))
def test_softmax_is_scipys(values: list[float]) -> None:
    scores_1C = np.array([values])
    np.testing.assert_allclose(softmax(scores_1C), softmax_of_scipy(scores_1C, axis=1), rtol=1e-12, atol=1e-300)
