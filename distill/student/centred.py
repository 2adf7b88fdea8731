"""PURE: heads on features that are centred per person, and how people differ: what a device needs to learn its user.

A person's voice and face shift the features of all their clips alike. Heads that are fitted after this shift is taken
out need not tell it from a class. Each device then estimates the shift of its own user (edge/own_clips/offset); for
that it needs to know how far such shifts go, measured on public people whom the heads have not seen.

Axes: M modalities (sound, picture), N clips, P people, C classes, D feature width.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from isthmus.proto.person import Centred, CentredHeads, PersonModel

Reals = npt.NDArray[np.floating]
Float64s = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

FEWEST_PEOPLE: Final = 8
"""With fewer people the spread between them cannot be estimated: 5 people gave no gain, 8 gave most of it."""

STRENGTHS: Final = (0.001, 0.01, 0.1)
"""Inverse penalties of the logistic regression on standardised features; held-out people choose one per modality."""

_FOLDS: Final = 5
_ROUNDS: Final = 50
_STILL: Final = 1e-6
_LEAST_SPREAD: Final = 0.05
"""Of the mean spread. A feature that hardly varies (a dead unit) must not be divided by nearly nothing."""


class CannotCentre(ValueError):
    """The public clips do not show how people differ. The message says what is missing."""


@dataclass(frozen=True)
class _Clips:
    """The clips of one modality. ``person_N``: index into the people of the set; ``labels_N``: class index."""

    features_ND: Float64s
    labels_N: Integers
    person_N: Integers

    def only(self, rows: npt.NDArray[np.bool_]) -> "_Clips":
        return _Clips(self.features_ND[rows], self.labels_N[rows], self.person_N[rows])


@dataclass(frozen=True)
class _Head:
    """A head of one modality at temperature 1; ``class_CD``: mean features of each class, without people's shifts."""

    weights_CD: Float64s
    bias_C: Float64s
    centre_D: Float64s
    spread_D: Float64s
    class_CD: Float64s

    def logits(self, features_ND: Float64s) -> Float64s:
        """Return the logits (N, C) of features from which ``centre_D`` or a person's shift has been subtracted."""
        logits_NC: Float64s = (features_ND / self.spread_D) @ self.weights_CD.T + self.bias_C
        return logits_NC


@dataclass(frozen=True)
class _HeldOut:
    """What heads say of people they have not seen: logits without the person's shift, and the shift of each person."""

    logits_NC: Float64s
    shift_PC: Float64s

    def over(self, temperature: float) -> "_HeldOut":
        return _HeldOut(self.logits_NC / temperature, self.shift_PC / temperature)


def fit_centred(
    features_MND: Reals,
    present_NM: Reals,
    labels_N: Integers,
    persons_N: Sequence[str],
    *,
    strengths: Sequence[float] = STRENGTHS,
    fewest: int = FEWEST_PEOPLE,
) -> Centred:
    """Fit heads for person-centred features and measure how people differ.

    ``features_MND`` are a student's features of public clips, ``present_NM`` is 1 if clip n has modality m, a negative
    label or an empty person is unknown and that clip is left out. Per modality, features are the sum of a class mean, a
    person's shift and the rest; the head is multinomial logistic regression on features without the shift, each class
    with equal weight. Folds that leave people out choose the penalty among ``strengths`` and give temperature, fusion
    and the person model, because logits of people that a head was fitted on are too good. Deterministic.

    Raises CannotCentre for fewer than ``fewest`` people, or a class that fewer than two people show; ValueError for
    shapes that do not fit, NaN or infinity.
    """
    _check(features_MND, present_NM, labels_N, persons_N)
    names = sorted({person for person, label in zip(persons_N, labels_N, strict=True) if person and label >= 0})
    if len(names) < fewest:
        raise CannotCentre(f"{len(names)} people with labelled clips; {fewest} are needed to see how people differ")
    index = {name: place for place, name in enumerate(names)}
    person_N = np.array([index.get(person, -1) for person in persons_N], np.int64)
    usable_N = (labels_N >= 0) & (person_N >= 0)
    classes = int(labels_N[usable_N].max()) + 1
    heads: list[_Head] = []
    held_out: list[_HeldOut] = []
    logits_MNC = np.zeros((len(features_MND), len(labels_N), classes))
    for modality, features_ND in enumerate(features_MND):
        rows_N = usable_N & (present_NM[:, modality] > 0)
        clips = _Clips(features_ND.astype(np.float64), labels_N, person_N).only(rows_N)
        _check_people(clips, classes, len(names))
        strength, of_strangers = _chosen(clips, classes, len(names), strengths)
        temperature = _temperature(of_strangers.logits_NC, clips.labels_N, classes)
        head = _fit(clips, classes, strength)
        heads.append(
            _Head(head.weights_CD / temperature, head.bias_C / temperature, head.centre_D, head.spread_D, head.class_CD)
        )
        held_out.append(of_strangers.over(temperature))
        logits_MNC[modality, rows_N] = held_out[-1].logits_NC
    pairs_N = usable_N & (present_NM > 0).all(axis=1)
    return Centred(
        CentredHeads(
            weights_MCD=_stacked(head.weights_CD for head in heads),
            bias_MC=_stacked(head.bias_C for head in heads),
            centre_MD=_stacked(head.centre_D for head in heads),
            spread_MD=_stacked(head.spread_D for head in heads),
        ),
        _person_model(logits_MNC, held_out, usable_N, present_NM, labels_N, pairs_N, classes, len(names)),
    )


def _person_model(
    logits_MNC: Float64s,
    held_out: Sequence[_HeldOut],
    usable_N: npt.NDArray[np.bool_],
    present_NM: Reals,
    labels_N: Integers,
    pairs_N: npt.NDArray[np.bool_],
    classes: int,
    people: int,
) -> PersonModel:
    means, betweens, withins = [], [], []
    for modality, of_strangers in enumerate(held_out):
        rows_N = usable_N & (present_NM[:, modality] > 0)
        logits_NC, own_N = logits_MNC[modality, rows_N], labels_N[rows_N]
        mean_CC = _class_means(logits_NC, own_N, classes)
        rest_NC = logits_NC - mean_CC[own_N]
        weights_N = _balanced(own_N, classes)
        means.append(mean_CC)
        withins.append((rest_NC * weights_N[:, np.newaxis]).T @ rest_NC / weights_N.sum())
        betweens.append(np.cov(of_strangers.shift_PC.T))
    fusion = 1.0
    if pairs_N.any():
        # The factor on the sum is the inverse of a temperature.
        fusion = 1 / _temperature(logits_MNC[:, pairs_N].sum(axis=0), labels_N[pairs_N], classes)
    return PersonModel(_stacked(means), _stacked(betweens), _stacked(withins), fusion, people)


def _chosen(clips: _Clips, classes: int, people: int, strengths: Sequence[float]) -> tuple[float, _HeldOut]:
    """Return the strength with which heads answer strangers best, and these heads' answers."""
    best: tuple[float, float, _HeldOut] | None = None
    for strength in strengths:
        of_strangers = _of_strangers(clips, classes, people, strength)
        temperature = _temperature(of_strangers.logits_NC, clips.labels_N, classes)
        loss = _loss(of_strangers.logits_NC / temperature, clips.labels_N, classes)
        if best is None or loss < best[0]:
            best = loss, strength, of_strangers
    if best is None:
        raise ValueError("no strength to choose from")
    return best[1], best[2]


def _of_strangers(clips: _Clips, classes: int, people: int, strength: float) -> _HeldOut:
    logits_NC = np.zeros((len(clips.labels_N), classes))
    shift_PC = np.zeros((people, classes))
    for out_P in _folds(people):
        rows_N = np.isin(clips.person_N, out_P)
        head = _fit(clips.only(~rows_N), classes, strength)
        for person in out_P:
            own_N = clips.person_N == person
            shift_D = (clips.features_ND[own_N] - head.class_CD[clips.labels_N[own_N]]).mean(axis=0)
            logits_NC[own_N] = head.logits(clips.features_ND[own_N] - shift_D)
            shift_PC[person] = head.logits((shift_D - head.centre_D)[np.newaxis])[0] - head.bias_C
    return _HeldOut(logits_NC, shift_PC)


def _folds(people: int) -> Iterator[Integers]:
    for fold in range(_FOLDS):
        yield np.arange(fold, people, _FOLDS)


def _fit(clips: _Clips, classes: int, strength: float) -> _Head:
    from sklearn.linear_model import LogisticRegression

    shift_PD, class_CD = person_shifts(clips.features_ND, clips.labels_N, clips.person_N, classes)
    centred_ND = clips.features_ND - shift_PD[clips.person_N]
    spread_D = centred_ND.std(axis=0)
    spread_D = np.maximum(spread_D, _LEAST_SPREAD * (spread_D.mean() or 1.0))
    model = LogisticRegression(C=strength, max_iter=500)
    model.fit(centred_ND / spread_D, clips.labels_N, sample_weight=_balanced(clips.labels_N, classes))
    weights_CD, bias_C = np.asarray(model.coef_, np.float64), np.asarray(model.intercept_, np.float64)
    if classes == 2:  # scikit-learn then has one row: the logit of class 1 less that of class 0.
        weights_CD, bias_C = np.stack([-weights_CD[0], weights_CD[0]]) / 2, np.array([-bias_C[0], bias_C[0]]) / 2
    centre_D = shift_PD[np.unique(clips.person_N)].mean(axis=0)
    return _Head(weights_CD, bias_C, centre_D, spread_D, class_CD)


def person_shifts(
    features_ND: Float64s, labels_N: Integers, person_N: Integers, classes: int
) -> tuple[Float64s, Float64s]:
    """Return the shift of each person (P, D) and the mean of each class without it (C, D), which sum to 0 over classes.

    Alternating least squares of x = class mean + shift + rest. If each person has each class equally often, the shift
    is the person's mean. A person who lacks some classes is thus not shifted towards those that they have.
    """
    people = int(person_N.max()) + 1
    person_PN = (person_N == np.arange(people)[:, np.newaxis]).astype(np.float64)
    person_PN /= np.maximum(person_PN.sum(axis=1, keepdims=True), 1)
    class_CN = (labels_N == np.arange(classes)[:, np.newaxis]).astype(np.float64)
    class_CN /= np.maximum(class_CN.sum(axis=1, keepdims=True), 1)
    class_CD = np.zeros((classes, features_ND.shape[1]))
    scale = float(features_ND.std()) or 1.0
    for _ in range(_ROUNDS):
        shift_PD = person_PN @ (features_ND - class_CD[labels_N])
        moved_CD = class_CN @ (features_ND - shift_PD[person_N])
        moved_CD -= moved_CD.mean(axis=0)
        step = float(np.abs(moved_CD - class_CD).max())
        class_CD = moved_CD
        if step < _STILL * scale:
            break
    return shift_PD, class_CD


def _temperature(logits_NC: Float64s, labels_N: Integers, classes: int) -> float:
    """Return the temperature with the least class-balanced cross-entropy, between 0.05 and 20."""
    from scipy.optimize import minimize_scalar

    found = minimize_scalar(
        lambda log_t: _loss(logits_NC / np.exp(log_t), labels_N, classes), bounds=(-3.0, 3.0), method="bounded"
    )
    return float(np.exp(found.x))


def _loss(logits_NC: Float64s, labels_N: Integers, classes: int) -> float:
    shifted_NC = logits_NC - logits_NC.max(axis=1, keepdims=True)
    log_p_NC = shifted_NC - np.log(np.exp(shifted_NC).sum(axis=1, keepdims=True))
    weights_N = _balanced(labels_N, classes)
    return float(-(weights_N * log_p_NC[np.arange(len(labels_N)), labels_N]).mean())


def _balanced(labels_N: Integers, classes: int) -> Float64s:
    """Return each clip's weight N / (C n_c): every class counts alike."""
    counts_C = np.maximum(np.bincount(labels_N, minlength=classes), 1)
    weights_N: Float64s = len(labels_N) / (classes * counts_C[labels_N])
    return weights_N


def _class_means(rows_NC: Float64s, labels_N: Integers, classes: int) -> Float64s:
    return np.stack([rows_NC[labels_N == each].mean(axis=0) for each in range(classes)])


def _stacked(arrays: Sequence[Float64s] | Iterator[Float64s]) -> npt.NDArray[np.float32]:
    return np.stack(list(arrays)).astype(np.float32)


def _check(features_MND: Reals, present_NM: Reals, labels_N: Integers, persons_N: Sequence[str]) -> None:
    if features_MND.ndim != 3 or present_NM.shape != features_MND.shape[1::-1]:
        raise ValueError(f"features of shape {features_MND.shape} and present of shape {present_NM.shape} do not fit")
    if len(labels_N) != features_MND.shape[1] or len(persons_N) != len(labels_N):
        raise ValueError(f"{len(labels_N)} labels and {len(persons_N)} people for {features_MND.shape[1]} clips")
    if not np.isfinite(features_MND[present_NM.T > 0]).all():
        raise ValueError("a clip's features are not finite")


def _check_people(clips: _Clips, classes: int, people: int) -> None:
    """Each fold must have clips of every person that it leaves out and, in the rest, of every class."""
    if len(np.unique(clips.person_N)) < people:
        raise CannotCentre("a person lacks sound or picture in all clips")
    for out_P in _folds(people):
        kept_N = ~np.isin(clips.person_N, out_P)
        if len(np.unique(clips.labels_N[kept_N])) < classes:
            raise CannotCentre("a class is shown by too few people")
