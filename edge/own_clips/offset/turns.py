"""PURE: the turns between what a person is like and what their clips are, under several hypotheses at once.

The formulas are those of ``hypotheses``. Nearly all of their cost is a few products of large matrices: the logits of
all clips, side by side, with one column per hypothesis and class.

Axes: M modalities (sound, picture), N clips, C classes, H hypotheses, J hypotheses whose turns still move, E = M (C +
1) inputs: per modality the logits, and whether it is there; F = E + 1 with a one for the prior.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from isthmus.data.class_shares import class_prior
from isthmus.edge.own_clips.offset.answers import LEAST_PROBABILITY, Float64s
from isthmus.edge.own_clips.offset.people import Differs, People

MOST_TURNS: Final = 40
"""EM has nearly always stopped earlier."""

STILL: Final = 1e-3
"""The turns of a hypothesis end when no answer moves by more than this probability: less than changes a decision."""


@dataclass(frozen=True, eq=False)
class Settled:
    """What the turns end in, for each hypothesis about the class shares. ``count_HC`` are the sums of the answers."""

    prior_HC: Float64s
    count_HC: Float64s
    each_M: Sequence[Differs]


class Turns:
    """One person's clips, checked. ``known_NC``: what the person said of them, zeros for nothing."""

    def __init__(
        self,
        logits_MNC: Float64s,
        present_NM: Float64s,
        base_NC: Float64s,
        known_NC: Float64s | None,
        people: Sequence[People],
        fusion: float,
        base_share: float,
    ) -> None:
        self._logits_MNC = logits_MNC
        self._present_NM = present_NM
        self._base_NC = base_NC
        self._people = people
        self._factor_N = np.where(present_NM.sum(axis=1) > 1, fusion, 1.0)
        self._own_share = 1 - base_share
        self._log_base_NC = base_share * np.log(np.maximum(base_NC, LEAST_PROBABILITY))
        self._said_N = np.zeros(len(base_NC), bool) if known_NC is None else known_NC.any(axis=1)
        self._known_NC = np.zeros((0, base_NC.shape[1])) if known_NC is None else known_NC[self._said_N]
        self._inputs_NE = np.concatenate(
            [
                part
                for logits_NC, here_N in zip(logits_MNC, present_NM.T, strict=True)
                for part in (logits_NC * here_N[:, np.newaxis], here_N[:, np.newaxis])
            ],
            axis=1,
        )
        weighted_NE = self._own_share * self._factor_N[:, np.newaxis] * self._inputs_NE
        self._weighted_NF = np.column_stack([weighted_NE, np.ones(len(base_NC))])

    def settled(self, given_HC: Float64s | None) -> Settled:
        """Run the turns with these shares of the classes; None: with one hypothesis, whose shares the turns learn."""
        classes = self._base_NC.shape[1]
        answers_NJC = self._base_NC[:, np.newaxis] * (np.ones((1, classes)) if given_HC is None else given_HC)
        answers_NJC /= np.maximum(answers_NJC.sum(axis=2, keepdims=True), 1e-300)
        self._clamp(answers_NJC)
        prior_JC = np.empty((1, classes)) if given_HC is None else given_HC
        ended: list[tuple[npt.NDArray[np.int64], Settled]] = []
        moving_J = np.arange(len(prior_JC))
        for turn in range(MOST_TURNS):
            if given_HC is None:
                prior_JC = class_prior(answers_NJC[:, 0].sum(axis=0))[np.newaxis]
            each_M = self._persons(answers_NJC)
            moved_NJC = self._answers(each_M, prior_JC)
            answers_NJC -= moved_NJC
            ends_J = np.abs(answers_NJC, out=answers_NJC).max(axis=0).max(axis=1) < STILL  # both axes at once: slow
            if turn == MOST_TURNS - 1:
                ends_J[:] = True
            answers_NJC = moved_NJC
            if ends_J.any():
                found = Settled(prior_JC, answers_NJC.sum(axis=0), each_M)
                ended.append((moving_J[ends_J], _rows(found, ends_J)))
                if ends_J.all():
                    break
                moving_J, prior_JC, answers_NJC = moving_J[~ends_J], prior_JC[~ends_J], answers_NJC[:, ~ends_J]
        return _joined(ended)

    def evidence(self, found: Settled) -> Float64s:
        """Return l_j of the formulas, (H,)."""
        joint_NHC = np.tile(np.log(found.prior_HC), (len(self._base_NC), 1, 1))
        if len(self._known_NC):
            with np.errstate(divide="ignore"):  # What the person ruled out of a clip has the log-probability of zero.
                joint_NHC[self._said_N] += np.log(self._known_NC)[:, np.newaxis]
        total_H = np.zeros(len(found.prior_HC))
        for people, logits_NC, here_N, one in zip(
            self._people, self._logits_MNC, self._present_NM.T, found.each_M, strict=True
        ):
            if here_N.any():
                clip_NHC, person_H = people.likelihoods(logits_NC, here_N * self._factor_N, one)
                joint_NHC += clip_NHC
                total_H += person_H
        most_NH1 = joint_NHC.max(axis=2, keepdims=True)
        joint_NHC -= most_NH1
        log_NH = np.log(np.exp(joint_NHC, out=joint_NHC).sum(axis=2)) + most_NH1[:, :, 0]
        evidence_H: Float64s = total_H + log_NH.sum(axis=0)
        return evidence_H

    def ways(self, found: Settled) -> tuple[Float64s, Float64s]:
        """Return slope (M, C, C) and level (M, C) of ``Ways``, of the first hypothesis."""
        slopes, levels = zip(
            *(people.ways(one) for people, one in zip(self._people, found.each_M, strict=True)), strict=True
        )
        return np.stack(slopes)[:, 0], np.stack(levels)[:, 0]

    def _persons(self, answers_NJC: Float64s) -> list[Differs]:
        clips, hypotheses, classes = answers_NJC.shape
        sums_JCE = (answers_NJC.reshape(clips, -1).T @ self._inputs_NE).reshape(hypotheses, classes, -1)
        return [
            people.person(part_JCX[:, :, :classes], part_JCX[:, :, classes])
            for people, part_JCX in zip(self._people, np.split(sums_JCE, len(self._people), axis=2), strict=True)
        ]

    def _answers(self, each_M: Sequence[Differs], prior_JC: Float64s) -> Float64s:
        """Return r of the formulas (N, J, C): the scores are one product of inputs and weights."""
        hypotheses, classes = prior_JC.shape
        weights_FJC = np.empty((self._weighted_NF.shape[1], hypotheses, classes))
        weights_FJC[-1] = self._own_share * np.log(classes * prior_JC)
        for modality, (people, one) in enumerate(zip(self._people, each_M, strict=True)):
            slope_JCC, level_JC = people.ways(one)
            slope_JCC = slope_JCC + np.eye(classes)
            first = modality * (classes + 1)
            weights_FJC[first : first + classes] = slope_JCC.transpose(2, 0, 1)
            weights_FJC[first + classes] = -(slope_JCC @ one.offset_HC[:, :, np.newaxis])[:, :, 0] - level_JC
        answers_NJC: Float64s = (self._weighted_NF @ weights_FJC.reshape(len(weights_FJC), -1)).reshape(
            -1, hypotheses, classes
        )
        answers_NJC += self._log_base_NC[:, np.newaxis]
        answers_NJC -= answers_NJC.max(axis=2, keepdims=True)
        np.exp(answers_NJC, out=answers_NJC)
        answers_NJC /= (answers_NJC @ np.ones(classes))[:, :, np.newaxis]  # sums of short rows: a product is faster
        self._clamp(answers_NJC)
        return answers_NJC

    def _clamp(self, answers_NJC: Float64s) -> None:
        answers_NJC[self._said_N] = self._known_NC[:, np.newaxis]


def _rows(found: Settled, kept_J: npt.NDArray[np.bool_]) -> Settled:
    return Settled(
        found.prior_HC[kept_J],
        found.count_HC[kept_J],
        [
            Differs(one.offset_HC[kept_J], one.way_HCC[kept_J], one.spread_HC[kept_J], one.counted_H[kept_J])
            for one in found.each_M
        ],
    )


def _joined(parts: Sequence[tuple[npt.NDArray[np.int64], Settled]]) -> Settled:
    """Return the hypotheses of all parts in their order, which the first member of each part tells."""
    order_H = np.argsort(np.concatenate([rows for rows, _ in parts]))
    found = [one for _, one in parts]

    def joined(each: Sequence[Float64s]) -> Float64s:
        return np.concatenate(each)[order_H]

    return Settled(
        joined([one.prior_HC for one in found]),
        joined([one.count_HC for one in found]),
        [
            Differs(
                joined([one.offset_HC for one in same]),
                joined([one.way_HCC for one in same]),
                joined([one.spread_HC for one in same]),
                joined([one.counted_H for one in same]),
            )
            for same in zip(*(one.each_M for one in found), strict=True)
        ],
    )
