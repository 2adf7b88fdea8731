"""PURE: what one person's voice and face shift in all their clips alike, estimated without labels and taken out.

For a linear head such a shift is a bias on the logits, one per modality. It can be estimated from the mean of
unlabelled clips if their classes are known on average. The classes are known only through the answers, so shift and
answers are estimated in turn. Both modalities answer together, and this keeps a wrong start from feeding itself: an
error of the sound is corrected by the picture.

With L_m the logits of modality m, M_m, B_m and S_m the mean, between and within of ``PersonModel``, n_m the clips that
have modality m, p the answers of the student's ordinary head, and r the present answers (row vectors):

    r   = p
    repeat:
        b_m = (mean L_m - mean r M_m) (B_m + S_m / n_m)^-1 B_m      posterior mean of the shift, both Gaussian
        pi  = shares of the classes, from the sums of r (below)
        r   = softmax((1 - s) (f sum_m (L_m - b_m) + log(C pi)) + s log p)
    answer: the last line, of a new clip

f is the fusion factor of clips with both modalities, else 1, and s is ``BASE_SHARE``. The shift is that of a
random-effects model (Robinson, "That BLUP is a good thing", Statistical Science 1991), and the turns are those of EM.

pi must serve people of all classes and people of few. Class shares have a Dirichlet prior, and how even it is, is
learned, too: with N_c the sum of r over the clips, N its sum, and a one of ``EVENNESS``,

    w_a      proportional to Gamma(C a) / Gamma(C a + N) prod_c Gamma(a + N_c) / Gamma(a)     evidence of a
    log pi_c = sum_a w_a (digamma(a + N_c) - digamma(C a + N)) + constant,

which is the variational posterior of Dirichlet shares (Blei, Ng and Jordan, JMLR 2003, section 5.2), averaged over a.
Estimating a class prior in the same turns as answers is Saerens, Latinne and Decaestecker 2002 (Neural Computation 14).
A share of the uniform distribution keeps a class possible that has not occurred. The estimate stays on the device.

Axes: M modalities (sound, picture), N clips, C classes.
"""

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from isthmus.proto.messages import FloatArray
from isthmus.proto.person import PersonModel

Reals = npt.NDArray[np.floating]
Float64s = npt.NDArray[np.float64]

MOST_TURNS: Final = 40
"""EM has nearly always stopped earlier."""

STILL: Final = 1e-4
"""The turns end when no answer moves by more than this probability: far less than changes a decision."""

EVENNESS: Final = (0.3, 1.0, 3.0, 10.0, 30.0)
"""Parameters of the Dirichlet prior of class shares. Under the first a person may have one class alone, under the last
they have all alike."""

_ASYMPTOTIC: Final = 6.0
_BERNOULLI: Final = (1 / 12, -1 / 120, 1 / 252, -1 / 240, 1 / 132, -691 / 32760, 1 / 12)
"""B_2n / 2n of the Bernoulli numbers."""

UNIFORM_SHARE: Final = 0.1
"""Share of the uniform distribution in the class prior. A class that has not occurred yet is still possible."""

BASE_SHARE: Final = 0.3
"""Share of the ordinary head's answer in every answer: while the offset is estimated, and in what the user sees. Where
the offset errs, users of few classes lose less. Public people chose it (docs/results/ravface-people)."""

_LEAST_VARIANCE: Final = 1e-6
"""Added to the variance, relative to its mean: logits may have a direction without any variance."""

_ROW_SUM_TOLERANCE: Final = 1e-3


@dataclass(frozen=True, eq=False)
class Offset:
    """One person's shift of the logits ``offset_MC`` and class prior ``prior_C``, estimated from ``clips`` clips.

    ``fusion`` is that of the person model. Zeros and a uniform prior change nothing but the fusion.
    """

    offset_MC: Float64s
    prior_C: Float64s
    clips: int
    fusion: float = 1.0


def estimate(
    logits_MNC: Reals,
    present_NM: Reals,
    raw_NC: Reals,
    model: PersonModel,
    known_NC: Reals | None = None,
    *,
    base_share: float = BASE_SHARE,
) -> Offset:
    """Estimate one person's offset from clips whose labels are unknown.

    ``logits_MNC`` are those of the centred heads, ``present_NM`` is 1 if clip n has modality m, and ``raw_NC`` are the
    answers of the student's ordinary head, from which the estimate starts. A row of ``known_NC`` that sums to 1 is what
    a person said of the clip: it replaces the answer in every turn. Rows of zeros are unknown. Logits of an absent
    modality are ignored. No clips give no offset.

    Raises ValueError for shapes that do not fit, a clip without sound and picture, NaN or infinity, or rows that are no
    distribution.
    """
    classes = model.mean_MCC.shape[-1]
    kept_MNC, here_NM = _checked(logits_MNC, present_NM, classes)
    modalities, clips, _ = kept_MNC.shape
    base_NC = _distributions(raw_NC, clips, classes, "the raw answers")
    sure_NC = None if known_NC is None else _known(known_NC, clips, classes)
    mean_MCC = np.asarray(model.mean_MCC, np.float64)
    prior_C = np.full(classes, 1 / classes)
    offset_MC = np.zeros((modalities, classes))
    counts_M = here_NM.sum(axis=0)
    gain_MCC = [_gain(model, modality, counts_M[modality]) for modality in range(modalities)]
    answers_NC = _clamped(base_NC, sure_NC)
    for _ in range(MOST_TURNS if clips else 0):
        for modality in np.flatnonzero(counts_M):
            here_N = here_NM[:, modality] > 0
            observed_C = kept_MNC[modality, here_N].mean(axis=0)
            expected_C = answers_NC[here_N].mean(axis=0) @ mean_MCC[modality]
            offset_MC[modality] = (observed_C - expected_C) @ gain_MCC[modality]
        prior_C = _class_prior(answers_NC.sum(axis=0))
        scores_NC = _scores(kept_MNC, here_NM, offset_MC, prior_C, model.fusion)
        moved_NC = _clamped(softmax(mixed(scores_NC, base_NC, base_share)), sure_NC)
        moved = float(np.abs(moved_NC - answers_NC).max())
        answers_NC = moved_NC
        if moved < STILL:
            break
    return Offset(offset_MC, prior_C, clips, model.fusion)


def scores(logits_MNC: Reals, present_NM: Reals, offset: Offset) -> Float64s:
    """Return the scores (N, C) of clips without the person's offset, under their class prior; their softmax answers.

    Arguments and errors as of ``estimate``.
    """
    kept_MNC, here_NM = _checked(logits_MNC, present_NM, len(offset.prior_C))
    return _scores(kept_MNC, here_NM, offset.offset_MC, offset.prior_C, offset.fusion)


def answer(logits_MNC: Reals, present_NM: Reals, offset: Offset) -> FloatArray:
    """Return the probabilities (N, C) of ``scores``. Arguments and errors as of ``estimate``."""
    return softmax(scores(logits_MNC, present_NM, offset)).astype(np.float32)


def mixed(scores_NC: Float64s, probabilities_NC: Reals, base_share: float = BASE_SHARE) -> Float64s:
    """Return the scores (N, C) of both answers together: the one without the offset and that of an ordinary head.

    The ordinary head, on this device or in the cloud, has the share ``base_share`` of a geometric mean. Probabilities
    below 1e-9 count as 1e-9. They are not checked here: whatever ran the head or read the message checked them.
    """
    both_NC: Float64s = (1 - base_share) * scores_NC + base_share * np.log(np.maximum(probabilities_NC, 1e-9))
    return both_NC


def corrected(probabilities_NC: Reals, present_NM: Reals, offset: Offset) -> FloatArray:
    """Return another head's answers (N, C) with the correction of the centred heads added to log p.

    No device answers so: the shift of a head that was not fitted on centred features is another one, and people lose by
    it (docs/results). Probabilities below 1e-9 count as 1e-9. Raises ValueError as ``estimate`` does.
    """
    classes = len(offset.prior_C)
    rows_NC = _distributions(probabilities_NC, len(present_NM), classes, "the answers")
    no_logits_MNC = np.zeros((present_NM.shape[1], len(present_NM), classes))
    shifted_NC = np.log(np.maximum(rows_NC, 1e-9)) + scores(no_logits_MNC, present_NM, offset)
    return softmax(shifted_NC).astype(np.float32)


def softmax(scores_NC: Float64s) -> Float64s:
    powers_NC = np.exp(scores_NC - scores_NC.max(axis=1, keepdims=True))
    answers_NC: Float64s = powers_NC / powers_NC.sum(axis=1, keepdims=True)
    return answers_NC


def _gain(model: PersonModel, modality: int, clips: float) -> Float64s:
    """Return (B + S / n)^-1 B; zeros without clips."""
    between_CC: Float64s = np.asarray(model.between_MCC[modality], np.float64)
    if not clips:
        return np.zeros_like(between_CC)
    total_CC = between_CC + np.asarray(model.within_MCC[modality], np.float64) / clips
    classes = len(total_CC)
    ridge = _LEAST_VARIANCE * (float(np.trace(total_CC)) / classes or 1.0)
    gain_CC: Float64s = np.asarray(np.linalg.solve(total_CC + ridge * np.eye(classes), between_CC), np.float64)
    return gain_CC


def _class_prior(counts_C: Float64s) -> Float64s:
    """Return pi by the formulas above, (C,), for the sum of the answers over all clips."""
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


def _scores(
    logits_MNC: Float64s, present_NM: Float64s, offset_MC: Float64s, prior_C: Float64s, fusion: float
) -> Float64s:
    """Return f sum_m (L_m - b_m) + log(C pi), (N, C)."""
    shifted_MNC = logits_MNC - offset_MC[:, np.newaxis]
    sum_NC: Float64s = (shifted_MNC * present_NM.T[:, :, np.newaxis]).sum(axis=0)
    factor_N = np.where(present_NM.sum(axis=1) > 1, fusion, 1.0)
    scores_NC: Float64s = factor_N[:, np.newaxis] * sum_NC + np.log(len(prior_C) * prior_C)
    return scores_NC


def _clamped(answers_NC: Float64s, known_NC: Float64s | None) -> Float64s:
    if known_NC is None:
        return answers_NC
    return np.where(known_NC.sum(axis=1, keepdims=True) > 0, known_NC, answers_NC)


def _checked(logits_MNC: Reals, present_NM: Reals, classes: int) -> tuple[Float64s, Float64s]:
    """Return both as float64, with zeros for the logits of absent modalities."""
    here_NM: Float64s = np.asarray(present_NM, np.float64)
    if logits_MNC.ndim != 3 or logits_MNC.shape[2] != classes:
        raise ValueError(f"logits of shape {logits_MNC.shape}; modalities x clips x {classes} classes are wanted")
    if here_NM.shape != (logits_MNC.shape[1], logits_MNC.shape[0]):
        raise ValueError(f"present of shape {here_NM.shape} for logits of shape {logits_MNC.shape}")
    if not ((here_NM == 0) | (here_NM == 1)).all():
        raise ValueError("present is neither 0 nor 1")
    if not (here_NM.sum(axis=1) > 0).all():
        raise ValueError("a clip without sound and without picture has no answer")
    kept_MNC = np.where(here_NM.T[:, :, np.newaxis] > 0, logits_MNC, 0.0).astype(np.float64)
    if not np.isfinite(kept_MNC).all():
        raise ValueError("a clip's logits are not finite")
    return kept_MNC, here_NM


def _distributions(rows_NC: Reals, clips: int, classes: int, what: str) -> Float64s:
    exact_NC: Float64s = np.asarray(rows_NC, np.float64)
    if exact_NC.shape != (clips, classes):
        raise ValueError(f"{what} have shape {exact_NC.shape}; {clips} x {classes} is wanted")
    if not np.isfinite(exact_NC).all() or (exact_NC < 0).any():
        raise ValueError(f"{what} contain a negative or undefined value")
    if (np.abs(exact_NC.sum(axis=1) - 1) > _ROW_SUM_TOLERANCE).any():
        raise ValueError(f"a row of {what} does not sum to 1")
    return exact_NC


def _known(known_NC: Reals, clips: int, classes: int) -> Float64s:
    exact_NC: Float64s = np.asarray(known_NC, np.float64)
    said = (exact_NC != 0).any(axis=-1)
    if exact_NC.shape != (clips, classes):
        raise ValueError(f"the known answers have shape {exact_NC.shape}; {clips} x {classes} is wanted")
    _distributions(exact_NC[said], int(said.sum()), classes, "the known answers")
    return exact_NC


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
