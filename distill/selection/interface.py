"""What a strategy is given and what it gives back: the device's upload, the public set, and a weighted choice.

Axes: K prototype rows, N public samples, C classes, E feature width (both modalities, audio then visual), S chosen.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Wide = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]
Rows = slice | Indices


class FeatureRows(Protocol):
    """Features of the public samples, read by slices or by indices: an array, memory-mapped or not, or a view."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, rows: Rows, /) -> Floats: ...


@dataclass(frozen=True)
class Wanted:
    """What the device sent: rows of class probabilities, how many clips each stands for, and features if it chose so.

    Raises ValueError for shapes that disagree, no rows, values that are not numbers, or a row of no clips.
    """

    prototypes_KC: Floats
    sizes_K: npt.NDArray[np.int32]
    features_KE: Floats | None = None

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
    def shares_K(self) -> Wide:
        """The share of the device's clips behind each row; sums to 1."""
        shares_K: Wide = self.sizes_K / self.sizes_K.sum(dtype=np.int64)
        return shares_K


@dataclass(frozen=True)
class Public:
    """The public set as the teacher sees it; all may be memory-mapped. ``labels_N``: true classes, -1 where unknown.

    Raises ValueError for shapes that disagree or no samples. Values are checked as they are read.
    """

    probabilities_NC: Floats
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
    """Public samples to learn from, in the order taken, and how much each counts. No sample stands twice.

    ``weights_S`` have mean 1; all are 1 where samples are picked or not, without shades between. ``notes`` tell in
    plain sentences where the strategy could not do what was asked of it.
    """

    indices_S: Indices
    weights_S: Floats
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.indices_S.ndim != 1 or self.weights_S.shape != self.indices_S.shape:
            raise ValueError(f"{self.indices_S.shape} samples with {self.weights_S.shape} weights")

    @staticmethod
    def of(indices_S: Indices, notes: tuple[str, ...] = ()) -> "Selection":
        """A hard pick: every weight 1."""
        return Selection(indices_S, np.ones(len(indices_S), np.float32), notes)

    @staticmethod
    def whole(samples: int) -> "Selection":
        """Every sample of a set, each counting alike."""
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
"""(what the device sent, the public set, samples per row, rng) -> Selection. Pure; the same for the same rng."""


def check(wanted: Wanted, public: Public, samples_per_row: int) -> None:
    """Raises ValueError for another label set, or fewer than one sample a row."""
    if wanted.prototypes_KC.shape[1] != public.probabilities_NC.shape[1]:
        raise ValueError(
            f"prototypes {wanted.prototypes_KC.shape} and public {public.probabilities_NC.shape} "
            "do not share a label set"
        )
    if samples_per_row < 1:
        raise ValueError(f"samples_per_row is {samples_per_row}; it must be at least 1")


def wanted_count(wanted: Wanted, public: Public, samples_per_row: int) -> int:
    """min(K n, N): as many samples as a hard strategy picks."""
    return min(len(wanted.prototypes_KC) * samples_per_row, len(public))
