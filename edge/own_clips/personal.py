"""PURE: how answers are read for this device's user, from the clips it has seen and what the person said of some.

The reading is a function of the student's person model, the window and the corrections. The same three give the same
reading to the bit, so taking back a correction brings back the reading before it.

Axes: M modalities (sound, picture), N clips, C classes, D feature width, E = M D.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from isthmus.data.class_shares import softmax
from isthmus.edge.own_clips.corrections import MOST_USED, Correction, learned, said
from isthmus.edge.own_clips.offset import Offset, answer, estimate, mixed, scores
from isthmus.edge.own_clips.window import Window
from isthmus.proto.messages import Features, FloatArray
from isthmus.proto.person import Centred

Float64s = npt.NDArray[np.float64]

_WORTH_TELLING: Final = 0.25
"""A shift of a logit that can turn an undecided answer."""

_OFTEN: Final = 1.3
"""So many times the even share is worth a sentence."""


class Reading(Protocol):
    """How a student's answers are read for one user."""

    def local(self, probabilities_C: FloatArray, features: Features) -> FloatArray:
        """Return the answer (C,) to a clip, from that of the student's head on this device and the clip's features."""
        ...

    def cloud(self, probabilities_C: FloatArray, features: Features) -> FloatArray:
        """Return the answer (C,) to a clip, from that of a head in the cloud and the clip's features."""
        ...


@dataclass(frozen=True, eq=False)
class Personal:
    """The reading of one user by student ``student_id``: a ``Reading``.

    ``change_CE`` is what corrections changed in the heads, for features around ``mean_MD``, the mean of this user's
    standardised features; None without corrections. ``corrections`` of them count. ``agreement``: how much the answers
    by sound alone and by picture alone agree on the clips of the window, before and with the offset (the mean of
    sum_c p_sound p_picture); None if no clip has both.
    """

    student_id: str
    centred: Centred
    offset: Offset
    mean_MD: Float64s
    change_CE: Float64s | None = None
    corrections: int = 0
    agreement: tuple[float, float] | None = None

    def local(self, probabilities_C: FloatArray, features: Features) -> FloatArray:
        answer_C: FloatArray = self.answers(*_arrays(features), probabilities_C[np.newaxis])[0]
        return answer_C

    def cloud(self, probabilities_C: FloatArray, features: Features) -> FloatArray:
        return self.local(probabilities_C, features)

    def answers(self, features_MND: FloatArray, present_NM: FloatArray, raw_NC: FloatArray | None = None) -> FloatArray:
        """Return the answers (N, C) to many clips. ``raw_NC`` are those of the ordinary head; None leaves them out."""
        return softmax(self.scores(features_MND, present_NM, raw_NC)).astype(np.float32)

    def scores(self, features_MND: FloatArray, present_NM: FloatArray, raw_NC: FloatArray | None = None) -> Float64s:
        """Return the scores (N, C), of which ``answers`` are the softmax."""
        standard_MND = self.centred.heads.standardised(features_MND)
        scores_NC = scores(self.centred.heads.logits_of(standard_MND), present_NM, self.offset)
        if raw_NC is not None:
            scores_NC = mixed(scores_NC, raw_NC)
        return scores_NC if self.change_CE is None else scores_NC + self._change(standard_MND, present_NM)

    def _change(self, standard_MND: FloatArray, present_NM: FloatArray) -> Float64s:
        assert self.change_CE is not None
        change_NC: Float64s = _rows(standard_MND, present_NM, self.mean_MD) @ self.change_CE.T
        return change_NC


def understand(
    student_id: str,
    centred: Centred,
    window: Window,
    corrections: Sequence[Correction] = (),
    classes: tuple[str, ...] = (),
) -> Personal:
    """Estimate the offset from the window, with corrected clips known, and learn the corrections.

    Only the newest ``MOST_USED`` corrections of clips in the window count. Raises ValueError for a window of another
    student's size.
    """
    shape = centred.heads.weights_MCD.shape
    if (window.features_MND.shape[2], window.raw_NC.shape[1]) != (shape[2], shape[1]):
        raise ValueError("the window of clips belongs to another student")
    usable = [one for one in corrections if one.clip in window.names and one.label in classes][-MOST_USED:]
    known_NC = said(usable, window.names, classes) if usable else None
    standard_MND = centred.heads.standardised(window.features_MND)
    logits_MNC = centred.heads.logits_of(standard_MND)
    offset = estimate(logits_MNC, window.present_NM, window.raw_NC, centred.person, known_NC)
    weights_MN = window.present_NM.T / np.maximum(window.present_NM.T.sum(axis=1, keepdims=True), 1)
    mean_MD = np.einsum("mnd,mn->md", standard_MND, weights_MN, dtype=np.float64)
    reading = Personal(student_id, centred, offset, mean_MD, None, len(usable))
    reading = replace(reading, agreement=_agreement(reading, logits_MNC, window.present_NM))
    if known_NC is None:
        return reading
    rows_K = np.flatnonzero(known_NC.sum(axis=1))
    present_KM = window.present_NM[rows_K]
    scores_KC = reading.scores(window.features_MND[:, rows_K], present_KM, window.raw_NC[rows_K])
    change_CE = learned(scores_KC, _rows(standard_MND[:, rows_K], present_KM, mean_MD), known_NC[rows_K])
    return replace(reading, change_CE=change_CE)


@dataclass(frozen=True)
class PersonFacts:
    """A reading in numbers and words. ``offset``: the shift of the logits in ``classes`` order, by modality.

    ``prior``: how often each class occurs for this user. ``sentences`` say the same to a person.
    """

    student_id: str
    clips: int
    corrections: int
    agreement_before: float | None
    agreement: float | None
    offset: dict[str, tuple[float, ...]]
    prior: tuple[float, ...]
    sentences: tuple[str, ...]


def person_facts(reading: Personal, classes: tuple[str, ...]) -> PersonFacts:
    """Return what a person may know of how their answers are read."""
    before, now = reading.agreement or (None, None)
    offset_MC = reading.offset.offset_MC
    return PersonFacts(
        reading.student_id,
        reading.offset.clips,
        reading.corrections,
        before,
        now,
        {name: tuple(map(float, row_C)) for name, row_C in zip(("sound", "picture"), offset_MC, strict=True)},
        tuple(map(float, reading.offset.prior_C)),
        _sentences(reading, classes),
    )


def _sentences(reading: Personal, classes: tuple[str, ...]) -> tuple[str, ...]:
    offset_MC, prior_C = reading.offset.offset_MC, reading.offset.prior_C
    sentences = [f"Your voice and face were learned from {reading.offset.clips} of your clips, without labels."]
    for what, row_C in zip(
        ("voice sounds", "face looks"), offset_MC - offset_MC.mean(axis=1, keepdims=True), strict=True
    ):
        most = int(np.argmax(np.abs(row_C)))
        if abs(row_C[most]) >= _WORTH_TELLING:
            way = "more" if row_C[most] > 0 else "less"
            sentences.append(
                f"Your {what} {way} like {classes[most]} in every clip than other people's; this is taken out."
            )
    usual = [name for name, share in zip(classes, prior_C, strict=True) if share * len(classes) >= _OFTEN]
    if usual:
        what, are = (usual[0], "is") if len(usual) == 1 else (f"{', '.join(usual[:-1])} and {usual[-1]}", "are")
        sentences.append(f"{what} {are} frequent in your clips, so an undecided answer leans towards what is frequent.")
    if reading.agreement is not None:
        before, now = reading.agreement
        change = "more" if now >= before else "less"
        sentences.append(
            f"Sound and picture agree {change} than before: {before:.0%} of the time then, {now:.0%} now (estimated)."
        )
    if reading.corrections:
        sentences.append(f"{_count(reading.corrections, 'correction')} of yours changed how clips are answered.")
    sentences.append("All of this stays on this device.")
    return tuple(sentences)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _agreement(reading: Personal, logits_MNC: FloatArray, present_NM: FloatArray) -> tuple[float, float] | None:
    both_N = present_NM.all(axis=1)
    if not both_N.any():
        return None
    kept_MNC = logits_MNC[:, both_N]
    found = reading.offset
    even_C = np.full_like(found.prior_C, 1 / len(found.prior_C))
    agreed = []
    for offset in (Offset(np.zeros_like(found.offset_MC), even_C, 0), replace(found, prior_C=even_C)):
        alone = [
            answer(kept_MNC, np.tile(np.eye(2, dtype=np.float32)[modality], (int(both_N.sum()), 1)), offset)
            for modality in range(2)
        ]
        agreed.append(float((alone[0] * alone[1]).sum(axis=1).mean()))
    return agreed[0], agreed[1]


def _arrays(features: Features) -> tuple[FloatArray, FloatArray]:
    """Return features_MND and present_NM of one clip."""
    return np.stack(features.filled())[:, np.newaxis], features.present_2()[np.newaxis]


def _rows(standard_MND: FloatArray, present_NM: FloatArray, mean_MD: Float64s) -> Float64s:
    """Return both modalities' standardised features around the user's mean as one row each, (N, E); absent is 0."""
    around_MND = (standard_MND - mean_MD[:, np.newaxis]) * present_NM.T[:, :, np.newaxis]
    rows_NE: Float64s = around_MND.transpose(1, 0, 2).reshape(len(present_NM), -1)
    return rows_NE
