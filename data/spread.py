"""How far people lie apart: the spread between persons, compared with the spread of one person's clips of one class.

A person's voice and face shift the features of all their clips alike. A linear classifier sees that shift as a constant
added to its logits, and a personal offset can take it out. How large the shift is decides what such an offset can gain,
so a synthetic set must have as much of it as real people have.

Model: feature = class mean + person + habit (person by class) + clip. The variances of person, habit and clip are
estimated from the group means of a two-way layout (Searle, Casella and McCulloch, Variance Components, 1992, section
4.3), here for groups of unequal sizes with the mean of the inverse sizes.

Only the directions that tell classes apart matter to a classifier. They are fitted on half of the persons and measured
on the others, and the other way round (linear discriminants, shrunk towards a multiple of the identity).

Axes: N clips, D features, K directions.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import cv2
import numpy as np
import numpy.typing as npt

from isthmus.data.clip import ClipError, Listing
from isthmus.data.media.decode import decode
from isthmus.data.transforms import InputSpec, frame_positions

Float64s = npt.NDArray[np.float64]
Int64s = npt.NDArray[np.int64]

SPEC: Final = InputSpec(spectrogram_bins=48, spectrogram_columns=48, frame_px=64, stored_px=64, frames_used=3)
LEAST_PERSONS: Final = 4
"""Two on each side: with fewer there is no variance between persons to estimate."""
HALVINGS: Final = 10
"""Random halvings of the persons that are averaged."""
_SHRINKAGE: Final = 0.3
_HOG: Final = cv2.HOGDescriptor((64, 64), (16, 16), (16, 16), (8, 8), 9)


@dataclass(frozen=True)
class Spread:
    """Variances in the directions that tell classes apart, as multiples of the variance within person and class."""

    between: float
    """Of persons: what shifts all clips of a person alike. This is the ratio that the synthetic set is tuned to."""
    habits: float
    """Of persons by class: how much their own way of expressing one class differs from their shift."""
    classes: float
    """Of the class means."""
    persons: int
    clips: int


def person_spread(features_ND: Float64s, labels_N: Int64s, persons_N: npt.NDArray[np.str_]) -> Spread:
    """Return the variance components of the persons, measured on persons that the directions were not fitted on.

    Persons who lack a class are left out. Raises ValueError if fewer than four are left, there are fewer than two
    classes, or nobody has two clips of a class.

    >>> rng = np.random.default_rng(0)
    >>> labels_N, people_N = np.tile([0, 1], 300), np.repeat([f"{n:02d}" for n in range(20)], 30)
    >>> shifts_ND = 0.7 * np.repeat(rng.normal(size=(20, 2)), 30, axis=0)
    >>> clips_ND = 4 * np.eye(2)[labels_N] + shifts_ND + rng.normal(size=(600, 2))
    >>> 0.25 < person_spread(clips_ND, labels_N, people_N).between < 0.75
    True
    """
    classes = np.unique(labels_N)
    whole = [name for name in np.unique(persons_N) if len(np.unique(labels_N[persons_N == name])) == len(classes)]
    if len(whole) < LEAST_PERSONS or len(classes) < 2:
        raise ValueError(
            f"{len(whole)} persons with clips of all {len(classes)} classes: the spread between persons needs "
            f"{LEAST_PERSONS} persons, and two classes"
        )
    rng = np.random.default_rng(0)
    found = []
    for _ in range(HALVINGS):
        shuffled = rng.permutation(whole)
        one, other = (np.isin(persons_N, half) for half in np.array_split(shuffled, 2))
        for fitted_N, held_N in ((one, other), (other, one)):
            directions_DK = _directions(features_ND[fitted_N], labels_N[fitted_N], persons_N[fitted_N])
            found.append(_components(features_ND[held_N] @ directions_DK, labels_N[held_N], persons_N[held_N]))
    between, habits, apart = np.mean(found, axis=0)
    return Spread(float(between), float(habits), float(apart), len(whole), int(np.isin(persons_N, whole).sum()))


def _directions(features_ND: Float64s, labels_N: Int64s, persons_N: npt.NDArray[np.str_]) -> Float64s:
    """Return the linear discriminants (D, classes - 1) of clips centred per person."""
    deviation_D = features_ND.std(axis=0) + 1e-9
    scaled_ND = features_ND / deviation_D
    for name in np.unique(persons_N):
        own_N = persons_N == name
        scaled_ND[own_N] -= _balanced_mean(scaled_ND[own_N], labels_N[own_N])
    means_CD = np.stack([scaled_ND[labels_N == label].mean(axis=0) for label in np.unique(labels_N)])
    within_ND = scaled_ND - means_CD[np.searchsorted(np.unique(labels_N), labels_N)]
    within_DD = within_ND.T @ within_ND / len(within_ND)
    level = np.trace(within_DD) / len(within_DD)
    within_DD = (1 - _SHRINKAGE) * within_DD + _SHRINKAGE * level * np.eye(len(within_DD))
    half_DD = np.linalg.inv(np.linalg.cholesky(within_DD))
    _, _, rows_KD = np.linalg.svd((means_CD - means_CD.mean(axis=0)) @ half_DD.T, full_matrices=False)
    directions_DK: Float64s = (rows_KD[: len(means_CD) - 1] @ half_DD / deviation_D).T
    return directions_DK


def _components(scores_NK: Float64s, labels_N: Int64s, persons_N: npt.NDArray[np.str_]) -> tuple[float, float, float]:
    """Return the variances of persons, habits and class means, each divided by that of clips; means over directions
    that are whitened by the clips' covariance.
    """
    names, classes = np.unique(persons_N), np.unique(labels_N)
    groups = [[scores_NK[(persons_N == name) & (labels_N == label)] for label in classes] for name in names]
    free = sum(len(own) - 1 for row in groups for own in row)
    if free < 1:
        raise ValueError("nobody has two clips of one class: there is no variance within person and class")
    rest_NK = np.concatenate([own - own.mean(axis=0) for row in groups for own in row])
    clips_KK = rest_NK.T @ rest_NK / free
    white_KK = np.linalg.pinv(np.linalg.cholesky(clips_KK + 1e-12 * np.trace(clips_KK) * np.eye(len(clips_KK))))
    means_PCK = np.array([[own.mean(axis=0) for own in row] for row in groups]) @ white_KK.T
    noise = float(np.mean([[1 / len(own) for own in row] for row in groups]))  # variance of a group's mean, from clips
    people, count, _ = means_PCK.shape
    class_CK, person_PK = means_PCK.mean(axis=0), means_PCK.mean(axis=1)
    own_PCK = means_PCK - class_CK - person_PK[:, None] + means_PCK.mean(axis=(0, 1))
    per_cell = (own_PCK**2).sum(axis=(0, 1)).mean() / ((people - 1) * (count - 1))
    per_person = count * person_PK.var(axis=0, ddof=1).mean()
    per_class = people * class_CK.var(axis=0, ddof=1).mean()
    return (per_person - per_cell) / count, per_cell - noise, (per_class - per_cell) / people


def _balanced_mean(features_ND: Float64s, labels_N: Int64s) -> Float64s:
    means_D: Float64s = np.mean([features_ND[labels_N == label].mean(axis=0) for label in np.unique(labels_N)], axis=0)
    return means_D


def spread_of(listing: Listing, *, on_clip: Callable[[], None] = lambda: None) -> dict[str, Spread]:
    """Decode the listing's clips and return the spread of their sound and of their picture.

    Clips without a person or a label, without sound or picture, or damaged are left out. Raises ValueError as
    ``person_spread`` does.
    """
    rows: dict[str, list[Float64s]] = {"sound": [], "picture": []}
    labels, persons = [], []
    for ref in listing.refs:
        on_clip()
        if ref.label is None or ref.actor is None or ref.audio_path is None or ref.video_path is None:
            continue
        try:
            clip = decode(ref, SPEC)
        except ClipError:
            continue
        if clip.spectrogram_FT is None or clip.frames_KHWC is None:
            continue
        rows["sound"].append(sound_features(clip.spectrogram_FT))
        rows["picture"].append(picture_features(clip.frames_KHWC))
        labels.append(ref.label)
        persons.append(ref.actor)
    labels_N, persons_N = np.asarray(labels, np.int64), np.asarray(persons, np.str_)
    return {name: person_spread(np.asarray(each), labels_N, persons_N) for name, each in rows.items()}


def sound_features(spectrogram_FT: npt.NDArray[np.float32]) -> Float64s:
    """Return mean and deviation over time of each frequency band of the standardised spectrogram: (96,)."""
    whole_FT = spectrogram_FT.astype(np.float64)
    return np.concatenate([whole_FT.mean(axis=1), whole_FT.std(axis=1)])


def picture_features(frames_KHWC: npt.NDArray[np.uint8]) -> Float64s:
    """Return histograms of oriented gradients (Dalal and Triggs, CVPR 2005) of grey frames, averaged: (576,)."""
    grey_KHW = [cv2.cvtColor(frames_KHWC[place], cv2.COLOR_RGB2GRAY) for place in frame_positions(SPEC)]
    return np.asarray(np.mean([np.ravel(_HOG.compute(grey_HW)) for grey_HW in grey_KHW], axis=0), np.float64)
