"""PURE: how often a person is in each class, learned from the answers to few clips.

Class shares have a Dirichlet prior, and how even it is, is learned, too. With N_c the sum of the answers over the
clips, N its sum, C classes, and a one of ``EVENNESS``,

    w_a      proportional to Gamma(C a) / Gamma(C a + N) prod_c Gamma(a + N_c) / Gamma(a)     evidence of a
    log pi_c = sum_a w_a (digamma(a + N_c) - digamma(C a + N)) + constant,

which is the variational posterior of Dirichlet shares (Blei, Ng and Jordan, JMLR 2003, section 5.2), averaged over a.
Estimating a class prior in the same turns as answers is Saerens, Latinne and Decaestecker 2002 (Neural Computation 14).

Axes: N clips, C classes, A values of a.
"""

import math
from typing import Final

import numpy as np
import numpy.typing as npt

Float64s = npt.NDArray[np.float64]

UNIFORM_SHARE: Final = 0.1
"""Share of the uniform distribution in a class prior. A class that has not occurred yet is still possible."""

EVENNESS: Final = (0.3, 1.0, 3.0, 10.0, 30.0)
"""Parameters of the Dirichlet prior of class shares. Under the first a person may have one class alone, under the last
they have all alike."""

_ASYMPTOTIC: Final = 6.0
_BERNOULLI: Final = (1 / 12, -1 / 120, 1 / 252, -1 / 240, 1 / 132, -691 / 32760, 1 / 12)
"""B_2n / 2n of the Bernoulli numbers."""


def softmax(scores_NC: Float64s) -> Float64s:
    """Return the softmax over the last axis."""
    powers_NC = np.exp(scores_NC - scores_NC.max(axis=-1, keepdims=True))
    answers_NC: Float64s = powers_NC / powers_NC.sum(axis=-1, keepdims=True)
    return answers_NC


def class_prior(counts_C: Float64s) -> Float64s:
    """Return pi by the formulas above, (C,), with its share of the uniform distribution; ``counts_C`` are the N_c."""
    classes, clips = len(counts_C), counts_C.sum()
    even_A1 = np.array(EVENNESS)[:, np.newaxis]
    even_A, total_A = even_A1[:, 0], classes * even_A1[:, 0]
    posterior_AC = even_A1 + counts_C
    evidence_A = log_gamma(total_A) - log_gamma(total_A + clips) - classes * log_gamma(even_A)
    evidence_A = evidence_A + log_gamma(posterior_AC).sum(1)
    weight_A = softmax(evidence_A[np.newaxis])[0]
    log_share_C = weight_A @ (digamma(posterior_AC) - digamma(total_A + clips)[:, np.newaxis])
    prior_C: Float64s = (1 - UNIFORM_SHARE) * softmax(log_share_C[np.newaxis])[0] + UNIFORM_SHARE / classes
    return prior_C


def log_gamma(values: Float64s) -> Float64s:
    """Return the logarithm of the gamma function of positive numbers of any shape."""
    found: Float64s = np.vectorize(math.lgamma, otypes=[np.float64])(values)
    return found


def digamma(values: Float64s) -> Float64s:
    """Return the logarithmic derivative of the gamma function of positive numbers of any shape, to 1e-12.

    The argument is raised to 6 or more by the recurrence, and the asymptotic series takes the rest (Abramowitz and
    Stegun, 6.3.5 and 6.3.18).
    """
    raised = np.array(values, np.float64)
    below = np.zeros_like(raised)
    while (small := raised < _ASYMPTOTIC).any():
        below[small] -= 1 / raised[small]
        raised[small] += 1
    square = 1 / np.square(raised)
    series = sum(term * square ** (power + 1) for power, term in enumerate(_BERNOULLI))
    found: Float64s = below + np.log(raised) - 0.5 / raised - series
    return found
