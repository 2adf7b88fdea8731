"""PURE: one person among others in one modality: the posterior means of offset and own ways, and their likelihood.

The formulas are those of ``hypotheses``. Axes: N clips, C classes, H hypotheses, K = C - 1 differences of logits.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np

from isthmus.edge.own_clips.offset.answers import Float64s
from isthmus.proto.person import PersonModel

FLATTEST: Final = 0.2
"""Least eigenvalue of G as a share of its largest: the heads hardly tell some classes apart, nor the ways of them."""

RIDGE: Final = 0.02
"""Added to B and S in the evidence, relative to their mean variance: logits may have a direction without any."""

_LEAST_VARIANCE: Final = 1e-6
"""The same in the estimate."""


@dataclass(frozen=True, eq=False)
class Differs:
    """How a person differs from others in one modality under H hypotheses: b, w, e and W of the formulas."""

    offset_HC: Float64s
    way_HCC: Float64s
    spread_HC: Float64s
    counted_H: Float64s


@dataclass(frozen=True, eq=False)
class People:
    """How people differ in one modality: M, B and S of the formulas, G^-1, and k."""

    mean_CC: Float64s
    between_CC: Float64s
    within_CC: Float64s
    metric_CC: Float64s
    own_way: float

    @staticmethod
    def of(model: PersonModel, modality: int, own_way: float) -> "People":
        """Return what the person model says of a modality."""
        mean_CC, between_CC, within_CC = (
            np.asarray(part[modality], np.float64) for part in (model.mean_MCC, model.between_MCC, model.within_MCC)
        )
        return People(mean_CC, between_CC, within_CC, _metric(mean_CC), own_way)

    def person(self, sum_HCC: Float64s, count_HC: Float64s) -> Differs:
        """Return the posterior means by the formulas.

        ``sum_HCC`` is the sum of r_nc L_n over the clips that have the modality, and ``count_HC`` that of r_nc.
        """
        k, classes = self.own_way, len(self.mean_CC)
        spread_HC = k * count_HC + 1 - k
        counted_H = (count_HC / spread_HC).sum(axis=1)
        if not counted_H.any():
            return Differs(np.zeros_like(count_HC), np.zeros_like(sum_HCC), spread_HC, counted_H)
        distance_HCC = sum_HCC - count_HC[:, :, np.newaxis] * self.mean_CC
        total_HCC = self.between_CC + self.within_CC / counted_H[:, np.newaxis, np.newaxis]
        ridge_H = _LEAST_VARIANCE * np.trace(total_HCC, axis1=1, axis2=2) / classes
        ridge_H = np.where(ridge_H > 0, ridge_H, _LEAST_VARIANCE)
        total_HCC += ridge_H[:, np.newaxis, np.newaxis] * np.eye(classes)
        mean_HC = (distance_HCC / spread_HC[:, :, np.newaxis]).sum(axis=1) / counted_H[:, np.newaxis]
        # Row vectors: b = mean total^-1 B, and one right side costs less than the inverse.
        offset_HC = np.linalg.solve(total_HCC.transpose(0, 2, 1), mean_HC[:, :, np.newaxis])[:, :, 0] @ self.between_CC
        way_HCC = distance_HCC - count_HC[:, :, np.newaxis] * offset_HC[:, np.newaxis]
        way_HCC *= (k / spread_HC)[:, :, np.newaxis]
        return Differs(offset_HC, way_HCC, spread_HC, counted_H)

    def ways(self, person: Differs) -> tuple[Float64s, Float64s]:
        """Return slope (H, C, C) and level (H, C) of ``Ways``."""
        slope_HCC = person.way_HCC @ self.metric_CC
        unsure = self.own_way * (1 - self.own_way) * float(np.trace(self.metric_CC @ self.within_CC)) / 2
        level_HC = ((self.mean_CC + person.way_HCC / 2) * slope_HCC).sum(axis=2) + unsure / person.spread_HC
        return slope_HCC, level_HC

    def likelihoods(self, logits_NC: Float64s, weight_N: Float64s, person: Differs) -> tuple[Float64s, Float64s]:
        """Return log N(L_n; M_c + b + w_c, (1 - k) S) up to a constant, times ``weight_N``, (N, H, C), and the last
        line of l_j (H,)."""
        k, basis_CK = self.own_way, _differences(len(self.mean_CC))
        between_KK, within_KK = (
            _ridged(basis_CK.T @ part_CC @ basis_CK, RIDGE) for part_CC in (self.between_CC, self.within_CC)
        )
        shared_KK, precise_KK = np.linalg.inv(between_KK), np.linalg.inv(within_KK)
        offset_HK, way_HCK = person.offset_HC @ basis_CK, person.way_HCC @ basis_CK
        # Distances by squares and products: an array of all differences would not fit into a device's memory.
        middle_K = logits_NC.mean(axis=0) @ basis_CK
        clip_NK = logits_NC @ basis_CK - middle_K
        centre_HCK = self.mean_CC @ basis_CK + way_HCK + (offset_HK - middle_K)[:, np.newaxis]
        precise_HCK = centre_HCK @ precise_KK
        square_HC = (precise_HCK * centre_HCK).sum(axis=2)
        square_N = ((clip_NK @ precise_KK) * clip_NK).sum(axis=1)
        weight_N = weight_N / (1 - k)
        sides_NX = np.column_stack([clip_NK * weight_N[:, np.newaxis], weight_N * square_N, weight_N])
        other_XH = np.vstack(
            [
                precise_HCK.reshape(-1, precise_HCK.shape[2]).T,
                np.full((1, square_HC.size), -0.5),
                -square_HC.reshape(1, -1) / 2,
            ]
        )
        clip_NHC = (sides_NX @ other_XH).reshape(len(logits_NC), *square_HC.shape)
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
        return clip_NHC, -sum(log_HX) / 2


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
    """Return G^-1 of the formulas (C, C). It is zero in the direction in which all logits are alike."""
    classes = len(mean_CC)
    centred_CC = np.eye(classes) - 1 / classes
    around_CC = centred_CC @ mean_CC @ centred_CC
    value_C, vector_CC = np.linalg.eigh((around_CC + around_CC.T) / 2)
    if value_C[-1] <= 0:  # The heads tell no classes apart.
        return np.zeros_like(mean_CC)
    metric_CC = (vector_CC / np.maximum(value_C, FLATTEST * value_C[-1])) @ vector_CC.T
    return np.asarray(centred_CC @ metric_CC @ centred_CC, np.float64)
