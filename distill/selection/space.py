"""The vectors that public samples and prototypes are compared by: class probabilities, features, or both joined.

Axes: K rows, N public samples, C classes, E feature width, V width of the vectors compared, M some samples.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np

from isthmus.distill.selection.interface import Float32s, Float64s, Indices, Public, Rows, Wanted
from isthmus.distill.selection.nearest import BLOCK_ROWS, SCALE, Pool, rounded_unit

_STATISTICS_ROWS: Final = 16_384
"""Mean and deviation of each feature are taken over at most about twice this many public samples, evenly spaced."""

_JOINT_SCALE: Final = SCALE / 2
"""Scale of each half of a joint vector: the sum of two exact products must stay exact too."""


@dataclass(frozen=True)
class Space:
    """Rounded unit vectors of rows and samples whose products are exact similarities (``nearest``).

    Each vector joins ``parts`` unit vectors, so a similarity is a sum of that many cosines.
    """

    queries_KV: Float64s
    vectors: Callable[[Rows], Float64s]
    samples: int
    parts: int = 1

    @property
    def unit(self) -> float:
        """The product of two vectors that corresponds to a cosine of 1."""
        return SCALE**2 if self.parts == 1 else _JOINT_SCALE**2

    def pool(self, block_rows: int = BLOCK_ROWS) -> Pool:
        """Return a pool of all samples, none taken yet."""
        return Pool(self.vectors, np.zeros(self.samples, dtype=bool), self.parts * self.unit, block_rows)

    def within(self, members_M: Indices) -> "Space":
        """Return the same space with only these samples, numbered from 0."""
        return Space(self.queries_KV, lambda rows: self.vectors(members_M[rows]), len(members_M), self.parts)


def by_probability(wanted: Wanted, public: Public) -> Space:
    """Compare by the cosine of class probabilities (Eq. 5.5)."""
    return Space(
        rounded_unit(wanted.prototypes_KC), lambda rows: rounded_unit(public.probabilities_NC[rows]), len(public)
    )


def by_feature(wanted: Wanted, public: Public) -> Space:
    """Compare by the cosine of standardised features: the public mean is subtracted and the public deviation divided
    out.

    Raw features of a network share a large common direction, in which every pair is similar. A student trained by least
    squares (Eq. 5.4) keeps the teacher's directions but not its lengths. Raises ValueError if the release has no
    features, or features of another width.
    """
    features_KE, standard = _standardised(wanted, public)
    rows = _rows_of(public)
    return Space(rounded_unit(standard(features_KE)), lambda at: rounded_unit(standard(rows(at))), len(public))


def by_both(wanted: Wanted, public: Public) -> Space:
    """Compare by the cosine of probabilities plus the cosine of standardised features. Raises ValueError as
    ``by_feature``.
    """
    features_KE, standard = _standardised(wanted, public)
    rows = _rows_of(public)

    def joined(probabilities_MC: Float32s, features_ME: Float32s) -> Float64s:
        halves = (rounded_unit(probabilities_MC, _JOINT_SCALE), rounded_unit(standard(features_ME), _JOINT_SCALE))
        return np.concatenate(halves, axis=1)

    return Space(
        joined(wanted.prototypes_KC, features_KE),
        lambda at: joined(public.probabilities_NC[at], rows(at)),
        len(public),
        parts=2,
    )


def _rows_of(public: Public) -> Callable[[Rows], Float32s]:
    features = public.features
    if features is None:
        raise ValueError("the device sent features, but this public set has none to compare them with")
    return lambda rows: features[rows]


def _standardised(wanted: Wanted, public: Public) -> tuple[Float32s, Callable[[Float32s], Float64s]]:
    rows = _rows_of(public)
    features_KE = wanted.features_KE
    if features_KE is None:
        raise ValueError("the device sent no features")
    width = public.features.shape[1] if public.features is not None else 0
    if features_KE.shape[1] != width:
        raise ValueError(f"the device's features are {features_KE.shape[1]} wide, the public set's {width}")
    step = max(1, len(public) // _STATISTICS_ROWS)
    sample_ME = rows(np.arange(0, len(public), step)).astype(np.float64)
    if not np.isfinite(sample_ME).all():
        raise ValueError("the public set holds features that are not numbers")
    mean_E = sample_ME.mean(axis=0)
    deviation_E = sample_ME.std(axis=0)
    # A feature that is the same everywhere carries no information.
    scale_E = np.where(deviation_E > 1e-6 * (1e-6 + np.abs(mean_E)), 1 / np.maximum(deviation_E, 1e-30), 0.0)
    return features_KE, lambda features_ME: (features_ME - mean_E) * scale_E
