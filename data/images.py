"""Labelled pictures and single ones: read with bounds, and prepared in the one way that training and serving share.

A set is a Parquet file, or several shards of one, with a column of encoded pictures (bytes, or a struct with ``bytes``)
and a column of labels, as image sets are published for CIFAR-10 and similar sets.
"""

import hashlib
import io
import math
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms, UnidentifiedImageError

from isthmus.data.files import not_the_file, replaced

MAX_PIXELS: Final = 64_000_000
"""A larger picture is refused by its header, before anything is decoded."""
MAX_FILE_BYTES: Final = 32 << 20
MAX_IMAGES: Final = 10_000_000
IMAGE_COLUMNS: Final = ("image", "img")
LABEL_COLUMNS: Final = ("label", "labels")
_MODES: Final = {(): "L", (3,): "RGB", (4,): "CMYK"}
_ROWS_AT_ONCE: Final = 256
_MAX_PROFILE_BYTES: Final = 4 << 20
_ORIENTATION_TAG: Final = 0x0112
_ORDERS: Final = {1: (1, 1), 2: (1, -1), 3: (-1, -1), 4: (-1, 1), 5: (1, 1), 6: (1, -1), 7: (-1, -1), 8: (-1, 1)}
"""By EXIF orientation: steps through rows and columns. From 5 on, rows and columns change places first."""
_SHARD: Final = re.compile(r"-(\d{5})-of-(\d{5})")
_OTHER_KINDS: Final = (
    ("a Git LFS pointer: run 'git lfs pull'", b"version https://git-lfs", 0),
    ("GIF", b"GIF8", 0),
    ("WebP", b"WEBP", 8),
    ("BMP", b"BM", 0),
    ("TIFF", b"II*\0", 0),
    ("TIFF", b"MM\0*", 0),
    ("HEIC or AVIF", b"ftyp", 4),
    ("SVG", b"<svg", 0),
)
"""Files that people take for pictures that are read: kind, mark, and where the mark begins."""

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
    """A picture or a set of pictures that cannot be used, and why. The message may be shown to the sender."""


_RESAMPLING: Final = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


@dataclass(frozen=True)
class Crop:
    """Which part of a picture a model sees, and how that is resized.

    ``share``: the side of the centre square that is seen, as a share of the picture's shorter side. ``interpolation``:
    nearest, bilinear, bicubic or lanczos, as Pillow resizes (with a wider filter if it shrinks); None: the mean of the
    covered area if it shrinks, bicubic if it grows. Raises ValueError for other values.
    """

    share: float = 1.0
    interpolation: str | None = None

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1 or self.interpolation not in (None, *_RESAMPLING):
            raise ValueError(f"a crop of {self.share} by {self.interpolation}; known are {', '.join(_RESAMPLING)}")


WHOLE: Final = Crop()


@dataclass(frozen=True)
class PixelSpec:
    """How a model reads pictures: side in pixels, mean and deviation of each of R, G, B in [0, 1], and what it sees.

    Raises ValueError for impossible numbers.
    """

    size_px: int
    mean: Triple
    deviation: Triple
    crop: Crop = field(default=WHOLE, repr=False)

    def __post_init__(self) -> None:
        if not 1 <= self.size_px <= 4_096:
            raise ValueError(f"pictures of {self.size_px} pixels a side")
        if not all(0 < value <= 1 for value in self.deviation) or not all(0 <= value <= 1 for value in self.mean):
            raise ValueError(f"pixels: mean {self.mean} and deviation {self.deviation}")

    def standardise(self, pictures_BHWC: Pictures) -> npt.NDArray[np.float32]:
        """Return float32 (B, 3, H, W), as the model reads it."""
        scale_C = 1 / (255 * np.array(self.deviation, np.float32))
        offset_C = np.array(self.mean, np.float32) / np.array(self.deviation, np.float32)
        standard_BHWC = pictures_BHWC.astype(np.float32) * scale_C - offset_C
        return np.ascontiguousarray(standard_BHWC.transpose(0, 3, 1, 2))


@dataclass(frozen=True)
class Columns:
    """The columns of an image set that hold the picture and its label; None takes a usual name."""

    image: str | None = None
    label: str | None = None

    def found(self, path: Path, names: Sequence[str]) -> tuple[str, str]:
        """Return both names. Raises ImageError naming the file if one of them is not there, or not plain."""
        image = _column(path, names, self.image, IMAGE_COLUMNS, "--image-column")
        return image, _column(path, names, self.label, LABEL_COLUMNS, "--label-column")


USUAL_COLUMNS: Final = Columns()


def _column(path: Path, names: Sequence[str], asked: str | None, usual: Sequence[str], option: str) -> str:
    fitting = [name for name in names if (name == asked if asked is not None else name in usual)]
    if len(fitting) != 1:
        needed = asked or " or ".join(usual)
        raise ImageError(f"{path.name}: columns {', '.join(names)}; needed is {needed}, or another by {option}")
    return fitting[0]


STATISTICS: Final[dict[str, tuple[Triple, Triple]]] = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
"""Mean and deviation that models are commonly trained with, by name."""


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """``pictures_NHWC`` are uint8 RGB squares of one size; ``labels_N`` are positions in a list of classes."""

    pictures_NHWC: Pictures
    labels_N: Labels

    def __len__(self) -> int:
        return len(self.labels_N)

    def digest(self) -> str:
        """Return the SHA-256 in hex over pictures and labels."""
        digest = hashlib.sha256(repr(self.pictures_NHWC.shape).encode())
        digest.update(np.ascontiguousarray(self.pictures_NHWC).data)
        digest.update(np.ascontiguousarray(self.labels_N).data)
        return digest.hexdigest()

    def only(self, positions_N: npt.NDArray[np.int64]) -> "LabelledImages":
        return LabelledImages(self.pictures_NHWC[positions_N], self.labels_N[positions_N])

    def spread(self, count: int) -> "LabelledImages":
        """Returns ``count`` pictures at equal distances, or all: the first ones of a file may be of one class."""
        return self.only(np.linspace(0, len(self) - 1, min(count, len(self))).round().astype(np.int64))


def decode_image(data: bytes, size_px: int, crop: Crop = WHOLE) -> Pictures:
    """Return a JPEG or PNG as a viewer shows it: uint8 RGB (size_px, size_px, 3), its centre square, resized.

    It is turned as its EXIF data asks. Transparent places are white. 16-bit grey is scaled to 8, and colours of an
    embedded profile (also of CMYK) are converted to sRGB. Of an animation the first picture is read.

    Raises ImageError for another format, an empty, broken or truncated file, and one over the bounds above. The bounds
    are checked before memory is taken for the pixels.
    """
    if len(data) > MAX_FILE_BYTES:
        raise ImageError(f"an image file of {len(data)} bytes; at most {MAX_FILE_BYTES} are read: shrink the picture")
    try:
        # Pillow reads no more than the header here.
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise Image.DecompressionBombError
            least_px = math.ceil(size_px / crop.share)
            image.draft("RGB", (least_px, least_px))  # a JPEG decodes at 1/2, 1/4 or 1/8 if that is still large enough
            image.load()
            turn = _orientation(image)
            profile = image.info.get("icc_profile")
            plain = _without_alpha(image)
            stored = np.asarray(plain)
    except Image.DecompressionBombError as error:  # Pillow's own bound is higher, but checked before ours
        raise ImageError(f"an image of over {MAX_PIXELS} pixels; it was not decoded: shrink the picture") from error
    except UnidentifiedImageError as error:
        raise ImageError(f"neither a JPEG nor a PNG file{_named(data)}, or its header is broken") from error
    except (OSError, SyntaxError, ValueError, EOFError, struct.error) as error:
        raise ImageError("a broken or truncated image") from error
    square = centre_square(_turned(stored, turn), size_px, crop)
    return np.asarray(_in_srgb(Image.fromarray(square, plain.mode), profile))


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 (upright) to 8; 1 if there is none or the EXIF data is broken."""
    try:
        turn = image.getexif().get(_ORIENTATION_TAG, 1)
    except (OSError, SyntaxError, ValueError, EOFError, KeyError, TypeError, struct.error):
        return 1
    return turn if turn in range(1, 9) else 1


def _turned(stored: Pictures, turn: int) -> Pictures:
    """Return pixels (H, W) or (H, W, C) turned and mirrored as an EXIF orientation asks (Exif 3.0, tag 274)."""
    if turn >= 5:  # rows and columns change places
        stored = stored.swapaxes(0, 1)
    down, right = _ORDERS[turn]
    return stored[::down, ::right]


def _without_alpha(image: Image.Image) -> Image.Image:
    """Return the picture in mode L, RGB or CMYK, its transparent places over white."""
    if image.mode.startswith("I"):  # 16 bits of grey
        grey_HW = np.asarray(image).astype(np.int64)
        return Image.fromarray(np.clip(grey_HW >> 8, 0, 255).astype(np.uint8), "L")
    if image.has_transparency_data:
        picture = image.convert("RGBA")
        white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, picture).convert("RGB")
    return image.copy() if image.mode in ("L", "RGB", "CMYK") else image.convert("RGB")


def _in_srgb(picture: Image.Image, profile: object) -> Image.Image:
    """Return the picture in RGB, converted from the colours of its profile if that is a sound one."""
    if isinstance(profile, bytes) and 0 < len(profile) <= _MAX_PROFILE_BYTES:
        try:
            converted = ImageCms.applyTransform(picture, _transform(profile, picture.mode))
        except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
            pass  # viewers ignore a broken profile, and one of another colour space
        else:
            return converted if converted is not None else picture.convert("RGB")
    return picture.convert("RGB")


@lru_cache(maxsize=16)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform:
    return ImageCms.buildTransform(
        ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB"), mode, "RGB"
    )


def _named(data: bytes) -> str:
    for kind, mark, offset in _OTHER_KINDS:
        if data[offset : offset + len(mark)] == mark:
            return f", but {kind}"
    return ""


def centre_square(picture_HWC: Pictures, size_px: int, crop: Crop = WHOLE) -> Pictures:
    """Return the square in the middle of uint8 (H, W) or (H, W, C), resized to ``size_px``: the largest, or its share.

    With an interpolation it equals resizing the picture's shorter side to floor(size_px / share) and cutting out the
    middle, which is how timm and torchvision prepare pictures, up to rounding and to the outermost pixels.
    """
    height, width = picture_HWC.shape[:2]
    side = min(height, width)
    if crop.interpolation is not None:
        short = math.floor(size_px / crop.share)
        resized = [short if length == side else int(short * length / side) for length in (width, height)]
        starts = [round((length - size_px) / 2) for length in resized]
        left, top = (start * length / of for start, length, of in zip(starts, (width, height), resized, strict=True))
        box = (left, top, left + size_px * width / resized[0], top + size_px * height / resized[1])
        picture = Image.fromarray(np.ascontiguousarray(picture_HWC), _MODES[picture_HWC.shape[2:]])
        return np.asarray(picture.resize((size_px, size_px), _RESAMPLING[crop.interpolation], box))
    side = max(1, round(side * crop.share))
    top, left = (height - side) // 2, (width - side) // 2
    square_HWC = picture_HWC[top : top + side, left : left + side]
    if side == size_px:
        return np.ascontiguousarray(square_HWC)
    way = cv2.INTER_AREA if side > size_px else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(np.ascontiguousarray(square_HWC), (size_px, size_px), interpolation=way), np.uint8)


def read_images(
    path: Path, size_px: int, *, limit: int | None = None, columns: Columns = USUAL_COLUMNS, crop: Crop = WHOLE
) -> LabelledImages:
    """Return the pictures of a set in their order, at most ``limit`` of them.

    ``path`` is a Parquet file, a folder of its shards, or a pattern such as ``data/train-*.parquet``.

    Raises ImageError naming the file for one that is missing, no Parquet file, without those columns, empty or over
    the bounds; the sets, if a folder holds several; and the row of a picture that cannot be decoded or has no label.
    """
    pictures: list[Pictures] = []
    labels: list[int] = []
    for shard, row, picture, label in _rows(path, columns):
        if limit is not None and len(labels) == limit:
            break
        if len(labels) == MAX_IMAGES:
            raise ImageError(f"{path.name}: over {MAX_IMAGES} pictures")
        if not isinstance(label, int) or label < 0:
            raise ImageError(f"{shard.name}, row {row}: its label is {label!r}; a number from 0 is needed")
        try:
            pictures.append(decode_image(_encoded(picture), size_px, crop))
        except ImageError as error:
            raise ImageError(f"{shard.name}, row {row}: {error}") from error
        labels.append(int(label))
    if not labels:
        raise ImageError(f"{path.name} holds no pictures")
    return LabelledImages(np.stack(pictures), np.array(labels, np.int64))


def read_encoded(path: Path, *, limit: int | None = None, columns: Columns = USUAL_COLUMNS) -> list[tuple[bytes, int]]:
    """Return the files of the pictures of a set, as they are stored, and their labels; at most ``limit`` of them.

    Raises ImageError like ``read_images``, but for pictures that cannot be decoded.
    """
    found: list[tuple[bytes, int]] = []
    for shard, row, picture, label in _rows(path, columns):
        if limit is not None and len(found) == limit:
            break
        if not isinstance(label, int) or label < 0:
            raise ImageError(f"{shard.name}, row {row}: its label is {label!r}; a number from 0 is needed")
        try:
            found.append((_encoded(picture), int(label)))
        except ImageError as error:
            raise ImageError(f"{shard.name}, row {row}: {error}") from error
    if not found:
        raise ImageError(f"{path.name} holds no pictures")
    return found


def _encoded(cell: object) -> bytes:
    """Return the encoded picture of a cell: the bytes themselves, or a struct's ``bytes``."""
    if isinstance(cell, dict):
        if not isinstance(cell.get("bytes"), bytes) and isinstance(cell.get("path"), str):
            raise ImageError(f"no picture, only the path {cell['path']}: the set must hold the pictures themselves")
        cell = cell.get("bytes")
    if not isinstance(cell, bytes):
        raise ImageError("no picture")
    return cell


def write_images(path: Path, labelled: LabelledImages) -> None:
    """Write a Parquet file that ``read_images`` reads: PNG, so that no pixel changes."""
    import pyarrow
    from pyarrow import parquet

    rows = []
    for picture_HWC, label in zip(labelled.pictures_NHWC, labelled.labels_N.tolist(), strict=True):
        out = io.BytesIO()
        Image.fromarray(picture_HWC).save(out, "PNG")
        rows.append({"image": {"bytes": out.getvalue(), "path": None}, "label": label})
    with replaced(path) as part:
        parquet.write_table(pyarrow.Table.from_pylist(rows), part)


def _rows(path: Path, columns: Columns) -> Iterator[tuple[Path, int, Any, Any]]:
    """Yield (file, row in it, image, label); few rows are in memory at a time."""
    import pyarrow
    from pyarrow import parquet

    for shard in _shards(path):
        try:
            reason = not_the_file(shard)
            if reason is not None:
                raise ImageError(f"{shard.name} {reason}")
            file = parquet.ParquetFile(shard)
            image, label = columns.found(shard, file.schema_arrow.names)
            row = 0
            for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE, columns=list({image, label})):
                for cells in zip(batch.column(image).to_pylist(), batch.column(label).to_pylist(), strict=True):
                    yield shard, row, *cells
                    row += 1
        except (pyarrow.ArrowException, OSError) as error:
            raise ImageError(f"{shard.name} is no Parquet file, or damaged") from error


def _shards(path: Path) -> list[Path]:
    """Return the files of a set in order. Raises ImageError if there are none, several sets, or a shard is missing."""
    if path.is_file():
        return [path]
    if path.is_dir():
        shards = sorted(file for file in path.rglob("*") if file.suffix.lower() == ".parquet")
        if not shards:
            raise ImageError(f"{path} holds no .parquet files")
        sets = sorted({_set_of(path, shard) for shard in shards})
        if len(sets) > 1:
            raise ImageError(f"{path} holds several sets: name one of {', '.join(sets)}")
    else:
        # A bracket in a name is only that.
        shards = sorted(path.parent.glob(path.name.replace("[", "[[]"))) if {"*", "?"} & set(path.name) else []
        if not shards:
            raise ImageError(f"there is no file {path}")
    totals = {int(found[2]) for shard in shards if (found := _SHARD.search(shard.stem))}
    for total in totals:
        numbers = {int(found[1]) for shard in shards if (found := _SHARD.search(shard.stem)) and int(found[2]) == total}
        if len(numbers) < total:
            raise ImageError(f"{path.name}: only {len(numbers)} of {total} shards are here")
    return shards


def _set_of(folder: Path, shard: Path) -> str:
    """Return the path or pattern that names the set of a shard: files that differ by their number belong together."""
    found = _SHARD.search(shard.stem)
    if found is not None:
        return str(folder / shard.relative_to(folder).parent / f"{shard.stem[: found.start()]}-*{shard.suffix}")
    numbered = shard.stem.isdigit() or shard.stem.startswith("part-")
    return str(shard.parent if numbered else shard)
