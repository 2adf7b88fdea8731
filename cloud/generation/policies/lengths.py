"""PURE: predicts how long answers will be, and learns from those that end.

Per class of request: least squares of the logarithm of the length on the logarithm of the prompt's length, and the
spread of what is left, by which any quantile is read. A request that has passed its prediction is planned as a little
longer than it is.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Protocol

from isthmus.cloud.generation.scheduling.policy import Life

QUANTILE: Final = 0.9
FORGET: Final = 0.995
"""Weight that an earlier answer of the same class keeps when a new one is learned."""
_PRIOR: Final = 4.0
"""Answers of all classes that a class with few answers of its own is mixed with."""


class LengthPredictor(Protocol):
    """Predicts the number of tokens of an answer; at least one more than it has."""

    def look(self, pressure: float) -> None:
        """Called before each decision. ``pressure``: from 0 (nobody waits) to 1 (as many wait as can run)."""

    def predict(self, life: Life) -> float: ...

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
    seen: int = field(default=0)

    def add(self, x: float, y: float) -> None:
        error = y - self.mean(x) if self.seen >= 2 else 0.0
        self.squared_error = FORGET * self.squared_error + error * error
        self.weight = FORGET * self.weight + 1
        self.x = FORGET * self.x + x
        self.y = FORGET * self.y + y
        self.xx = FORGET * self.xx + x * x
        self.xy = FORGET * self.xy + x * y
        self.seen += 1

    def mean(self, x: float) -> float:
        mean_x, mean_y = self.x / self.weight, self.y / self.weight
        # One answer's worth of ridge: without spread in x the slope is 0.
        slope = (self.xy / self.weight - mean_x * mean_y) / (self.xx / self.weight - mean_x**2 + 1 / self.weight)
        return mean_y + slope * (x - mean_x)

    @property
    def spread(self) -> float:
        return math.sqrt(self.squared_error / self.weight)


class LearnedLengths:
    """Plans with a ``quantile`` of what is known about a class, from the first answer on.

    With ``idle_quantile`` the quantile follows the load: that one if nobody waits, ``quantile`` if as many wait as can
    run. A short queue has room for answers that turn out longer; a long one has not.
    """

    def __init__(self, quantile: float = QUANTILE, *, idle_quantile: float | None = None) -> None:
        for each in (quantile, idle_quantile or quantile):
            if not 0 < each < 1:
                raise ValueError(f"quantile {each:g}: must be between 0 and 1")
        self._idle_z = _normal_quantile(idle_quantile or quantile)
        self._busy_z = _normal_quantile(quantile)
        self._z = self._busy_z
        self._fits: dict[str, _Fit] = {}
        self._all = _Fit()

    def look(self, pressure: float) -> None:
        self._z = self._idle_z + min(1.0, pressure) * (self._busy_z - self._idle_z)

    def predict(self, life: Life) -> float:
        fit = self._fits.get(life.request.kind)
        if fit is None or fit.seen < _PRIOR:
            fit = self._all
        if fit.seen < 2:
            return float(max(len(life.tokens) + 1, min(life.request.max_tokens, 64)))
        x = math.log(len(life.request.prompt))
        found = math.exp(min(20.0, fit.mean(x) + self._z * fit.spread))
        # Beyond the prediction, what was drawn says more than the model: such answers are long.
        least = 1.25 * len(life.tokens) + 1
        return min(float(life.request.max_tokens), max(found, least)) if life.left else float(len(life.tokens))

    def learn(self, life: Life) -> None:
        if not life.tokens:
            return
        x, y = math.log(len(life.request.prompt)), math.log(len(life.tokens))
        self._fits.setdefault(life.request.kind, _Fit()).add(x, y)
        self._all.add(x, y)


class KnownLengths:
    """Knows every length ahead: what a simulation compares predictors with."""

    def __init__(self, of: Callable[[int], int]) -> None:
        """``of`` returns the true length of the request with this id."""
        self._of = of

    def look(self, pressure: float) -> None:
        pass

    def predict(self, life: Life) -> float:
        return float(self._of(life.id))

    def learn(self, life: Life) -> None:
        pass


def _normal_quantile(share: float) -> float:
    """Returns the standard normal quantile, by bisection of its distribution function."""
    low, high = -8.0, 8.0
    for _ in range(60):
        middle = (low + high) / 2
        if 0.5 * (1 + math.erf(middle / math.sqrt(2))) < share:
            low = middle
        else:
            high = middle
    return (low + high) / 2
