"""PURE: predicts how long answers will be, and learns from those that end.

Per class of request: least squares of the logarithm of the length on the logarithm of the prompt's length, and the
spread of what is left, by which any quantile is read. A request that has passed its prediction is planned as a little
longer than it is.
"""

import math
from bisect import bisect_right
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from heapq import nsmallest
from statistics import NormalDist
from typing import Final, Protocol

import numpy as np
from scipy.special import log_ndtr, ndtr, ndtri

from isthmus.cloud.generation.policies.queue import Floats, Waiting
from isthmus.cloud.generation.scheduling.policy import Life

QUANTILE: Final = 0.9
FORGET: Final = 0.995
"""Weight that an earlier answer of the same class keeps when a new one is learned."""
_NORMAL: Final = NormalDist()
MOST_KINDS: Final = 1_024
"""Classes of requests that are learned apart, since clients choose their names. The answers of others are one class."""
_UNSEEN: Final = 64
"""The length that is planned with before anything was learned."""
_UNSEEN_SPREAD: Final = 1.0
"""The standard deviation of the length's logarithm that is planned with before anything was learned."""
_LEAST_SPREAD: Final = 0.05
"""Answers are never taken to be more alike than this, however alike the first ones were."""
_PRIOR: Final = 4.0
"""Answers of all classes that a class with few answers of its own is mixed with."""


class LengthPredictor(Protocol):
    """Predicts the number of tokens of an answer; at least one more than it has."""

    def look(self, pressure: float) -> None:
        """Called before each decision. ``pressure``: from 0 (nobody waits) to 1 (as many wait as can run)."""

    def predict(self, life: Life) -> float: ...

    def predict_all(self, waiting: Waiting) -> Floats:
        """Returns what ``predict`` returns for each request that waits, (N,)."""

    def within(self, rows: Waiting, tokens_N: Floats) -> Floats:
        """Returns how likely each answer has at most so many tokens in all, given those that it has, (N,)."""

    def learn(self, life: Life) -> None: ...


@dataclass
class _Fit:
    """Weighted sums of least squares of y on x, and the mean squared error of its predictions."""

    weight: float = 0.0
    x: float = 0.0
    y: float = 0.0
    xx: float = 0.0
    xy: float = 0.0
    squared_error: float = 0.0
    seen: int = 0
    line: tuple[float, float] = (0.0, 0.0)
    """Intercept and slope of the prediction."""
    spread: float = 0.0

    def add(self, x: float, y: float) -> None:
        error = y - self.mean(x) if self.seen >= 2 else 0.0
        self.squared_error = FORGET * self.squared_error + error * error
        self.weight = FORGET * self.weight + 1
        self.x = FORGET * self.x + x
        self.y = FORGET * self.y + y
        self.xx = FORGET * self.xx + x * x
        self.xy = FORGET * self.xy + x * y
        self.seen += 1
        mean_x, mean_y = self.x / self.weight, self.y / self.weight
        # One answer's worth of ridge: without spread in x the slope is 0.
        slope = (self.xy / self.weight - mean_x * mean_y) / (self.xx / self.weight - mean_x**2 + 1 / self.weight)
        self.line = (mean_y - slope * mean_x, slope)
        self.spread = math.sqrt(self.squared_error / self.weight)

    def mean(self, x: float) -> float:
        intercept, slope = self.line
        return intercept + slope * x


class LearnedLengths:
    """Plans with a ``quantile`` of what is known about a class, from the first answer on.

    With ``idle_quantile`` the quantile follows the load: that one if nobody waits, ``quantile`` if as many wait as can
    run. A short queue has room for answers that turn out longer; a long one has not. With ``conditional`` it is the
    quantile of those answers that are longer than what there is already, so a prediction grows as tokens come.

    ``most_over``: the largest factor by which a plan exceeds the median. Where a prompt says nothing of its answer, a
    high quantile is the same long answer for everybody; planned so, hardly anybody is admitted.
    """

    def __init__(
        self,
        quantile: float = QUANTILE,
        *,
        idle_quantile: float | None = None,
        conditional: bool = False,
        most_over: float = math.inf,
    ) -> None:
        for each in (quantile, idle_quantile or quantile):
            if not 0 < each < 1:
                raise ValueError(f"quantile {each:g}: must be between 0 and 1")
        self._idle_z = _NORMAL.inv_cdf(idle_quantile or quantile)
        self._busy_z = _NORMAL.inv_cdf(quantile)
        self._z = self._busy_z
        self._conditional = conditional
        self._most_over = math.log(most_over)
        self._fits: dict[str, _Fit] = {}
        self._all = _Fit()

    def look(self, pressure: float) -> None:
        self._z = self._idle_z + min(1.0, pressure) * (self._busy_z - self._idle_z)

    def _fit(self, kind: str) -> _Fit:
        fit = self._fits.get(kind)
        return self._all if fit is None or fit.seen < _PRIOR else fit

    def predict_all(self, waiting: Waiting) -> Floats:
        fits = [self._fit(kind) for kind in waiting.kinds]
        seen_K = np.array([fit.seen >= 2 for fit in fits], dtype=bool)
        lines_K2 = np.array([fit.line for fit in fits]).reshape(-1, 2)
        at_N = waiting.kind_N
        spread_N = np.array([fit.spread for fit in fits])[at_N]
        means_N = lines_K2[at_N, 0] + lines_K2[at_N, 1] * waiting.log_prompt_N
        z_N: Floats | float = self._z
        if self._conditional and waiting.tokens_N.any():
            log_tokens_N = np.log(np.maximum(1.0, waiting.tokens_N))
            passed_N = ndtr((log_tokens_N - means_N) / np.maximum(spread_N, 1e-6))
            grown_N = ndtri(np.minimum(1 - 1e-6, passed_N + _NORMAL.cdf(self._z) * (1 - passed_N)))
            z_N = np.where((waiting.tokens_N > 0) & (spread_N >= 1e-6), grown_N, self._z)
        found_N = np.exp(np.minimum(20.0, means_N + np.minimum(self._most_over, z_N * spread_N)))
        found_N = np.minimum(waiting.most_N, np.maximum(found_N, 1.25 * waiting.tokens_N + 1))
        unseen_N = np.maximum(waiting.tokens_N + 1, np.minimum(waiting.most_N, _UNSEEN))
        return np.where(seen_K[at_N], found_N, unseen_N)

    def predict(self, life: Life) -> float:
        fit = self._fit(life.request.kind)
        if fit.seen < 2:
            return float(max(len(life.tokens) + 1, min(life.request.max_tokens, _UNSEEN)))
        x = math.log(len(life.request.prompt))
        over = min(self._most_over, self._z_of(life, fit, x) * fit.spread)
        found = math.exp(min(20.0, fit.mean(x) + over))
        # Beyond the prediction, what was drawn says more than the model: such answers are long.
        least = 1.25 * len(life.tokens) + 1
        return min(float(life.request.max_tokens), max(found, least)) if life.left else float(len(life.tokens))

    def within(self, rows: Waiting, tokens_N: Floats) -> Floats:
        fits = [self._fit(kind) for kind in rows.kinds]
        known_K = np.array([fit.seen >= 2 for fit in fits], dtype=bool)
        line_K2 = np.array([fit.line if fit.seen >= 2 else (math.log(_UNSEEN), 0.0) for fit in fits]).reshape(-1, 2)
        spread_K = np.where(known_K, np.array([max(fit.spread, _LEAST_SPREAD) for fit in fits]), _UNSEEN_SPREAD)
        at_N = rows.kind_N
        mean_N, spread_N = line_K2[at_N, 0] + line_K2[at_N, 1] * rows.log_prompt_N, spread_K[at_N]
        # Logarithms of the shares of answers that are longer than each; 0 before the first token.
        both_2N = np.stack((tokens_N, rows.tokens_N))
        longer_2N = log_ndtr((mean_N - np.log(np.maximum(both_2N, 1e-9))) / spread_N)
        longer_2N[both_2N <= 0] = 0.0
        share_N = -np.expm1(np.minimum(0.0, longer_2N[0] - longer_2N[1]))
        return np.where(tokens_N >= rows.most_N, 1.0, np.where(tokens_N < rows.tokens_N + 1, 0.0, share_N))

    def _z_of(self, life: Life, fit: _Fit, x: float) -> float:
        """Returns how many deviations above the mean the prediction is."""
        if not self._conditional or not life.tokens or fit.spread < 1e-6:
            return self._z
        passed = _NORMAL.cdf((math.log(len(life.tokens)) - fit.mean(x)) / fit.spread)
        share = _NORMAL.cdf(self._z)
        return _NORMAL.inv_cdf(min(1 - 1e-6, passed + share * (1 - passed)))

    def learn(self, life: Life) -> None:
        if not life.tokens:
            return
        x, y = math.log(len(life.request.prompt)), math.log(len(life.tokens))
        self._all.add(x, y)
        if life.request.kind in self._fits or len(self._fits) < MOST_KINDS:
            self._fits.setdefault(life.request.kind, _Fit()).add(x, y)


class NearestLengths:
    """Plans with a quantile of the answers to the ``neighbours`` prompts of like length, of the same class.

    It keeps the last ``kept`` answers of each class and takes no shape for granted. Of a request that has tokens, only
    the answers that were longer count (``conditional``, as above).
    """

    def __init__(self, quantile: float = QUANTILE, *, neighbours: int = 32, kept: int = 512) -> None:
        if not 0 < quantile < 1 or not 1 <= neighbours <= kept:
            raise ValueError("a quantile is between 0 and 1, and neighbours are at least 1 and at most those kept")
        self._quantile = quantile
        self._neighbours = neighbours
        self._kept = kept
        self._answers: dict[str, deque[tuple[int, int]]] = {}
        self._near: dict[int, list[int]] = {}

    def look(self, pressure: float) -> None:
        pass

    def predict(self, life: Life) -> float:
        drawn = len(life.tokens)
        near = self._near.get(life.id)
        if near is None:
            near = self._near[life.id] = self._lengths_near(life)
        longer = near[bisect_right(near, drawn) :]
        if not longer:
            return float(max(drawn + 1, min(life.request.max_tokens, _UNSEEN if not near else 1.25 * drawn + 1)))
        at = min(len(longer) - 1, int(self._quantile * len(longer)))
        return float(min(life.request.max_tokens, longer[at]))

    def predict_all(self, waiting: Waiting) -> Floats:
        return _one_by_one(self, waiting)

    def within(self, rows: Waiting, tokens_N: Floats) -> Floats:
        return np.array(
            [self._within(life, tokens) for life, tokens in zip(rows.lives, tokens_N.tolist(), strict=True)], np.float64
        )

    def _within(self, life: Life, tokens: float) -> float:
        drawn = len(life.tokens)
        if tokens >= life.request.max_tokens or tokens < drawn + 1:
            return float(tokens >= life.request.max_tokens)
        self.predict(life)  # it finds the neighbours
        near = self._near[life.id]
        longer = near[bisect_right(near, drawn) :]
        return bisect_right(longer, tokens) / len(longer) if longer else float(tokens >= self.predict(life))

    def learn(self, life: Life) -> None:
        self._near.pop(life.id, None)
        kind = life.request.kind
        if life.tokens and (kind in self._answers or len(self._answers) < MOST_KINDS):
            answers = self._answers.setdefault(life.request.kind, deque(maxlen=self._kept))
            answers.append((len(life.request.prompt), len(life.tokens)))

    def _lengths_near(self, life: Life) -> list[int]:
        prompt = len(life.request.prompt)
        answers = self._answers.get(life.request.kind, ())
        near = nsmallest(self._neighbours, answers, key=lambda each: abs(math.log(each[0] / prompt)))
        return sorted(length for _, length in near)


class KnownLengths:
    """Knows every length ahead: what a simulation compares predictors with."""

    def __init__(self, of: Callable[[int], int]) -> None:
        """``of`` returns the true length of the request with this id."""
        self._of = of

    def look(self, pressure: float) -> None:
        pass

    def predict(self, life: Life) -> float:
        return float(self._of(life.id))

    def predict_all(self, waiting: Waiting) -> Floats:
        return _one_by_one(self, waiting)

    def within(self, rows: Waiting, tokens_N: Floats) -> Floats:
        return (self.predict_all(rows) <= tokens_N).astype(np.float64)

    def learn(self, life: Life) -> None:
        pass


def _one_by_one(lengths: LengthPredictor, waiting: Waiting) -> Floats:
    return np.fromiter(map(lengths.predict, waiting.lives), dtype=np.float64, count=len(waiting.lives))
