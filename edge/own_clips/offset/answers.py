"""PURE: answers of the centred heads without a person's offset, and the ordinary head's share in them.

Axes: M modalities (sound, picture), N clips, C classes.
"""

from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import numpy.typing as npt

from isthmus.data.class_shares import softmax
from isthmus.proto.messages import FloatArray

Reals = npt.NDArray[np.floating]
Float64s = npt.NDArray[np.float64]

BASE_SHARE: Final = 0.3
"""Share of the ordinary head's answer in every answer: while the offset is estimated, and in what the user sees. Where
the offset errs, users of few classes lose less. Public people chose it (docs/results/ravface-people)."""

LEAST_PROBABILITY: Final = 1e-9
"""A smaller probability of the ordinary head counts as this one."""

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


def scores(logits_MNC: Reals, present_NM: Reals, offset: Offset) -> Float64s:
    """Return the scores (N, C) of clips without the person's offset, under their class prior; their softmax answers.

    Arguments and errors as of ``estimate``.
    """
    kept_MNC, here_NM = checked(logits_MNC, present_NM, len(offset.prior_C))
    sum_NC = np.zeros(kept_MNC.shape[1:])
    for modality, here_N in enumerate(here_NM.T):
        shifted_NC = kept_MNC[modality] - offset.offset_MC[modality]
        if offset.ways is not None:
            shifted_NC = shifted_NC + shifted_NC @ offset.ways.slope_MCC[modality].T - offset.ways.level_MC[modality]
        sum_NC += shifted_NC * here_N[:, np.newaxis]
    factor_N1 = np.where(here_NM.sum(axis=1) > 1, offset.fusion, 1.0)[:, np.newaxis]
    scores_NC: Float64s = factor_N1 * sum_NC + np.log(len(offset.prior_C) * offset.prior_C)
    return scores_NC


def answer(logits_MNC: Reals, present_NM: Reals, offset: Offset) -> FloatArray:
    """Return the probabilities (N, C) of ``scores``. Arguments and errors as of ``estimate``."""
    return softmax(scores(logits_MNC, present_NM, offset)).astype(np.float32)


def mixed(scores_NC: Float64s, probabilities_NC: Reals, base_share: float = BASE_SHARE) -> Float64s:
    """Return the scores (N, C) of both answers together: the one without the offset and that of an ordinary head.

    The ordinary head, on this device or in the cloud, has the share ``base_share`` of a geometric mean. Probabilities
    below 1e-9 count as 1e-9. They are not checked here: whatever ran the head or read the message checked them.
    """
    both_NC: Float64s = (1 - base_share) * scores_NC + base_share * np.log(
        np.maximum(probabilities_NC, LEAST_PROBABILITY)
    )
    return both_NC


def corrected(probabilities_NC: Reals, present_NM: Reals, offset: Offset) -> FloatArray:
    """Return another head's answers (N, C) with the offset of the centred heads taken out of log p.

    No device answers so: the shift of a head that was not fitted on centred features is another one, and people lose by
    it (docs/results). Probabilities below 1e-9 count as 1e-9. Raises ValueError as ``estimate`` does.
    """
    classes = len(offset.prior_C)
    rows_NC = distributions(probabilities_NC, len(present_NM), classes, "the answers")
    no_logits_MNC = np.zeros((present_NM.shape[1], len(present_NM), classes))
    shifted_NC = np.log(np.maximum(rows_NC, LEAST_PROBABILITY)) + scores(
        no_logits_MNC, present_NM, replace(offset, ways=None)
    )
    return softmax(shifted_NC).astype(np.float32)


def checked(logits_MNC: Reals, present_NM: Reals, classes: int) -> tuple[Float64s, Float64s]:
    """Return both as float64, with zeros for logits of absent modalities. Raises ValueError as ``estimate`` does."""
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


def distributions(rows_NC: Reals, clips: int, classes: int, what: str) -> Float64s:
    """Return rows that each sum to 1 as float64. Raises ValueError for others."""
    exact_NC: Float64s = np.asarray(rows_NC, np.float64)
    if exact_NC.shape != (clips, classes):
        raise ValueError(f"{what} have shape {exact_NC.shape}; {clips} x {classes} is wanted")
    if not np.isfinite(exact_NC).all() or (exact_NC < 0).any():
        raise ValueError(f"{what} contain a negative or undefined value")
    if (np.abs(exact_NC.sum(axis=1) - 1) > _ROW_SUM_TOLERANCE).any():
        raise ValueError(f"a row of {what} does not sum to 1")
    return exact_NC


def known_answers(known_NC: Reals, clips: int, classes: int) -> Float64s:
    """Return what a person said of clips as float64: rows that sum to 1, or zeros. Raises ValueError for others."""
    exact_NC: Float64s = np.asarray(known_NC, np.float64)
    said = (exact_NC != 0).any(axis=-1)
    if exact_NC.shape != (clips, classes):
        raise ValueError(f"the known answers have shape {exact_NC.shape}; {clips} x {classes} is wanted")
    distributions(exact_NC[said], int(said.sum()), classes, "the known answers")
    return exact_NC
