"""Generated details: labels can be read from the pictures, backgrounds stay, and a seed fixes the result."""

from pathlib import Path

import numpy as np
import pytest

from isthmus.data.images import LabelledImages, read_images, write_images
from isthmus.data.synthetic.details import DARK, LIGHT, detail_classes, with_details


def grounds(count: int = 12) -> LabelledImages:
    pictures = np.random.default_rng(3).integers(90, 130, (count, 32, 32, 3), np.uint8)
    return LabelledImages(pictures, np.zeros(count, np.int64))


def read_off(picture_HWC: np.ndarray, marks: int, side: int) -> int:
    """Return the label, by finding each column's mark."""
    label, column = 0, 32 // marks
    for place in range(marks):
        strip = picture_HWC[:, place * column : (place + 1) * column, 0].astype(int)
        found = [
            upright
            for top in range(32 - side + 1)
            for left in range(column - side + 1)
            for upright in (0, 1)
            if np.array_equal(strip[top : top + side, left : left + side], mark(upright, side))
        ]
        assert len(found) == 1
        label = 2 * label + found[0]
    return label


def mark(upright: int, side: int) -> np.ndarray:
    whole = np.full((side, side), LIGHT)
    if upright:
        whole[:, side // 2] = DARK
    else:
        whole[side // 2] = DARK
    return whole


@pytest.mark.parametrize("marks", [1, 2, 3])
def test_the_label_is_the_reading(marks: int) -> None:
    made = with_details(grounds(), seed=1, marks=marks, contrast=1.0)
    assert len(detail_classes(marks)) == 2**marks
    for picture_HWC, label in zip(made.pictures_NHWC, made.labels_N, strict=True):
        assert read_off(picture_HWC, marks, 5) == label
    again = with_details(grounds(), seed=1, marks=marks, contrast=1.0)
    assert again.digest() == made.digest()
    assert with_details(grounds(), seed=2, marks=marks).digest() != made.digest()


def test_the_ground_stays_and_a_faint_mark_lets_it_through() -> None:
    before = grounds()
    faint = with_details(before, seed=1, contrast=0.5)
    changed = (faint.pictures_NHWC != before.pictures_NHWC).any(axis=-1).sum(axis=(1, 2))
    assert (changed <= 3 * 25).all() and (changed > 40).all()
    assert (before.pictures_NHWC == grounds().pictures_NHWC).all()
    assert detail_classes(2) == ("level-level", "level-upright", "upright-level", "upright-upright")


def test_what_cannot_be_drawn_is_refused() -> None:
    for changes in ({"marks": 0}, {"marks": 5}, {"side_px": 2}, {"side_px": 11}, {"contrast": 0.0}):
        with pytest.raises(ValueError, match="marks"):
            with_details(grounds(), seed=0, **changes)  # type: ignore[arg-type]


def test_written_pictures_come_back_to_the_pixel(tmp_path: Path) -> None:
    made = with_details(grounds(), seed=1)
    write_images(tmp_path / "details.parquet", made)
    assert read_images(tmp_path / "details.parquet", 32).digest() == made.digest()
