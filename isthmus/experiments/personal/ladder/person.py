"""PURE: one person's clips as a student sees them, and the ways to split them into clips to learn from and to test on.

Axes: M modalities (sound, picture), N clips, D feature width, C classes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from isthmus.proto.messages import Captured, FloatArray

Integers = npt.NDArray[np.int64]

HEADS: Final = ("teacher's head", "own head")
"""The heads that answer with a student's features: the teacher's (Eq. 5.1 and 5.6) and the student's own (Eq. 5.9)."""


@dataclass(frozen=True, eq=False)
class Person:
    """One person's clips: at most one per recording, each with sound and picture.

    ``raw``: head -> what is captured -> the head's probabilities (N, C). ``sentences`` and ``levels`` name what is said
    and how intense it is; empty text if unknown. ``fold`` names the release that was trained without this person.
    """

    name: str
    fold: str
    clips: tuple[str, ...]
    labels_N: Integers
    features_MND: FloatArray
    raw: Mapping[str, Mapping[Captured, FloatArray]]
    sentences: tuple[str, ...]
    levels: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Task:
    """Clips to learn from (``own_S``, without labels unless a method says so) and clips to test on (``test_T``).

    ``protocol`` names the kind of split. ``classes`` is the number of classes that the person uses; 0: all.
    """

    protocol: str
    classes: int
    own_S: Integers
    test_T: Integers


LEAST_CLIPS: Final = 4
"""Clips of a class that a user of few classes needs: two for each half."""

HALVES: Final = "halves"
SENTENCE: Final = "other sentence"
LEVEL: Final = "other intensity"


def tasks(person: Person, seed: int, class_counts: tuple[int, ...]) -> tuple[Task, ...]:
    """Return every split of a person's clips for one seed.

    Halves are drawn per class. With fewer classes both halves are cut to classes drawn with the seed, of those with
    four clips or more; a person who has too few of them has no such task. The stricter
    splits learn from one sentence or intensity and test on the other, in both directions; they are left out if the
    names do not give two of them with every class in both.
    """
    rng = np.random.default_rng((seed, *person.name.encode()))
    own: list[int] = []
    for label in np.unique(person.labels_N):
        rows = rng.permutation(np.flatnonzero(person.labels_N == label))
        own += rows[: len(rows) // 2].tolist()
    own_S = np.sort(np.array(own, np.int64))
    test_T = np.setdiff1d(np.arange(len(person.labels_N)), own_S)
    present = np.unique(person.labels_N)
    drawable = [label for label in present if (person.labels_N == label).sum() >= LEAST_CLIPS]
    found = []
    for count in class_counts:
        if count > len(drawable):
            continue
        kept = present if count == 0 else rng.permutation(drawable)[:count]
        found.append(
            Task(
                HALVES,
                count,
                own_S[np.isin(person.labels_N[own_S], kept)],
                test_T[np.isin(person.labels_N[test_T], kept)],
            )
        )
    for protocol, marks in ((SENTENCE, person.sentences), (LEVEL, person.levels)):
        found += [Task(protocol, 0, one, other) for one, other in _two_ways(person.labels_N, marks)]
    return tuple(found)


def _two_ways(labels_N: Integers, marks: tuple[str, ...]) -> list[tuple[Integers, Integers]]:
    names = sorted(set(marks))
    if len(names) != 2 or "" in names:
        return []
    one, other = (np.flatnonzero(np.array(marks) == name) for name in names)
    if set(labels_N[one].tolist()) != set(labels_N[other].tolist()):
        return []
    return [(one, other), (other, one)]
