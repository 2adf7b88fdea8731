"""Constants of the offset, chosen for each fold on its public people alone (nested), before the fold is measured."""

import itertools
from collections.abc import Mapping
from typing import Final

import numpy as np

from isthmus.distill.student.centred import fit_centred
from isthmus.distill.teacher.held_out import Held, fit_weights
from isthmus.distill.teacher.on_trunks import DECAY
from isthmus.experiments.personal.ladder.bases import Base
from isthmus.experiments.personal.ladder.methods import Constants, Known, Seen, chosen
from isthmus.experiments.personal.ladder.person import HEADS, Integers, Person, tasks
from isthmus.proto.messages import Captured, FloatArray

GRID: Final = tuple(
    Constants(clips, power, share) for clips, power, share in itertools.product((1.0, 4.0), (0.5, 1.0), (0.0, 0.3, 0.5))
)

_FOLDS: Final = 4
_STRENGTHS: Final = (0.01,)
_DROPOUT: Final = 0.15


def choose(base: Base, rows_of_public: Mapping[str, Integers], class_counts: tuple[int, ...], seed: int) -> Constants:
    """Return the candidate with the highest accuracy on public people, each of whom was left out once.

    Heads are fitted again without the people of an inner fold. The accuracy is the mean over halves for users of each
    number of classes, over the other sentence and over the other intensity. The necks have seen the people's clips, but
    no labels.
    """
    people = sorted(rows_of_public)
    right = np.zeros(len(GRID))
    for fold in range(min(_FOLDS, len(people))):
        out = people[fold::_FOLDS]
        learn_N = np.concatenate([rows_of_public[name] for name in people if name not in out])
        known, raw = _fitted(base, learn_N)
        for name in out:
            person = _with_raw(base.person(name, rows_of_public[name]), raw, rows_of_public[name])
            for task in tasks(person, seed, class_counts):
                right += _accuracies(Seen.of(person, task, known, seed), known, person.labels_N[task.test_T])
    return GRID[int(right.argmax())]


def _accuracies(seen: Seen, known: Known, labels_T: Integers) -> FloatArray:
    found = []
    for constants in GRID:
        told_TC = chosen(seen, Known(known.centred, known.trained_C, constants))
        found.append((told_TC.argmax(axis=1) == labels_T).mean())
    return np.array(found, np.float32)


def _fitted(base: Base, learn_N: Integers) -> tuple[Known, dict[Captured, FloatArray]]:
    """Return the centred heads of some people, and an ordinary head's answers to all clips."""
    labels_N = np.asarray(base.clips.labels_N)[learn_N]
    features_MND = base.features_MND[:, learn_N]
    actors = [base.clips.actors[row] for row in learn_N]
    centred = fit_centred(features_MND, np.ones((len(learn_N), 2)), labels_N, actors, strengths=_STRENGTHS)
    counts_C = np.bincount(labels_N, minlength=len(base.clips.classes)) + 1
    shares_C = counts_C / counts_C.sum()
    held = Held(features_MND.transpose(1, 0, 2).astype(np.float64), labels_N, np.zeros(len(learn_N), np.int64))
    nothing_MCD = np.zeros((2, len(shares_C), features_MND.shape[2]))
    weights_MCD = fit_weights(held, nothing_MCD, np.log(shares_C), _DROPOUT, DECAY)
    scores_NC = np.einsum("mnd,mcd->nc", base.features_MND, weights_MCD) + np.log(shares_C)
    powers_NC = np.exp(scores_NC - scores_NC.max(axis=1, keepdims=True))
    raw_NC = (powers_NC / powers_NC.sum(axis=1, keepdims=True)).astype(np.float32)
    return Known(centred, shares_C.astype(np.float32)), {Captured.BOTH: raw_NC}


def _with_raw(person: Person, raw: Mapping[Captured, FloatArray], rows_N: Integers) -> Person:
    own = {mask: rows[rows_N] for mask, rows in raw.items()}
    return Person(
        person.name,
        person.fold,
        person.clips,
        person.labels_N,
        person.features_MND,
        dict.fromkeys(HEADS, own),
        person.sentences,
        person.levels,
    )
