"""Labelled pictures and single ones: read with bounds, and prepared in the one way that training and serving share.

A set is a Parquet file with the columns ``image`` (a struct with the encoded picture in ``bytes``) and ``label``, as
image sets are published for CIFAR-10 and its like.
"""

import hashlib
import io
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from isthmus.data.files import replaced

MAX_PIXELS: Final = 64_000_000
"""A larger picture is refused by its header, before anything is decoded."""
MAX_FILE_BYTES: Final = 32 << 20
MAX_IMAGES: Final = 10_000_000
_ROWS_AT_ONCE: Final = 256

CIFAR10_CLASSES: Final = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)

Pictures = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]
Triple = tuple[float, float, float]


class ImageError(ValueError):
    """A picture or a set of them that cannot be used, and why. Fit to be shown to who sent it."""


@dataclass(frozen=True)
class PixelSpec:
    """How a model reads pictures: side, and mean and deviation of each of R, G, B in [0, 1].

    Raises ValueError for numbers that cannot be.
    """

    size_px: int
    mean: Triple
    deviation: Triple

    def __post_init__(self) -> None:
        if not 1 <= self.size_px <= 4_096:
            raise ValueError(f"pictures of {self.size_px} pixels a side")
        if not all(0 < value <= 1 for value in self.deviation) or not all(0 <= value <= 1 for value in self.mean):
            raise ValueError(f"pixels: mean {self.mean} and deviation {self.deviation}")

    def standardise(self, pictures_BHWC: Pictures) -> npt.NDArray[np.float32]:
        """float32 (B, 3, H, W), as the model reads it."""
        scale_C = 1 / (255 * np.array(self.deviation, np.float32))
        offset_C = np.array(self.mean, np.float32) / np.array(self.deviation, np.float32)
        standard_BHWC = pictures_BHWC.astype(np.float32) * scale_C - offset_C
        return np.ascontiguousarray(standard_BHWC.transpose(0, 3, 1, 2))


STATISTICS: Final[dict[str, tuple[Triple, Triple]]] = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
"""Mean and deviation that models are commonly trained with, by name."""


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """``pictures_NHWC`` are uint8 RGB squares of one size, ``labels_N`` positions in some list of classes."""

    pictures_NHWC: Pictures
    labels_N: Labels

    def __len__(self) -> int:
        return len(self.labels_N)

    def digest(self) -> str:
        """SHA-256 in hex over pictures and labels."""
        digest = hashlib.sha256(repr(self.pictures_NHWC.shape).encode())
        digest.update(np.ascontiguousarray(self.pictures_NHWC).data)
        digest.update(np.ascontiguousarray(self.labels_N).data)
        return digest.hexdigest()

    def only(self, positions_N: npt.NDArray[np.int64]) -> "LabelledImages":
        return LabelledImages(self.pictures_NHWC[positions_N], self.labels_N[positions_N])


def decode_image(data: bytes, size_px: int) -> Pictures:
    """A JPEG or PNG as uint8 (size_px, size_px, 3): its centre square, resized. Transparency is dropped.

    Raises ImageError for another format, an empty, broken or truncated file, and one over the bounds above; which
    holds before memory is taken for its pixels.
    """
    if len(data) > MAX_FILE_BYTES:
        raise ImageError(f"an image file of {len(data)} bytes; at most {MAX_FILE_BYTES} are read")
    try:
        # Pillow reads no more than the header here.
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise Image.DecompressionBombError
            if image.format == "JPEG":
                image.draft("RGB", (size_px, size_px))  # decodes at 1/2, 1/4 or 1/8 where that is still large enough
            picture_HWC = np.asarray(image.convert("RGB"))
    except Image.DecompressionBombError as error:  # Pillow's own bound is higher, but stands in the way of the header
        raise ImageError(f"an image of over {MAX_PIXELS} pixels; it was not decoded") from error
    except UnidentifiedImageError as error:
        raise ImageError("neither a JPEG nor a PNG file, or its header is broken") from error
    except (OSError, SyntaxError, ValueError, EOFError, struct.error) as error:
        raise ImageError("a broken or truncated image") from error
    return centre_square(picture_HWC, size_px)


def centre_square(picture_HWC: Pictures, size_px: int) -> Pictures:
    """The largest square in the middle of uint8 (H, W, 3), resized to size_px."""
    height, width = picture_HWC.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square_HWC = picture_HWC[top : top + side, left : left + side]
    if side == size_px:
        return np.ascontiguousarray(square_HWC)
    way = cv2.INTER_AREA if side > size_px else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(square_HWC, (size_px, size_px), interpolation=way), np.uint8)


def read_images(path: Path, size_px: int, *, limit: int | None = None) -> LabelledImages:
    """The pictures of a Parquet file in their order, at most ``limit`` of them.

    Raises ImageError naming the file for one that is missing, no Parquet file, without those columns, empty or over
    the bounds, and the row for a picture that cannot be decoded or has no label.
    """
    pictures: list[Pictures] = []
    labels: list[int] = []
    for picture, label in _rows(path):
        if limit is not None and len(labels) == limit:
            break
        row = len(labels)
        if row == MAX_IMAGES:
            raise ImageError(f"{path.name}: over {MAX_IMAGES} pictures")
        if not isinstance(label, int) or label < 0:
            raise ImageError(f"{path.name}, row {row}: its label is {label!r}")
        if not isinstance(picture, dict) or not isinstance(picture.get("bytes"), bytes):
            raise ImageError(f"{path.name}, row {row}: no picture")
        try:
            pictures.append(decode_image(picture["bytes"], size_px))
        except ImageError as error:
            raise ImageError(f"{path.name}, row {row}: {error}") from error
        labels.append(label)
    if not labels:
        raise ImageError(f"{path.name} holds no pictures")
    return LabelledImages(np.stack(pictures), np.array(labels, np.int64))


def write_images(path: Path, labelled: LabelledImages) -> None:
    """Writes a Parquet file that ``read_images`` reads: PNG, so that no pixel changes."""
    import pyarrow
    from pyarrow import parquet

    rows = []
    for picture_HWC, label in zip(labelled.pictures_NHWC, labelled.labels_N.tolist(), strict=True):
        out = io.BytesIO()
        Image.fromarray(picture_HWC).save(out, "PNG")
        rows.append({"image": {"bytes": out.getvalue(), "path": None}, "label": label})
    with replaced(path) as part:
        parquet.write_table(pyarrow.Table.from_pylist(rows), part)


def _rows(path: Path) -> Iterator[tuple[Any, Any]]:
    """(image, label) of each row; few rows in memory at a time."""
    import pyarrow
    from pyarrow import parquet

    if not path.is_file():
        raise ImageError(f"there is no file {path}")
    try:
        file = parquet.ParquetFile(path)
        names = file.schema_arrow.names
        if not {"image", "label"} <= set(names):
            raise ImageError(f"{path.name}: columns {', '.join(names)}; needed are image and label")
        for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE, columns=["image", "label"]):
            yield from zip(batch.column("image").to_pylist(), batch.column("label").to_pylist(), strict=True)
    except (pyarrow.ArrowException, OSError) as error:
        raise ImageError(f"{path.name} is no Parquet file, or damaged") from error
