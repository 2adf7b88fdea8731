"""Measure every method on every person, task and seed, and what labels-free signals would have said of the offset."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import numpy as np

from isthmus.edge.own_clips import guard
from isthmus.edge.own_clips.offset import Offset, answer
from isthmus.edge.own_clips.person import ESTIMATE_EVERY_CLIPS
from isthmus.experiments.personal.findings.scores import Scores, agreement, scores
from isthmus.experiments.personal.ladder.methods import (
    ASKED,
    LADDER,
    TEACHERS,
    Constants,
    Known,
    Seen,
    answers_with_base,
    as_it_answers,
    as_the_device,
    base_of,
    chosen,
    own_answers_with_base,
    person_offset,
    plain_mean,
    present,
)
from isthmus.experiments.personal.ladder.person import Integers, Person, Task, tasks
from isthmus.proto.messages import Captured, FloatArray

CHOSEN: Final = "offset, constants chosen on public people"
UNLABELLED: Final = "device, no labels"
RUNNING: Final = "device, no labels, as it runs: answered clips are learned from, too"
PLAIN_MEAN: Final = "device, plain mean in place of the offset"


@dataclass(frozen=True)
class Row:
    """One method on one task of one person. ``paired``: right answers gained less lost, per test clip, by clip
    variance: the standard error of ``gain`` for this person.

    ``signals``: what the device can see without labels of this method, less the same of the base student.
    """

    person: str
    fold: str
    seed: int
    protocol: str
    classes: int
    method: str
    clips: int
    test_clips: int
    scores: Scores
    gain: float
    paired: float
    signals: Mapping[str, float]


def measured(person: Person, known: Known, constants: Constants, seed: int, counts: tuple[int, ...]) -> Iterator[Row]:
    """Yield every method on every task of a person. ``constants``: those that the fold's public people chose."""
    for number, task in enumerate(tasks(person, seed, counts)):
        seen = Seen.of(person, task, known, 1_000 * seed + number)
        labels_T = person.labels_N[task.test_T]
        by_name: dict[str, FloatArray] = {name: method(seen, known) for name, method in LADDER.items()}
        by_name[CHOSEN] = chosen(seen, Known(known.centred, known.trained_C, constants))
        for name, answers_TC in by_name.items():
            yield row_of(person, task, seed, name, answers_TC, by_name[base_of(name)], labels_T)


def device_rows(person: Person, known: Known, seed: int, counts: tuple[int, ...]) -> Iterator[Row]:
    """Yield what the device itself answers on every task of a person: without labels, and after corrections.

    Two of these answers are candidates for a guard, and carry its signals: those of the device without labels, and
    those with the plain mean in place of the offset, which do harm to users of few classes.
    """
    for number, task in enumerate(tasks(person, seed, counts)):
        seen = Seen.of(person, task, known, 1_000 * seed + number)
        labels_T = person.labels_N[task.test_T]
        base_TC = seen.test_raw[TEACHERS][Captured.BOTH]
        by_margin, at_random = (as_the_device(seen, known, by_margin=by_margin) for by_margin in (True, False))
        by_name = {"base": base_TC}
        for how, done in (("asked by margin", by_margin), ("at random", at_random)):
            for count, rows in done.answers.items():
                by_name[f"device, {count} corrections {how}" if count else UNLABELLED] = rows
        candidates = {UNLABELLED: person_offset(seen, known), PLAIN_MEAN: plain_mean(seen, known)}
        by_name[PLAIN_MEAN] = answers_with_base(seen, candidates[PLAIN_MEAN], known)
        for name, answers_TC in by_name.items():
            signals = _signals(seen, known, candidates[name], by_margin.asked) if name in candidates else {}
            yield row_of(person, task, seed, name, answers_TC, base_TC, labels_T, signals)


def running_rows(person: Person, known: Known, seed: int, counts: tuple[int, ...]) -> Iterator[Row]:
    """Yield what a device answers that goes on learning from the clips that it has answered, on every task."""
    for number, task in enumerate(tasks(person, seed, counts)):
        seen = Seen.of(person, task, known, 1_000 * seed + number)
        told_TC = as_it_answers(seen, known, ESTIMATE_EVERY_CLIPS)
        base_TC = seen.test_raw[TEACHERS][Captured.BOTH]
        yield row_of(person, task, seed, RUNNING, told_TC, base_TC, person.labels_N[task.test_T])


def row_of(
    person: Person,
    task: Task,
    seed: int,
    method: str,
    answers_TC: FloatArray,
    base_TC: FloatArray,
    labels_T: Integers,
    signals: Mapping[str, float] = MappingProxyType({}),
) -> Row:
    """Return the row of a method's answers to the test clips, compared with the base student's."""
    right_T = (answers_TC.argmax(axis=1) == labels_T).astype(float)
    change_T = right_T - (base_TC.argmax(axis=1) == labels_T)
    return Row(
        person.name,
        person.fold,
        seed,
        task.protocol,
        task.classes,
        method,
        len(task.own_S),
        len(labels_T),
        scores(answers_TC, base_TC, labels_T),
        float(change_T.mean()),
        float(change_T.std(ddof=1) / np.sqrt(len(change_T))) if len(change_T) > 1 else 0.0,
        dict(signals),
    )


def _signals(seen: Seen, known: Known, found: Offset, asked: Sequence[int]) -> dict[str, float]:
    """Return what speaks for a candidate, after less before: the guard's present estimate, confidence, the agreement of
    sound and picture, and the probability of what the user said of the first corrected clips."""
    clips = seen.own_MSC.shape[1]
    alone = [answer(seen.own_MSC, present(mask, clips), found) for mask in (Captured.SOUND, Captured.PICTURE)]
    before = seen.own_raw[TEACHERS]
    together = own_answers_with_base(seen, found, known)
    old = guard.Outputs(before[Captured.BOTH], before[Captured.BOTH])
    new = guard.Outputs(together, together)
    was, now = guard.estimates(old, new, old), guard.estimates(new, old, old)
    labels = seen.labels_S[list(asked)]
    likelier = together[list(asked), labels] - before[Captured.BOTH][list(asked), labels]
    return {
        "agreement": agreement(*alone) - agreement(before[Captured.SOUND], before[Captured.PICTURE]),
        "present": now[guard.Estimator.PRESENT] - was[guard.Estimator.PRESENT],
        "confidence": now[guard.Estimator.CONFIDENCE] - was[guard.Estimator.CONFIDENCE],
        **{f"{count} corrections": float(likelier[:count].mean()) for count in ASKED if len(asked) >= count},
    }


@dataclass(frozen=True)
class Over:
    """One method over people: each person's seeds and directions are averaged first; people are the units.

    Accuracies and gains are shares. ``worse``: share of people who lose more than two points. ``surely_worse``: who
    lose more than twice the standard error of their own paired clips.
    """

    people: int
    accuracy: float
    deviation: float
    gain: float
    standard_error: float
    worse: float
    surely_worse: float
    recall: float
    calibration: float
    changed: float


TWO_POINTS: Final = 0.02


def over_people(rows: Sequence[Row]) -> Over:
    """Aggregate the rows of one method and task. Raises ValueError without rows."""
    if not rows:
        raise ValueError("no rows to aggregate")
    of: dict[str, list[Row]] = {}
    for row in rows:
        of.setdefault(row.person, []).append(row)
    accuracy_P = np.array([np.mean([row.scores.accuracy for row in own]) for own in of.values()])
    gain_P = np.array([np.mean([row.gain for row in own]) for own in of.values()])
    # Halves of different seeds overlap, so their mean is hardly surer than one of them.
    own_error_P = np.array([np.mean([row.paired for row in own]) for own in of.values()])
    people = len(of)

    def mean(name: str) -> float:
        return float(np.mean([np.mean([getattr(row.scores, name) for row in own]) for own in of.values()]))

    return Over(
        people,
        float(accuracy_P.mean()),
        float(accuracy_P.std(ddof=1)) if people > 1 else 0.0,
        float(gain_P.mean()),
        float(gain_P.std(ddof=1) / np.sqrt(people)) if people > 1 else 0.0,
        float((gain_P < -TWO_POINTS - 1e-9).mean()),
        float((gain_P < -2 * np.maximum(own_error_P, 1e-9)).mean()),
        mean("recall"),
        mean("calibration"),
        mean("changed"),
    )
