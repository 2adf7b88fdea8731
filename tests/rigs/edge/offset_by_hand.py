"""The offset of a person by its formulas, clip by clip and class by class, and random people to compute it for."""

import math

import numpy as np
import numpy.typing as npt
from scipy.special import logsumexp
from scipy.stats import multivariate_normal

from isthmus.data.class_shares import class_prior
from isthmus.edge.own_clips.offset import Offset, estimate
from isthmus.edge.own_clips.offset.hypotheses import EVIDENCE_CLIPS, OWN_WAY, TELLING_CLIPS
from isthmus.edge.own_clips.offset.people import FLATTEST, RIDGE
from isthmus.edge.own_clips.offset.turns import STILL
from isthmus.proto.person import PersonModel

Float64s = npt.NDArray[np.float64]


class Person:
    """Random clips of one person, and a random model of people."""

    def __init__(self, seed: int, clips: int, classes: int, *, both: bool = False) -> None:
        rng = np.random.default_rng(seed)
        self.logits_MNC = 2 * rng.standard_normal((2, clips, classes))
        self.present_NM = np.ones((clips, 2))
        if not both:
            missing_N = rng.integers(0, 3, clips)
            self.present_NM[missing_N < 2, missing_N[missing_N < 2]] = 0
        self.raw_NC = rng.dirichlet(np.ones(classes), clips)
        spread = rng.standard_normal((2, 2, classes, classes + 2))
        between_MCC, within_MCC = (part @ part.transpose(0, 2, 1) for part in spread)
        mean_MCC = rng.standard_normal((2, classes, classes)) + 2 * np.eye(classes)
        self.model = PersonModel(
            *(part.astype(np.float32) for part in (mean_MCC, between_MCC, within_MCC)), float(rng.uniform(0.5, 1)), 10
        )

    def estimate(self, **changed: object) -> Offset:
        given_here = {
            "logits_MNC": self.logits_MNC,
            "present_NM": self.present_NM,
            "raw_NC": self.raw_NC,
            "model": self.model,
        }
        return estimate(**{**given_here, **changed})  # type: ignore[arg-type]


def softmax(scores_C: Float64s) -> Float64s:
    powers_C: Float64s = np.exp(scores_C - scores_C.max())
    shares_C: Float64s = powers_C / powers_C.sum()
    return shares_C


def metric_by_hand(mean_CC: Float64s) -> Float64s:
    """Return G^-1: of M without its means of rows and columns, on the differences of logits alone."""
    differences = np.linalg.qr(np.column_stack([np.ones(len(mean_CC)), np.eye(len(mean_CC))[:, 1:]]))[0][:, 1:]
    inner = differences.T @ (mean_CC + mean_CC.T) / 2 @ differences
    values, vectors = np.linalg.eigh(inner)
    if values.max() <= 0:
        return np.zeros_like(mean_CC)
    inverse: Float64s = differences @ vectors @ np.diag(1 / np.maximum(values, FLATTEST * values.max())) @ vectors.T
    return inverse @ differences.T


class Turns:
    """The turns under given class shares by the formulas, clip by clip and class by class; None: they are learned."""

    def __init__(self, person: Person, given: Float64s | None, own_way: float = OWN_WAY) -> None:
        self._person = person
        self._model = person.model
        self._own_way = own_way
        self.classes = person.raw_NC.shape[1]
        self.prior = np.ones(self.classes) if given is None else given
        self._clips = range(len(person.raw_NC))
        self.answers = [row * self.prior / (row * self.prior).sum() for row in person.raw_NC]
        self._metric = [metric_by_hand(np.asarray(mean_CC, np.float64)) for mean_CC in person.model.mean_MCC]
        for _ in range(40):
            if given is None:
                self.prior = class_prior(sum(self.answers, np.zeros(self.classes)))
            self._learn()
            moved = [
                softmax(
                    0.7 * self.scores(person.logits_MNC[:, n], person.present_NM[n])
                    + 0.3 * np.log(np.maximum(person.raw_NC[n], 1e-9))
                )
                for n in self._clips
            ]
            still = max(float(np.abs(a - b).max()) for a, b in zip(moved, self.answers, strict=True)) < STILL
            self.answers = moved
            if still:
                break

    def _learn(self) -> None:
        self.offsets = [np.zeros(self.classes), np.zeros(self.classes)]
        self.ways: list[list[Float64s]] = []
        self.counted, self.spreads = [], []
        for m in (0, 1):
            mean, within = self._model.mean_MCC[m], self._model.within_MCC[m]
            here = [n for n in self._clips if self._person.present_NM[n, m]]
            counts = [sum(float(self.answers[n][c]) for n in here) for c in range(self.classes)]
            spreads = [self._own_way * count + 1 - self._own_way for count in counts]
            distances = [
                sum(
                    (self.answers[n][c] * (self._person.logits_MNC[m, n] - mean[c]) for n in here),
                    np.zeros(self.classes),
                )
                for c in range(self.classes)
            ]
            counted = sum(count / spread for count, spread in zip(counts, spreads, strict=True))
            if here:
                gain = np.linalg.inv(self._model.between_MCC[m] + within / counted) @ self._model.between_MCC[m]
                total = sum((d / e for d, e in zip(distances, spreads, strict=True)), np.zeros(self.classes))
                self.offsets[m] = total / counted @ gain
            self.ways.append(
                [
                    self._own_way * (d - count * self.offsets[m]) / spread
                    for d, count, spread in zip(distances, counts, spreads, strict=True)
                ]
            )
            self.counted.append(counted)
            self.spreads.append(spreads)

    def scores(self, logits_MC: Float64s, present_M: Float64s) -> Float64s:
        found = np.zeros(self.classes)
        for m in (0, 1):
            if present_M[m]:
                shifted = logits_MC[m] - self.offsets[m]
                lost = (
                    self._own_way
                    * (1 - self._own_way)
                    * float(np.trace(self._metric[m] @ self._model.within_MCC[m]))
                    / 2
                )
                for c, way in enumerate(self.ways[m]):
                    around = shifted - self._model.mean_MCC[m, c] - way / 2
                    found[c] += shifted[c] + around @ self._metric[m] @ way - lost / self.spreads[m][c]
        factor = self._model.fusion if present_M.sum() == 2 else 1.0
        return factor * found + np.log(self.classes * self.prior)

    def evidence(self) -> float:
        """Return l_j, with densities of scipy in coordinates of differences, up to a constant of the clips."""
        total, dimensions = 0.0, self.classes - 1
        basis = np.linalg.qr(np.column_stack([np.ones(self.classes), np.eye(self.classes)[:, 1:]]))[0][:, 1:]
        of_clip = [np.log(self.prior) for _ in self._clips]
        for m in (0, 1):
            if not self._person.present_NM[:, m].any():
                continue
            between, within = (
                part + RIDGE * np.trace(part) / dimensions * np.eye(dimensions)
                for part in (basis.T @ each[m] @ basis for each in (self._model.between_MCC, self._model.within_MCC))
            )
            total += multivariate_normal(np.zeros(dimensions), between).logpdf(self.offsets[m] @ basis)
            precise = np.linalg.inv(within)
            total -= np.linalg.slogdet(np.linalg.inv(between) + self.counted[m] * precise)[1] / 2
            for way, spread in zip(self.ways[m], self.spreads[m], strict=True):
                total += multivariate_normal(np.zeros(dimensions), OWN_WAY * within).logpdf(way @ basis)
                total -= np.linalg.slogdet(precise * spread / (OWN_WAY * (1 - OWN_WAY)))[1] / 2
            noise = multivariate_normal(np.zeros(dimensions), (1 - OWN_WAY) * within)
            for n in self._clips:
                if self._person.present_NM[n, m]:
                    factor = self._model.fusion if self._person.present_NM[n].all() else 1.0
                    for c in range(self.classes):
                        centre = self._model.mean_MCC[m, c] + self.offsets[m] + self.ways[m][c]
                        away = (self._person.logits_MNC[m, n] - centre) @ basis
                        of_clip[n] = of_clip[n] + factor * noise.logpdf(away) * np.eye(self.classes)[c]
        return total + sum(float(logsumexp(row)) for row in of_clip)


def by_hand(person: Person) -> Turns:
    """Return the turns under the shares that the evidence of the hypotheses gives; few clips: that the turns learn."""
    classes = person.raw_NC.shape[1]
    if len(person.raw_NC) < EVIDENCE_CLIPS:
        return Turns(person, None, own_way=0.0)
    sums = sum(Turns(person, np.full(classes, 1 / classes)).answers, np.zeros(classes))
    ranked = sorted(range(classes), key=lambda c: -sums[c])
    priors, logs, clips = [], [], len(person.raw_NC)
    for size in range(1, classes + 1):
        prior = np.full(classes, 0.1 / classes)
        prior[ranked[:size]] += 0.9 / size
        priors.append(prior)
        logs.append(
            Turns(person, prior).evidence() * TELLING_CLIPS / (TELLING_CLIPS + clips)
            - math.log(math.comb(classes, size))
        )
    weights = softmax(np.array(logs))
    return Turns(person, sum((w * prior for w, prior in zip(weights, priors, strict=True)), np.zeros(classes)))
