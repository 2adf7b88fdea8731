"""Pictures with small generated details that decide the class: a task on which merging tokens costs accuracy.

In real fine-grained sets (birds, cars, aircraft) the class depends on a few small places, and merging blurs them. Here
real pictures are only the background. In each of a few columns, at a random height, a light square of a few pixels is
blended in, with one dark stroke that is horizontal or vertical. The class is the reading of all strokes from left to
right. The marks are generated and differ only in their strokes, so tokens that hold them are the first to be merged
with each other. Always call these sets pictures with generated details.
"""

from itertools import product
from typing import Final

import numpy as np

from isthmus.data.images import LabelledImages, Pictures

STROKES: Final = ("level", "upright")
LIGHT: Final = 235
DARK: Final = 20
MAX_MARKS: Final = 4


def detail_classes(marks: int) -> tuple[str, ...]:
    """Return the readings of ``marks`` marks, in the order of their labels. Raises ValueError for fewer than 1 or over
    4.
    """
    if not 1 <= marks <= MAX_MARKS:
        raise ValueError(f"{marks} marks: from 1 to {MAX_MARKS} are wanted")
    return tuple("-".join(reading) for reading in product(STROKES, repeat=marks))


def with_details(
    labelled: LabelledImages, *, seed: int, marks: int = 3, side_px: int = 5, contrast: float = 0.8
) -> LabelledImages:
    """Return the same pictures with ``marks`` details each, labelled by their reading (see ``detail_classes``).

    ``contrast`` is the opacity of a mark; 1 covers the picture. Draws depend only on seed and position. Raises
    ValueError for marks that are too small to be read, too large for their column, or of no contrast.
    """
    side = labelled.pictures_NHWC.shape[1]
    column = side // len(detail_classes(marks)[0].split("-"))
    if side_px < 3 or side_px > column or not 0 < contrast <= 1:
        raise ValueError(
            f"marks of {side_px} pixels and contrast {contrast}: {marks} of them in pictures of {side} pixels take "
            f"from 3 to {column}, and a contrast above 0, at most 1"
        )
    rng = np.random.default_rng(seed)
    count = len(labelled)
    labels_N = rng.integers(0, len(STROKES) ** marks, count)
    pictures_NHWC = labelled.pictures_NHWC.copy()
    for place in range(marks):
        upright_N = (labels_N >> (marks - 1 - place)) & 1
        lefts_N = place * column + rng.integers(0, column - side_px + 1, count)
        tops_N = rng.integers(0, side - side_px + 1, count)
        for picture_HWC, upright, left, top in zip(pictures_NHWC, upright_N, lefts_N, tops_N, strict=True):
            _blend(picture_HWC[top : top + side_px, left : left + side_px], bool(upright), contrast)
    return LabelledImages(pictures_NHWC, labels_N.astype(np.int64))


def _blend(square_HWC: Pictures, upright: bool, contrast: float) -> None:
    """Draw one mark in place."""
    side = len(square_HWC)
    mark_HW = np.full((side, side), LIGHT, np.float32)
    if upright:
        mark_HW[:, side // 2] = DARK
    else:
        mark_HW[side // 2] = DARK
    square_HWC[:] = np.round((1 - contrast) * square_HWC + contrast * mark_HW[..., None]).astype(np.uint8)
