"""PURE: the ladder of methods. Each learns from a person's own clips and answers their test clips.

A method of the device sees no label of these clips. A *correction* is a label that the user gave for one of them. A
*bound* sees labels that nobody gives; it shows how far a method could go.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np

from isthmus.data.class_shares import softmax
from isthmus.edge.own_clips import habits
from isthmus.edge.own_clips.corrections import Correction, least_certain
from isthmus.edge.own_clips.offset import BASE_SHARE, Offset, answer, corrected, estimate, mixed, scores
from isthmus.edge.own_clips.personal import understand
from isthmus.edge.own_clips.window import MOST_CLIPS, Window
from isthmus.experiments.personal.ladder.person import HEADS, Integers, Person, Task
from isthmus.proto.messages import Captured, FloatArray
from isthmus.proto.person import Centred, PersonModel

TEACHERS, OWN = HEADS
ASKED: Final = (4, 8, 12)
"""Numbers of corrections."""

_NO_STUDENT: Final = ""

_ROWS: Final = {Captured.BOTH: (1.0, 1.0), Captured.SOUND: (1.0, 0.0), Captured.PICTURE: (0.0, 1.0)}


@dataclass(frozen=True)
class Constants:
    """Constants of the offset that public people may choose.

    ``clips_per_clip``: clips that count as one. ``prior_power``: power of the class prior in an answer. ``base_share``:
    share of the base student's answer, in the estimate and in an answer. The defaults are the device's.
    """

    clips_per_clip: float = 1.0
    prior_power: float = 1.0
    base_share: float = BASE_SHARE


@dataclass(frozen=True, eq=False)
class Known:
    """What a method may use besides the clips: the centred heads and person model, the class shares that the ordinary
    heads were trained on, and the constants."""

    centred: Centred
    trained_C: FloatArray
    constants: Constants = field(default_factory=Constants)


@dataclass(frozen=True, eq=False)
class Seen:
    """One task as a method sees it: logits of the centred heads, answers of the ordinary ones, and features,
    standardised and as they are, of the own clips (S) and the test clips (T).

    ``labels_S`` are for corrections and bounds alone.
    """

    own_MSC: FloatArray
    test_MTC: FloatArray
    own_raw: Mapping[str, Mapping[Captured, FloatArray]]
    test_raw: Mapping[str, Mapping[Captured, FloatArray]]
    own_MSD: FloatArray
    test_MTD: FloatArray
    own_raw_MSD: FloatArray
    test_raw_MTD: FloatArray
    labels_S: Integers
    rng: np.random.Generator

    @staticmethod
    def of(person: Person, task: Task, known: Known, seed: int) -> "Seen":
        """Cut a person's clips into what a method sees of one task."""
        features_MND = known.centred.heads.standardised(person.features_MND)
        logits_MNC = known.centred.heads.logits(person.features_MND)

        def cut(rows: Integers) -> dict[str, dict[Captured, FloatArray]]:
            return {head: {mask: raw[rows] for mask, raw in of.items()} for head, of in person.raw.items()}

        return Seen(
            logits_MNC[:, task.own_S],
            logits_MNC[:, task.test_T],
            cut(task.own_S),
            cut(task.test_T),
            features_MND[:, task.own_S],
            features_MND[:, task.test_T],
            person.features_MND[:, task.own_S],
            person.features_MND[:, task.test_T],
            person.labels_N[task.own_S],
            np.random.default_rng((seed, task.classes, len(task.own_S))),
        )


def present(captured: Captured, clips: int) -> FloatArray:
    """Return present_NM of clips that all have exactly these modalities."""
    return np.tile(np.array(_ROWS[captured], np.float32), (clips, 1))


def person_offset(
    seen: Seen,
    known: Known,
    *,
    learnt_from: Captured = Captured.BOTH,
    known_SC: FloatArray | None = None,
    start: str = TEACHERS,
) -> Offset:
    """Estimate the offset from the own clips as the device does, with the constants of ``known``."""
    model = _scaled(known.centred.person, known.constants.clips_per_clip)
    clips = seen.own_MSC.shape[1]
    raw_SC = (
        np.full((clips, seen.own_MSC.shape[2]), 1 / seen.own_MSC.shape[2])
        if start == "flat"
        else seen.own_raw[start][learnt_from]
    )
    return estimate(
        seen.own_MSC, present(learnt_from, clips), raw_SC, model, known_SC, base_share=known.constants.base_share
    )


def answers(seen: Seen, found: Offset, captured: Captured = Captured.BOTH) -> FloatArray:
    """Return the probabilities (T, C) of the test clips, as if only ``captured`` were there."""
    return answer(seen.test_MTC, present(captured, seen.test_MTC.shape[1]), found)


def nothing(known: Known) -> Offset:
    """Return an offset of zero and a uniform prior: the centred heads answer for the average person."""
    modalities, classes = known.centred.person.mean_MCC.shape[:2]
    return Offset(np.zeros((modalities, classes)), np.full(classes, 1 / classes), 0, known.centred.person.fusion)


def _base(head: str, captured: Captured) -> Callable[[Seen, Known], FloatArray]:
    return lambda seen, _: seen.test_raw[head][captured]


def _habits(head: str) -> Callable[[Seen, Known], FloatArray]:
    def method(seen: Seen, known: Known) -> FloatArray:
        learnt = habits.learn("", seen.own_raw[head][Captured.BOTH], tuple(known.trained_C.tolist()))
        return learnt.answers(seen.test_raw[head][Captured.BOTH])

    return method


def _offset(
    captured: Captured, learnt_from: Captured = Captured.BOTH, start: str = TEACHERS
) -> Callable[..., FloatArray]:
    return lambda seen, known: answers(seen, person_offset(seen, known, learnt_from=learnt_from, start=start), captured)


def _no_offset(seen: Seen, known: Known) -> FloatArray:
    return answers(seen, nothing(known))


def plain_mean(seen: Seen, known: Known) -> Offset:
    """Return the mean of the logits as the offset, as if the person used every class equally often."""
    expected_MC = known.centred.person.mean_MCC.mean(axis=1)
    return replace(nothing(known), offset_MC=seen.own_MSC.mean(axis=1) - expected_MC)


def _plain_mean(seen: Seen, known: Known) -> FloatArray:
    return answers(seen, plain_mean(seen, known))


def _corrected(head: str) -> Callable[[Seen, Known], FloatArray]:
    def method(seen: Seen, known: Known) -> FloatArray:
        found = person_offset(seen, known)
        raw_TC = seen.test_raw[head][Captured.BOTH]
        return corrected(raw_TC, present(Captured.BOTH, len(raw_TC)), found)

    return method


def _true_labels(seen: Seen, known: Known) -> FloatArray:
    classes = seen.own_MSC.shape[2]
    return answers(seen, person_offset(seen, known, known_SC=np.eye(classes, dtype=np.float32)[seen.labels_S]))


def _offset_then_lame(seen: Seen, known: Known) -> FloatArray:
    return lame(answers(seen, person_offset(seen, known)), np.concatenate(seen.test_MTD, axis=1))


def _lame(seen: Seen, known: Known) -> FloatArray:
    return lame(seen.test_raw[TEACHERS][Captured.BOTH], np.concatenate(seen.test_MTD, axis=1))


def lame(answers_NC: FloatArray, features_ND: FloatArray, neighbours: int = 5, turns: int = 100) -> FloatArray:
    """Return answers that agree with those of similar clips: LAME (Boudiaf et al., CVPR 2022, Eq. 5).

    The affinity of two clips is 1 if one of them is among the ``neighbours`` nearest of the other by cosine.
    """
    unit_ND = features_ND / np.maximum(np.linalg.norm(features_ND, axis=1, keepdims=True), 1e-12)
    alike_NN = unit_ND @ unit_ND.T
    np.fill_diagonal(alike_NN, -np.inf)
    count = len(answers_NC)
    near_NK = np.argsort(-alike_NN, axis=1)[:, : min(neighbours, count - 1)]
    kernel_NN = np.zeros((count, count))
    np.put_along_axis(kernel_NN, near_NK, 1.0, axis=1)
    kernel_NN = (kernel_NN + kernel_NN.T) / 2
    log_NC = np.log(np.maximum(answers_NC.astype(np.float64), 1e-10))
    found_NC = answers_NC.astype(np.float64)
    for _ in range(turns):
        scores_NC = log_NC + kernel_NN @ found_NC
        moved_NC = np.exp(scores_NC - scores_NC.max(axis=1, keepdims=True))
        moved_NC /= moved_NC.sum(axis=1, keepdims=True)
        still = np.abs(moved_NC - found_NC).max() < 1e-6
        found_NC = moved_NC
        if still:
            break
    return found_NC.astype(np.float32)


def _scaled(model: PersonModel, clips_per_clip: float) -> PersonModel:
    """S / (n / k) is (k S) / n."""
    return model if clips_per_clip == 1.0 else replace(model, within_MCC=model.within_MCC * np.float32(clips_per_clip))


def chosen(seen: Seen, known: Known) -> FloatArray:
    """Answer as the device does, but with the constants of ``known``."""
    found = person_offset(seen, known)
    prior_C = found.prior_C**known.constants.prior_power
    return answers_with_base(seen, replace(found, prior_C=prior_C / prior_C.sum()), known)


def answers_with_base(seen: Seen, found: Offset, known: Known) -> FloatArray:
    """Return the probabilities (T, C) of the test clips: without the offset, with the base student's share."""
    return _with_base(seen.test_MTC, seen.test_raw[TEACHERS][Captured.BOTH], found, known)


def own_answers_with_base(seen: Seen, found: Offset, known: Known) -> FloatArray:
    """Return the same for the own clips (S, C)."""
    return _with_base(seen.own_MSC, seen.own_raw[TEACHERS][Captured.BOTH], found, known)


def _with_base(logits_MNC: FloatArray, base_NC: FloatArray, found: Offset, known: Known) -> FloatArray:
    scores_NC = scores(logits_MNC, present(Captured.BOTH, len(base_NC)), found)
    return softmax(mixed(scores_NC, base_NC, known.constants.base_share)).astype(np.float32)


@dataclass(frozen=True, eq=False)
class OnDevice:
    """What a device does: ``answers`` to the test clips by number of corrections, and the rows of the own clips that
    it asked about, in order."""

    answers: Mapping[int, FloatArray]
    asked: tuple[int, ...]


def as_the_device(seen: Seen, known: Known, *, by_margin: bool) -> OnDevice:
    """Return the answers that the device itself would give to the test clips, without corrections (0) and after 4, 8
    and 12.

    The clip to ask about is the least certain one in each turn, or the next of a random order. With fewer than 12 own
    clips nothing is asked.
    """
    clips, asked_most = seen.own_MSC.shape[1], max(ASKED)
    names = tuple(map(str, range(clips)))
    classes = tuple(map(str, range(seen.own_MSC.shape[2])))
    both_S, both_T = present(Captured.BOTH, clips), present(Captured.BOTH, seen.test_raw_MTD.shape[1])
    own_SC, test_TC = (raw[TEACHERS][Captured.BOTH] for raw in (seen.own_raw, seen.test_raw))
    window = Window(names, seen.own_raw_MSD, both_S, own_SC)
    order = seen.rng.permutation(clips)
    said: list[Correction] = []
    reading = understand(_NO_STUDENT, known.centred, window)
    found = {0: reading.answers(seen.test_raw_MTD, both_T, test_TC)}
    for turn in range(asked_most if clips >= asked_most else 0):
        open_S = np.ones(clips, bool)
        open_S[[int(one.clip) for one in said]] = False
        told_SC = reading.answers(seen.own_raw_MSD, both_S, own_SC)
        asked = least_certain(told_SC, open_S) if by_margin else int(order[turn])
        assert asked is not None
        said.append(Correction(names[asked], str(seen.labels_S[asked]), float(turn), _NO_STUDENT))
        if by_margin or len(said) in ASKED:
            reading = understand(_NO_STUDENT, known.centred, window, said, classes)
        if len(said) in ASKED:
            found[len(said)] = reading.answers(seen.test_raw_MTD, both_T, test_TC)
    return OnDevice(found, tuple(int(one.clip) for one in said))


def as_it_answers(seen: Seen, known: Known, every: int) -> FloatArray:
    """Return the answers (T, C) of a device that runs: what it answered joins its window, and the estimate follows
    after ``every`` clips. The test clips come in random order, each is answered before it joins, and no label is seen.
    """
    clips, classes = seen.own_raw[TEACHERS][Captured.BOTH].shape
    raw_NC = np.concatenate([raw[TEACHERS][Captured.BOTH] for raw in (seen.own_raw, seen.test_raw)])
    features_MND = np.concatenate([seen.own_raw_MSD, seen.test_raw_MTD], axis=1)
    order_T = clips + seen.rng.permutation(len(raw_NC) - clips)
    told_NC = np.zeros((len(raw_NC), classes), np.float32)
    for first in range(0, len(order_T), every):
        rows_N = np.concatenate([np.arange(clips), order_T[:first]])[-MOST_CLIPS:]
        window = Window(
            tuple(map(str, rows_N)), features_MND[:, rows_N], present(Captured.BOTH, len(rows_N)), raw_NC[rows_N]
        )
        next_N = order_T[first : first + every]
        both_N = present(Captured.BOTH, len(next_N))
        reading = understand(_NO_STUDENT, known.centred, window)
        told_NC[next_N] = reading.answers(features_MND[:, next_N], both_N, raw_NC[next_N])
    return told_NC[clips:]


LADDER: Final[Mapping[str, Callable[[Seen, Known], FloatArray]]] = {
    "base": _base(TEACHERS, Captured.BOTH),
    "base, own head": _base(OWN, Captured.BOTH),
    "habits": _habits(TEACHERS),
    "habits, own head": _habits(OWN),
    "LAME": _lame,
    "centred heads alone": _no_offset,
    "plain mean": _plain_mean,
    "offset": _offset(Captured.BOTH),
    "offset, started by own head": _offset(Captured.BOTH, start=OWN),
    "offset, flat start": _offset(Captured.BOTH, start="flat"),
    "offset on the head's answer": _corrected(TEACHERS),
    "offset on the own head's answer": _corrected(OWN),
    "offset, then LAME": _offset_then_lame,
    "offset by true labels (bound)": _true_labels,
    "sound: base": _base(TEACHERS, Captured.SOUND),
    "sound: offset": _offset(Captured.SOUND),
    "sound: offset, learnt from sound": _offset(Captured.SOUND, Captured.SOUND),
    "picture: base": _base(TEACHERS, Captured.PICTURE),
    "picture: offset": _offset(Captured.PICTURE),
    "picture: offset, learnt from pictures": _offset(Captured.PICTURE, Captured.PICTURE),
}
"""Name -> method. A name that starts with a modality answers clips that have only this one."""

BASE_OF: Final = {"sound": "sound: base", "picture": "picture: base"}


def base_of(method: str) -> str:
    """Return the method with which another is compared: the base student on the same modalities."""
    return BASE_OF.get(method.split(":")[0], "base")
