"""Input and output of a strategy: the device's upload, the public set, and a weighted choice.

Axes: K prototype rows, N public samples, C classes, E feature width (both modalities, audio then visual), S chosen.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt

Float32s = npt.NDArray[np.float32]
Float64s = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]
Rows = slice | Indices


class FeatureRows(Protocol):
    """Features of the public samples, read by slices or by indices: an array (memory-mapped or not) or a view."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, rows: Rows, /) -> Float32s: ...


@dataclass(frozen=True)
class Wanted:
    """The device's upload: rows of class probabilities, the number of clips behind each, and features if it sent them.

    Raises ValueError for shapes that disagree, no rows, values that are not finite, or a row of no clips.

    >>> wanted = Wanted(np.full((2, 3), 1 / 3, np.float32), np.array([3, 5], np.int32))
    >>> wanted.shares_K.tolist()
    [0.375, 0.625]
    """

    prototypes_KC: Float32s
    sizes_K: npt.NDArray[np.int32]
    features_KE: Float32s | None = None

    def __post_init__(self) -> None:
        if self.prototypes_KC.ndim != 2 or len(self.prototypes_KC) == 0:
            raise ValueError(f"nothing to select with: prototypes of shape {self.prototypes_KC.shape}")
        if not np.isfinite(self.prototypes_KC).all():
            raise ValueError("prototypes hold values that are not numbers")
        if self.sizes_K.shape != (len(self.prototypes_KC),) or (self.sizes_K < 1).any():
            raise ValueError(f"{len(self.prototypes_KC)} prototypes need as many sizes, each at least 1")
        if self.features_KE is not None:
            if self.features_KE.ndim != 2 or len(self.features_KE) != len(self.prototypes_KC):
                raise ValueError(f"features {self.features_KE.shape} for {len(self.prototypes_KC)} prototypes")
            if not np.isfinite(self.features_KE).all():
                raise ValueError("the prototypes' features hold values that are not numbers")

    @cached_property
    def shares_K(self) -> Float64s:
        """The share of the device's clips behind each row; sums to 1."""
        shares_K: Float64s = self.sizes_K / self.sizes_K.sum(dtype=np.int64)
        return shares_K


@dataclass(frozen=True)
class Public:
    """The teacher's outputs on the public set; all may be memory-mapped. ``labels_N``: true classes, -1 if unknown.

    Raises ValueError for shapes that disagree or no samples. Values are checked when they are read.

    >>> len(Public(np.full((10, 3), 1 / 3, np.float32), np.full(10, -1)))
    10
    """

    probabilities_NC: Float32s
    labels_N: Indices
    features: FeatureRows | None = None

    def __post_init__(self) -> None:
        if self.probabilities_NC.ndim != 2 or len(self.probabilities_NC) == 0:
            raise ValueError(f"nothing to select from: public probabilities of shape {self.probabilities_NC.shape}")
        samples = len(self.probabilities_NC)
        if self.labels_N.shape != (samples,):
            raise ValueError(f"labels {self.labels_N.shape} for {samples} public samples")
        if self.features is not None and (len(self.features.shape) != 2 or self.features.shape[0] != samples):
            raise ValueError(f"features {self.features.shape} for {samples} public samples")

    def __len__(self) -> int:
        return len(self.probabilities_NC)


@dataclass(frozen=True)
class Selection:
    """Public samples to learn from, in the order taken, and how much each counts. No sample occurs twice.

    ``weights_S`` have mean 1; a hard pick has weight 1 for each. ``notes`` are plain sentences that say what the
    strategy could not do as asked.

    >>> picked = Selection.of(np.array([4, 7]))
    >>> len(picked), picked.weighted, picked.effective_size
    (2, False, 2.0)
    """

    indices_S: Indices
    weights_S: Float32s
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.indices_S.ndim != 1 or self.weights_S.shape != self.indices_S.shape:
            raise ValueError(f"{self.indices_S.shape} samples with {self.weights_S.shape} weights")

    @staticmethod
    def of(indices_S: Indices, notes: tuple[str, ...] = ()) -> "Selection":
        """Return a hard pick: every weight 1."""
        return Selection(indices_S, np.ones(len(indices_S), np.float32), notes)

    @staticmethod
    def whole(samples: int) -> "Selection":
        """Return every sample of a set with weight 1."""
        return Selection.of(np.arange(samples, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.indices_S)

    @property
    def weighted(self) -> bool:
        return bool((self.weights_S != 1).any())

    @property
    def effective_size(self) -> float:
        """Kish's effective sample size, (sum w)^2 / sum w^2: as many samples of equal weight teach about as much."""
        wide_S = self.weights_S.astype(np.float64)
        return float(wide_S.sum() ** 2 / max(np.square(wide_S).sum(), 1e-300)) if len(wide_S) else 0.0


Strategy = Callable[[Wanted, Public, int, np.random.Generator], Selection]
"""(upload, public set, samples per row, rng) -> Selection. Pure; the same rng gives the same selection.

>>> chance: Strategy = STRATEGIES["random"]
"""


def check(wanted: Wanted, public: Public, samples_per_row: int) -> None:
    """Raise ValueError if the label sets differ, or for fewer than one sample per row."""
    if wanted.prototypes_KC.shape[1] != public.probabilities_NC.shape[1]:
        raise ValueError(
            f"prototypes {wanted.prototypes_KC.shape} and public {public.probabilities_NC.shape} "
            "do not share a label set"
        )
    if samples_per_row < 1:
        raise ValueError(f"samples_per_row is {samples_per_row}; it must be at least 1")


def wanted_count(wanted: Wanted, public: Public, samples_per_row: int) -> int:
    """Return min(K n, N), the number of samples that a hard strategy picks."""
    return min(len(wanted.prototypes_KC) * samples_per_row, len(public))
