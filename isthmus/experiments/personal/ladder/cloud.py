"""Selection in the cloud on the base student's features: heads that learn more from picked clips or people.

A student that shares the teacher's encoders has nothing to distil, so what the cloud can do for a person is to train
heads on the public clips that resemble them. Every pick counts four times beside the other public clips, and every
method picks equally many. Each is measured with ordinary heads, and with centred heads after the person's offset.

Axes: M modalities, N public clips, S own clips, T test clips, D feature width, C classes.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Final

import numpy as np
import numpy.typing as npt

from isthmus.distill.selection import STRATEGIES, Public, Wanted
from isthmus.distill.student.centred import person_shifts
from isthmus.edge.own_clips.prototypes import make_prototypes
from isthmus.experiments.personal.ladder.bases import Base
from isthmus.experiments.personal.ladder.measure import Row, row_of
from isthmus.experiments.personal.ladder.methods import TEACHERS, Known, Seen, answers, person_offset
from isthmus.experiments.personal.ladder.person import HALVES, Integers, Person, tasks
from isthmus.proto.messages import Captured, FloatArray
from isthmus.proto.person import Centred, CentredHeads

Float64s = npt.NDArray[np.float64]

PICKS: Final = ("all", "random", "cluster", "people")
"""all: no picks. cluster: the paper's cosine to prototypes. people: those whose shift is nearest to the person's
offset, which a device would have to send."""

TIMES: Final = 4.0
_PER_PROTOTYPE: Final = 10
_STRENGTH: Final = 0.01


def of_person(base: Base, person: Person, known: Known, seed: int, counts: tuple[int, ...]) -> Iterator[Row]:
    """Yield every pick on halves of a person's clips, before and after the offset."""
    for task in tasks(person, seed, counts):
        if task.protocol != HALVES or len(task.own_S) < 3:
            continue
        seen = Seen.of(person, task, known, seed)
        labels_T = person.labels_N[task.test_T]
        base_TC = seen.test_raw[TEACHERS][Captured.BOTH]
        offset_TC = answers(seen, person_offset(seen, known))
        yield row_of(person, task, seed, "base", base_TC, base_TC, labels_T)
        yield row_of(person, task, seed, "offset", offset_TC, base_TC, labels_T)
        for name, weights_N in _weights(base, seen, known, seed).items():
            ordinary = _heads(base, known, weights_N, centred=False)
            plain_TC = _sum(ordinary, person.features_MND[:, task.test_T], known)
            yield row_of(person, task, seed, f"{name}, ordinary heads", plain_TC, base_TC, labels_T)
            own = Known(Centred(_heads(base, known, weights_N, centred=True), known.centred.person), known.trained_C)
            with_own = Seen.of(person, task, own, seed)
            after_TC = answers(with_own, person_offset(with_own, own))
            yield row_of(person, task, seed, f"{name}, centred heads and offset", after_TC, base_TC, labels_T)


def _weights(base: Base, seen: Seen, known: Known, seed: int) -> dict[str, Float64s]:
    """Return the weight of each public clip (N,) under each pick."""
    public_N = base.public_N
    public_NC = base.raw[TEACHERS][Captured.BOTH][public_N]
    labels_N = np.asarray(base.clips.labels_N)[public_N]
    prototypes = make_prototypes(seen.own_raw[TEACHERS][Captured.BOTH], seed=seed)
    wanted, public = Wanted(prototypes.values_KC, prototypes.sizes_K), Public(public_NC, labels_N)
    cluster = STRATEGIES["cosine"](wanted, public, _PER_PROTOTYPE, np.random.default_rng(seed)).indices_S
    cluster = np.unique(cluster)
    rng = np.random.default_rng((seed, len(cluster)))
    picks = {
        "all": np.zeros(0, np.int64),
        "random": rng.choice(len(public_N), len(cluster), replace=False),
        "cluster": cluster,
        "people": _clips_of_people_like(base, seen, known, len(cluster)),
    }
    return {
        name: 1 + (TIMES - 1) * np.isin(np.arange(len(public_N)), rows).astype(np.float64)
        for name, rows in picks.items()
    }


def _clips_of_people_like(base: Base, seen: Seen, known: Known, count: int) -> Integers:
    """Return public clips of the people whose mean logits, class by class, are shifted most like this person's."""
    public_N = base.public_N
    labels_N = np.asarray(base.clips.labels_N)[public_N]
    actors = np.array([base.clips.actors[row] for row in public_N])
    logits_MNC = known.centred.heads.logits(base.features_MND[:, public_N])
    rest_MNC = logits_MNC - known.centred.person.mean_MCC[:, labels_N]
    own_MC = person_offset(seen, known).offset_MC
    distance = {each: float(np.square(rest_MNC[:, actors == each].mean(axis=1) - own_MC).sum()) for each in set(actors)}
    ordered = sorted(distance, key=lambda each: (distance[each], each))
    rows = np.concatenate([np.flatnonzero(actors == each) for each in ordered])
    return rows[:count]


def _heads(base: Base, known: Known, weights_N: Float64s, *, centred: bool) -> CentredHeads:
    """Fit heads on all public clips with these weights; ordinary ones see the people's shifts, centred ones do not.

    Spread, centre and temperature are those of the heads that are shipped, so only the weights differ.
    """
    from sklearn.linear_model import LogisticRegression

    shipped, public_N = known.centred.heads, base.public_N
    labels_N = np.asarray(base.clips.labels_N)[public_N]
    classes = shipped.bias_MC.shape[1]
    person_N = np.unique([base.clips.actors[row] for row in public_N], return_inverse=True)[1]
    balance_N = weights_N / np.bincount(labels_N, weights=weights_N, minlength=classes)[labels_N]
    balance_N *= len(labels_N) / balance_N.sum()
    weights_MCD, bias_MC = [], []
    for modality, features_ND in enumerate(base.features_MND[:, public_N].astype(np.float64)):
        away_ND = features_ND - shipped.centre_MD[modality]
        if centred:
            shift_PD, _ = person_shifts(features_ND, labels_N, person_N, classes)
            away_ND = features_ND - shift_PD[person_N]
        model = LogisticRegression(C=_STRENGTH, max_iter=200, tol=1e-3)
        model.fit(away_ND / shipped.spread_MD[modality], labels_N, sample_weight=balance_N)
        # The temperature of the shipped heads: their length over that of the same fit without one.
        scale = np.linalg.norm(shipped.weights_MCD[modality]) / np.linalg.norm(model.coef_)
        weights_MCD.append(model.coef_ * scale)
        bias_MC.append(model.intercept_ * scale)
    return replace(
        shipped, weights_MCD=np.stack(weights_MCD).astype(np.float32), bias_MC=np.stack(bias_MC).astype(np.float32)
    )


def _sum(heads: CentredHeads, features_MND: FloatArray, known: Known) -> FloatArray:
    scores_NC = known.centred.person.fusion * heads.logits(features_MND).sum(axis=0)
    powers_NC = np.exp(scores_NC - scores_NC.max(axis=1, keepdims=True))
    return np.asarray(powers_NC / powers_NC.sum(axis=1, keepdims=True), np.float32)
