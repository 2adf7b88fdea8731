"""PURE: what a shipped person model gives away about the public people it was fitted on: members or strangers?

The attacker knows a person's clips with their labels, and what the manifest ships. For each signal, a higher value
speaks for a member.

    shift     minus the squared length of the person's shift of the logits in units of B (B tells how people differ)
    means     minus the distance of the person's class means, without the shift, from M
    loss      minus the cross-entropy of the centred heads on the clips, without the shift (the heads, not the model)
    ordinary  minus the cross-entropy of the student's ordinary head, which every student has, with or without the model
"""

from dataclasses import dataclass
from typing import Final

import numpy as np

from isthmus.experiments.personal.ladder.person import HEADS, Person
from isthmus.proto.messages import Captured
from isthmus.proto.person import Centred

SIGNALS: Final = ("shift", "means", "loss", "ordinary")


@dataclass(frozen=True)
class Suspect:
    """A person, whether they were a member, and the attacker's signals."""

    person: str
    member: bool
    signals: tuple[float, float, float, float]


def suspect(person: Person, member: bool, centred: Centred) -> Suspect:
    """Return the signals of one person."""
    model = centred.person
    logits_MNC = centred.heads.logits(person.features_MND).astype(np.float64)
    labels = np.unique(person.labels_N)
    shift_term = mean_term = 0.0
    summed_NC = np.zeros(logits_MNC.shape[1:])
    for modality, logits_NC in enumerate(logits_MNC):
        found_LC = np.stack([logits_NC[person.labels_N == label].mean(axis=0) for label in labels])
        away_LC = found_LC - model.mean_MCC[modality][labels]
        shift_C = away_LC.mean(axis=0)
        between_CC = model.between_MCC[modality].astype(np.float64)
        between_CC = between_CC + 1e-3 * np.trace(between_CC) / len(between_CC) * np.eye(len(between_CC))
        shift_term -= float(shift_C @ np.linalg.solve(between_CC, shift_C))
        mean_term -= float(np.square(away_LC - shift_C).mean())
        summed_NC += logits_NC - shift_C
    scores_NC = model.fusion * summed_NC
    log_p_NC = scores_NC - scores_NC.max(axis=1, keepdims=True)
    log_p_NC -= np.log(np.exp(log_p_NC).sum(axis=1, keepdims=True))
    rows_N = np.arange(len(log_p_NC))
    ordinary_N = person.raw[HEADS[0]][Captured.BOTH][rows_N, person.labels_N]
    by_centred = float(log_p_NC[rows_N, person.labels_N].mean())
    by_ordinary = float(np.log(np.maximum(ordinary_N, 1e-9)).mean())
    return Suspect(person.name, member, (shift_term, mean_term, by_centred, by_ordinary))


def separation(members: np.ndarray, strangers: np.ndarray) -> float:
    """Return the share of pairs (member, stranger) in which the member's value is higher: 0.5 tells nothing.

    Raises ValueError if a side is empty.
    """
    if not len(members) or not len(strangers):
        raise ValueError("no members or no strangers to tell apart")
    higher = members[:, np.newaxis] - strangers[np.newaxis]
    return float((np.sign(higher).mean() + 1) / 2)
