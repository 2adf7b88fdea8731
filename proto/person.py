"""What a student knows of people in general: heads for features that are centred per person, and how people differ.

The cloud fits both on labelled public clips (distill/student/centred.py) and ships them in the signed manifest. A
device uses them to estimate what is the same in all clips of its one user (edge/own_clips/offset).

Axes: M modalities (sound, picture), N clips, C classes, D feature width.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

Float32s = npt.NDArray[np.float32]

MODALITIES: Final = 2
"""Sound, then picture."""


@dataclass(frozen=True, eq=False)
class CentredHeads:
    """One linear head per modality, for a person whose features are those of the average public person.

    ``logits`` gives ((x - centre) / spread) W + bias, with the temperature folded into W and bias. ``centre_MD`` is the
    mean over public people of what is the same in all of a person's clips. ``spread_MD`` is the standard deviation of
    each feature within people.
    """

    weights_MCD: Float32s
    bias_MC: Float32s
    centre_MD: Float32s
    spread_MD: Float32s

    def standardised(self, features_MND: Float32s) -> Float32s:
        """Return (x - centre) / spread, (M, N, D)."""
        scaled_MND: Float32s = (features_MND - self.centre_MD[:, np.newaxis]) / self.spread_MD[:, np.newaxis]
        return scaled_MND

    def logits(self, features_MND: Float32s) -> Float32s:
        """Return the logits of both heads, (M, N, C). Those of an absent modality have no meaning."""
        return self.logits_of(self.standardised(features_MND))

    def logits_of(self, standard_MND: Float32s) -> Float32s:
        """Return the logits of features that ``standardised`` returned."""
        logits_MNC: Float32s = standard_MND @ self.weights_MCD.transpose(0, 2, 1) + self.bias_MC[:, np.newaxis]
        return logits_MNC


@dataclass(frozen=True, eq=False)
class PersonModel:
    """How the logits of ``CentredHeads`` are distributed over ``people`` public people, none of whom a head had seen.

    ``mean_MCC[m, c]``: the mean logits of class c, when each person's own shift is taken out.
    ``between_MCC``: the covariance of that shift between people.
    ``within_MCC``: the covariance of the logits within a person and a class.
    ``fusion``: the factor of the sum of both logits if a clip has both modalities. Sound and picture are not
    independent, so their plain sum is too confident.
    """

    mean_MCC: Float32s
    between_MCC: Float32s
    within_MCC: Float32s
    fusion: float = 1.0
    people: int = 0


@dataclass(frozen=True, eq=False)
class Centred:
    """Both parts, which are shipped together."""

    heads: CentredHeads
    person: PersonModel
