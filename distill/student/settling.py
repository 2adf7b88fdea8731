"""PURE: whether further rounds of selection are useless because the selection no longer changes."""

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]


def overlap(before_S: Indices, after_S: Indices) -> float:
    """Return the Jaccard index of two selections of public clips: |A and B| / |A or B|, 0 to 1. Order and repeats do
    not count.

    Two empty selections are equal: 1.
    """
    before, after = np.unique(before_S), np.unique(after_S)
    shared = len(np.intersect1d(before, after, assume_unique=True))
    united = len(before) + len(after) - shared
    return shared / united if united else 1.0


def settled(before_S: Indices, after_S: Indices, threshold: float) -> bool:
    """Return whether the selection of a round equals that of the round before, up to ``threshold`` of overlap (0 to 1).

    The paper selects again every 10 epochs in any case (Alg. 7). If the answer no longer changes, another round costs a
    download and prototypes and gains nothing. The remaining epochs are then trained on this selection.
    """
    return overlap(before_S, after_S) >= threshold
