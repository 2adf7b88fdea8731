"""PURE: how one person differs from others, estimated from their clips without labels and taken out of their answers.

A person's voice and face shift all their clips alike, and everyone has a way of their own to show each class. For a
linear head the first is a bias on the logits, one per modality: the offset. The second moves the mean logits of a
class. Both can be estimated from unlabelled clips if their classes are known. The classes are known only through the
answers, so person and answers are estimated in turn. Both modalities answer together, and this keeps a wrong start from
feeding itself: an error of the sound is corrected by the picture.

The logits of a clip of class c are M[c] + b + w[c] + noise, in each modality. M, B and S are the mean, between and
within of ``PersonModel``; b has the covariance B, w[c] the covariance k S, and the noise (1 - k) S, where k is
``OWN_WAY``. With L the logits of a modality, N_c the sum of the answers r to its clips, p the answers of the student's
ordinary head, pi the shares of the classes, and row vectors:

    r = p pi, rows scaled to 1
    repeat:
        e_c  = k N_c + 1 - k
        D_c  = sum_n r_nc (L_n - M_c)                            distance of class c, summed
        b    = (sum_c D_c / e_c) / W (B + S / W)^-1 B,           W = sum_c N_c / e_c: clips that count
        w_c  = k (D_c - N_c b) / e_c
        t_nc = (L_n - b - M_c - w_c / 2) G^-1 w_c - k (1 - k) tr(G^-1 S) / (2 e_c)
        r    = softmax((1 - s) (f sum (L - b + t) + log(C pi)) + s log p),   sum over the modalities
    answer: the last line, of a new clip

f is the fusion factor of clips with both modalities, else 1, and s is ``BASE_SHARE``. b and w are the posterior means
of a random-effects model (Robinson, "That BLUP is a good thing", Statistical Science 1991), and the turns are those of
EM. t is what the log-likelihood of class c gains if its mean moves by w_c (its expectation, since w_c is uncertain).
G is the covariance under which logits that are calibrated are the log-likelihood ratios of Gaussians with means M: it
is M itself, without its means of rows and columns.

pi must serve people of all classes and people of few. It cannot be learned in the same turns: an offset towards a class
and a class that is frequent look alike, and one error feeds the other. So pi is chosen among hypotheses by how well
they explain all logits. Turns with even shares rank the classes by their sums of r. Hypothesis j says that the person
shows the first j of them, all alike often. Its evidence, after turns under it, is by Laplace's approximation

    l_j = sum_n log sum_c pi_c prod_m N(L_n; M_c + b + w_c, (1 - k) S)^f
          + sum_m log N(b; 0, B) - log|B^-1 + W S^-1| / 2 + sum_c log N(w_c; 0, k S) - log|S^-1 e_c / (k (1 - k))| / 2

for the differences of logits, since what all logits share tells nothing of a class. pi is the mean of the hypotheses'
shares with weights proportional to exp(T l_j) / (C over j), T = t / (t + n) for n clips and t = ``TELLING_CLIPS``: what
is wrong in the model is wrong in all clips of a person, so many of them tell less than they claim. If there are more
than ``MOST_HYPOTHESES`` classes, only so many values of j are compared. The estimate stays on the device.

Fewer clips than ``EVIDENCE_CLIPS`` say too little of both, of which classes there are and of ways of their own: k is 0
then, the turns start with r = p, and pi is learned in them (``data.class_shares``).

Axes: M modalities (sound, picture), N clips, C classes, H hypotheses, K = C - 1 differences of logits.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import numpy.typing as npt

from isthmus.data.class_shares import UNIFORM_SHARE, class_prior, softmax
from isthmus.proto.messages import FloatArray
from isthmus.proto.person import PersonModel

Reals = npt.NDArray[np.floating]
Float64s = npt.NDArray[np.float64]

MOST_TURNS: Final = 40
"""EM has nearly always stopped earlier."""

STILL: Final = 1e-3
"""The turns end when no answer moves by more than this probability: less than changes a decision."""

TELLING_CLIPS: Final = 24
"""However many clips a person has, they speak for a hypothesis about classes as at most so many independent ones."""

MOST_HYPOTHESES: Final = 32
"""A device's time and memory grow with them. With more classes, the values of j are in geometric progression."""

EVIDENCE_CLIPS: Final = 10
"""From so many clips on the classes of a person are told by evidence. RavFace's public people gain by it with 12 and
24 clips, of 3 and all classes, and lose with 8 and 4, of 2 and 1 (docs/results/few-classes)."""

BASE_SHARE: Final = 0.3
"""Share of the ordinary head's answer in every answer: while the offset is estimated, and in what the user sees. Where
the offset errs, users of few classes lose less. Public people chose it (docs/results/ravface-people)."""

OWN_WAY: Final = 0.1
"""Share of S that is a person's own way of a class, the same in all their clips of it. It is about 0.2 on RavFace
(docs/results/person-spread); half of it is believed, because the classes are uncertain. Public people chose so
(docs/log)."""

_FLATTEST: Final = 0.2
"""Least eigenvalue of G as a share of its largest: the heads hardly tell some classes apart, nor the ways of them."""

_RIDGE: Final = 0.02
"""Added to B and S in the evidence, relative to their mean variance: logits may have a direction without any."""

_LEAST_VARIANCE: Final = 1e-6
"""The same in the estimate."""

_ROW_SUM_TOLERANCE: Final = 1e-3


@dataclass(frozen=True, eq=False)
class Offset:
    """One person's shift of the logits ``offset_MC`` and class prior ``prior_C``, estimated from ``clips`` clips.

    ``fusion`` is that of the person model. ``ways`` are the person's own of each class; None: those of all people.
    Zeros and a uniform prior change nothing but the fusion.
    """

    offset_MC: Float64s
    prior_C: Float64s
    clips: int
    fusion: float = 1.0
    ways: "Ways | None" = None


@dataclass(frozen=True, eq=False)
class Ways:
    """What the scores of clips gain from a person's own ways of the classes: t = x ``slope_MCC``^T - ``level_MC`` for
    logits x without the offset.
    """

    slope_MCC: Float64s
    level_MC: Float64s


def estimate(
    logits_MNC: Reals,
    present_NM: Reals,
    raw_NC: Reals,
    model: PersonModel,
    known_NC: Reals | None = None,
    *,
    base_share: float = BASE_SHARE,
    own_way: float = OWN_WAY,
) -> Offset:
    """Estimate one person's offset, and their own ways of the classes, from clips whose labels are unknown.

    ``logits_MNC`` are those of the centred heads, ``present_NM`` is 1 if clip n has modality m, and ``raw_NC`` are the
    answers of the student's ordinary head, from which the estimate starts. A row of ``known_NC`` that sums to 1 is what
    a person said of the clip: it replaces the answer in every turn. Rows of zeros are unknown. Logits of an absent
    modality are ignored. No clips give no offset.

    Raises ValueError for shapes that do not fit, a clip without sound and picture, NaN or infinity, or rows that are no
    distribution.
    """
    classes = model.mean_MCC.shape[-1]
    kept_MNC, here_NM = _checked(logits_MNC, present_NM, classes)
    base_NC = _distributions(raw_NC, kept_MNC.shape[1], classes, "the raw answers")
    sure_NC = None if known_NC is None else _known(known_NC, kept_MNC.shape[1], classes)
    few = len(base_NC) < EVIDENCE_CLIPS
    people = [_People.of(model, modality, 0.0 if few else own_way) for modality in range(len(kept_MNC))]
    own = _Own(kept_MNC, here_NM, base_NC, sure_NC, people, model.fusion, base_share)
    even_C = np.full(classes, 1 / classes)
    if not own.clips:
        return Offset(np.zeros((len(kept_MNC), classes)), even_C, 0, model.fusion)
    if few:
        found = own.settled(None)
        return Offset(found.offset_MHC[:, 0], found.prior_HC[0], own.clips, model.fusion)
    rank_C = np.argsort(-own.settled(even_C[np.newaxis]).answers_HNC[0].sum(axis=0), kind="stable")
    size_H = _hypotheses(classes)
    first_HC = np.tri(classes)[size_H - 1][:, np.argsort(rank_C)]  # The first classes by rank.
    prior_HC = (1 - UNIFORM_SHARE) * first_HC / first_HC.sum(axis=1, keepdims=True) + UNIFORM_SHARE / classes
    sets_H = np.array([math.log(math.comb(classes, int(size))) for size in size_H])
    weight_1H = softmax((own.trust * own.evidence(own.settled(prior_HC)) - sets_H)[np.newaxis])
    found = own.settled(weight_1H @ prior_HC)
    ways = Ways(found.slope_MHCC[:, 0], found.level_MHC[:, 0]) if own_way else None
    return Offset(found.offset_MHC[:, 0], found.prior_HC[0], own.clips, model.fusion, ways)


def scores(logits_MNC: Reals, present_NM: Reals, offset: Offset) -> Float64s:
    """Return the scores (N, C) of clips without the person's offset, under their class prior; their softmax answers.

    Arguments and errors as of ``estimate``.
    """
    kept_MNC, here_NM = _checked(logits_MNC, present_NM, len(offset.prior_C))
    slope_MHCC, level_MHC = (
        (None, None)
        if offset.ways is None
        else (offset.ways.slope_MCC[:, np.newaxis], offset.ways.level_MC[:, np.newaxis])
    )
    prior_1C, offset_M1C = offset.prior_C[np.newaxis], offset.offset_MC[:, np.newaxis]
    scores_NC: Float64s = _scores(kept_MNC, here_NM, prior_1C, offset.fusion, offset_M1C, slope_MHCC, level_MHC)[0]
    return scores_NC


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
    """Return another head's answers (N, C) with the offset of the centred heads taken out of log p.

    No device answers so: the shift of a head that was not fitted on centred features is another one, and people lose by
    it (docs/results). Probabilities below 1e-9 count as 1e-9. Raises ValueError as ``estimate`` does.
    """
    classes = len(offset.prior_C)
    rows_NC = _distributions(probabilities_NC, len(present_NM), classes, "the answers")
    no_logits_MNC = np.zeros((present_NM.shape[1], len(present_NM), classes))
    shifted_NC = np.log(np.maximum(rows_NC, 1e-9)) + scores(no_logits_MNC, present_NM, replace(offset, ways=None))
    return softmax(shifted_NC).astype(np.float32)


@dataclass(frozen=True, eq=False)
class _People:
    """How people differ in one modality: M, B and S of the formulas above, G^-1, and k."""

    mean_CC: Float64s
    between_CC: Float64s
    within_CC: Float64s
    metric_CC: Float64s
    own_way: float

    @staticmethod
    def of(model: PersonModel, modality: int, own_way: float) -> "_People":
        mean_CC, between_CC, within_CC = (
            np.asarray(part[modality], np.float64) for part in (model.mean_MCC, model.between_MCC, model.within_MCC)
        )
        return _People(mean_CC, between_CC, within_CC, _metric(mean_CC), own_way)

    def person(self, logits_NC: Float64s, answers_HNC: Float64s) -> "_Differs":
        """Return the posterior means by the formulas above. ``answers_HNC`` is 0 for absent clips."""
        k, classes = self.own_way, len(self.mean_CC)
        count_HC = answers_HNC.sum(axis=1)
        spread_HC = k * count_HC + 1 - k
        counted_H = (count_HC / spread_HC).sum(axis=1)
        if not counted_H.any():
            nothing_HCC = np.zeros((*count_HC.shape, classes))
            return _Differs(np.zeros_like(count_HC), nothing_HCC, spread_HC, counted_H)
        distance_HCC = answers_HNC.transpose(0, 2, 1) @ logits_NC - count_HC[:, :, np.newaxis] * self.mean_CC
        total_HCC = self.between_CC + self.within_CC / counted_H[:, np.newaxis, np.newaxis]
        ridge_H = _LEAST_VARIANCE * np.trace(total_HCC, axis1=1, axis2=2) / classes
        ridge_H = np.where(ridge_H > 0, ridge_H, _LEAST_VARIANCE)
        total_HCC = total_HCC + ridge_H[:, np.newaxis, np.newaxis] * np.eye(classes)
        gain_HCC = np.linalg.solve(total_HCC, np.broadcast_to(self.between_CC, total_HCC.shape))
        mean_HC = (distance_HCC / spread_HC[:, :, np.newaxis]).sum(axis=1) / counted_H[:, np.newaxis]
        offset_HC = (mean_HC[:, np.newaxis] @ gain_HCC)[:, 0]
        way_HCC = distance_HCC - count_HC[:, :, np.newaxis] * offset_HC[:, np.newaxis]
        return _Differs(offset_HC, k * way_HCC / spread_HC[:, :, np.newaxis], spread_HC, counted_H)

    def ways(self, person: "_Differs") -> tuple[Float64s, Float64s]:
        """Return slope (H, C, C) and level (H, C) of ``Ways``."""
        slope_HCC = person.way_HCC @ self.metric_CC
        unsure = self.own_way * (1 - self.own_way) * float(np.trace(self.metric_CC @ self.within_CC)) / 2
        level_HC = ((self.mean_CC + person.way_HCC / 2) * slope_HCC).sum(axis=2) + unsure / person.spread_HC
        return slope_HCC, level_HC

    def likelihoods(self, logits_NC: Float64s, person: "_Differs") -> tuple[Float64s, Float64s]:
        """Return log N(L_n; M_c + b + w_c, (1 - k) S) up to a constant (H, N, C), and the last line of l_j (H,)."""
        k, basis_CK = self.own_way, _differences(len(self.mean_CC))
        between_KK, within_KK = (
            _ridged(basis_CK.T @ part_CC @ basis_CK, _RIDGE) for part_CC in (self.between_CC, self.within_CC)
        )
        shared_KK, precise_KK = np.linalg.inv(between_KK), np.linalg.inv(within_KK)
        offset_HK, way_HCK = person.offset_HC @ basis_CK, person.way_HCC @ basis_CK
        # Distances by squares and products: an array of all differences would not fit into a device's memory.
        middle_K = logits_NC.mean(axis=0) @ basis_CK
        clip_NK = logits_NC @ basis_CK - middle_K
        centre_HCK = self.mean_CC @ basis_CK + way_HCK + (offset_HK - middle_K)[:, np.newaxis]
        precise_HCK = centre_HCK @ precise_KK
        square_N1 = ((clip_NK @ precise_KK) * clip_NK).sum(axis=1, keepdims=True)
        square_H1C = (precise_HCK * centre_HCK).sum(axis=2)[:, np.newaxis]
        clip_HNC = (clip_NK @ precise_HCK.transpose(0, 2, 1) - (square_N1 + square_H1C) / 2) / (1 - k)
        posterior_HKK = shared_KK + person.counted_H[:, np.newaxis, np.newaxis] * precise_KK
        log_HX = [
            ((offset_HK @ shared_KK) * offset_HK).sum(axis=1),
            np.linalg.slogdet(posterior_HKK)[1] + np.linalg.slogdet(between_KK)[1],
        ]
        if k:
            log_HX += [
                ((way_HCK @ precise_KK) * way_HCK).sum(axis=(1, 2)) / k,
                basis_CK.shape[1] * np.log(person.spread_HC / (1 - k)).sum(axis=1),
            ]
        return clip_HNC, -sum(log_HX) / 2


@dataclass(frozen=True, eq=False)
class _Differs:
    """How a person differs from others in one modality under H hypotheses: b, w, e and W of the formulas above."""

    offset_HC: Float64s
    way_HCC: Float64s
    spread_HC: Float64s
    counted_H: Float64s


@dataclass(frozen=True, eq=False)
class _Settled:
    """What the turns end in, for each hypothesis about the class shares."""

    prior_HC: Float64s
    answers_HNC: Float64s
    each_M: Sequence[_Differs]
    offset_MHC: Float64s
    slope_MHCC: Float64s
    level_MHC: Float64s


@dataclass(frozen=True, eq=False)
class _Own:
    """One person's clips, checked. ``known_NC``: what the person said of them, zeros for nothing."""

    logits_MNC: Float64s
    present_NM: Float64s
    base_NC: Float64s
    known_NC: Float64s | None
    people: Sequence[_People]
    fusion: float
    base_share: float

    @property
    def clips(self) -> int:
        return len(self.base_NC)

    @property
    def trust(self) -> float:
        """T of the formulas above."""
        return TELLING_CLIPS / (TELLING_CLIPS + self.clips)

    def settled(self, given_HC: Float64s | None) -> _Settled:
        """Run the turns with these shares of the classes; None: with one hypothesis, whose shares the turns learn."""
        answers_HNC = self.base_NC[np.newaxis] if given_HC is None else self.base_NC * given_HC[:, np.newaxis]
        answers_HNC = self._clamped(answers_HNC / np.maximum(answers_HNC.sum(axis=2, keepdims=True), 1e-300))
        for _ in range(MOST_TURNS):
            prior_HC = class_prior(answers_HNC[0].sum(axis=0))[np.newaxis] if given_HC is None else given_HC
            each_M = [
                people.person(logits_NC, answers_HNC * here_N[:, np.newaxis])
                for people, logits_NC, here_N in zip(self.people, self.logits_MNC, self.present_NM.T, strict=True)
            ]
            slopes, levels = zip(
                *(people.ways(one) for people, one in zip(self.people, each_M, strict=True)), strict=True
            )
            offset_MHC = np.stack([one.offset_HC for one in each_M])
            slope_MHCC, level_MHC = np.stack(slopes), np.stack(levels)
            scores_HNC = _scores(
                self.logits_MNC, self.present_NM, prior_HC, self.fusion, offset_MHC, slope_MHCC, level_MHC
            )
            moved_HNC = self._clamped(softmax(mixed(scores_HNC, self.base_NC, self.base_share)))
            moved = float(np.abs(moved_HNC - answers_HNC).max())
            answers_HNC = moved_HNC
            if moved < STILL:
                break
        return _Settled(prior_HC, answers_HNC, each_M, offset_MHC, slope_MHCC, level_MHC)

    def evidence(self, found: _Settled) -> Float64s:
        """Return l_j of the formulas above, (H,)."""
        factor_N1 = np.where(self.present_NM.sum(axis=1) > 1, self.fusion, 1.0)[:, np.newaxis]
        allowed_NC = self._clamped(np.ones_like(self.base_NC))
        with np.errstate(divide="ignore"):  # What the person ruled out of a clip has the log-probability of zero.
            joint_HNC = np.log(found.prior_HC)[:, np.newaxis] + np.log(allowed_NC)
        total_H = np.zeros(len(found.prior_HC))
        for people, logits_NC, here_N, one in zip(
            self.people, self.logits_MNC, self.present_NM.T, found.each_M, strict=True
        ):
            if here_N.any():
                clip_HNC, person_H = people.likelihoods(logits_NC, one)
                joint_HNC = joint_HNC + clip_HNC * here_N[:, np.newaxis] * factor_N1
                total_H = total_H + person_H
        most_HN1 = joint_HNC.max(axis=2, keepdims=True)
        log_HN = np.log(np.exp(joint_HNC - most_HN1).sum(axis=2)) + most_HN1[:, :, 0]
        evidence_H: Float64s = total_H + log_HN.sum(axis=1)
        return evidence_H

    def _clamped(self, answers_XNC: Float64s) -> Float64s:
        if self.known_NC is None:
            return answers_XNC
        return np.where(self.known_NC.sum(axis=1, keepdims=True) > 0, self.known_NC, answers_XNC)


def _hypotheses(classes: int) -> npt.NDArray[np.int64]:
    """Return how many classes each hypothesis has, rising from one to all."""
    if classes <= MOST_HYPOTHESES:
        return np.arange(1, classes + 1)
    return np.unique(np.rint(np.geomspace(1, classes, MOST_HYPOTHESES)).astype(np.int64))


def _differences(classes: int) -> Float64s:
    """Return an orthonormal basis (C, C - 1) of the differences of logits: what all logits share tells nothing."""
    basis_CC = np.linalg.qr(np.column_stack([np.ones(classes), np.eye(classes)[:, 1:]]))[0]
    return np.asarray(basis_CC[:, 1:], np.float64)


def _ridged(part_KK: Float64s, share: float) -> Float64s:
    """Return the covariance with ``share`` of its mean variance added."""
    mean = float(np.trace(part_KK)) / len(part_KK)
    ridged_KK: Float64s = part_KK + share * (mean if mean > 0 else 1.0) * np.eye(len(part_KK))
    return ridged_KK


def _metric(mean_CC: Float64s) -> Float64s:
    """Return G^-1 of the formulas above (C, C). It is zero in the direction in which all logits are alike."""
    classes = len(mean_CC)
    centred_CC = np.eye(classes) - 1 / classes
    around_CC = centred_CC @ mean_CC @ centred_CC
    value_C, vector_CC = np.linalg.eigh((around_CC + around_CC.T) / 2)
    if value_C[-1] <= 0:  # The heads tell no classes apart.
        return np.zeros_like(mean_CC)
    metric_CC = (vector_CC / np.maximum(value_C, _FLATTEST * value_C[-1])) @ vector_CC.T
    return np.asarray(centred_CC @ metric_CC @ centred_CC, np.float64)


def _scores(
    logits_MNC: Float64s,
    present_NM: Float64s,
    prior_HC: Float64s,
    fusion: float,
    offset_MHC: Float64s,
    slope_MHCC: Float64s | None,
    level_MHC: Float64s | None,
) -> Float64s:
    """Return f sum_m (L_m - b_m + t_m) + log(C pi), (H, N, C)."""
    sum_HNC = np.zeros((len(prior_HC), *logits_MNC.shape[1:]))
    for modality, here_N in enumerate(present_NM.T):
        shifted_HNC = logits_MNC[modality] - offset_MHC[modality][:, np.newaxis]
        if slope_MHCC is not None and level_MHC is not None:
            gained_HNC = shifted_HNC @ slope_MHCC[modality].transpose(0, 2, 1) - level_MHC[modality][:, np.newaxis]
            shifted_HNC = shifted_HNC + gained_HNC
        sum_HNC += shifted_HNC * here_N[:, np.newaxis]
    factor_N = np.where(present_NM.sum(axis=1) > 1, fusion, 1.0)
    scores_HNC: Float64s = factor_N[:, np.newaxis] * sum_HNC + np.log(prior_HC.shape[1] * prior_HC)[:, np.newaxis]
    return scores_HNC


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
