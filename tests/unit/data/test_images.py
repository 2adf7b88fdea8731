"""Pictures: decoded with bounds, prepared in one way, read from Parquet; and what is refused."""

import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet as parquet_files

from isthmus.data.images import ImageError, PixelSpec, centre_square, decode_image, read_images

RNG = np.random.default_rng(0)


def encoded(pixels: npt.NDArray[np.uint8], kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


def noise(height: int, width: int) -> npt.NDArray[np.uint8]:
    return RNG.integers(0, 256, (height, width, 3), np.uint8)


def png_of(width: int, height: int) -> bytes:
    """A PNG whose header says this size, and whose pixels are missing."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [
        struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (header, b"IDAT" + bytes(9))
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def parquet(path: Path, pictures: list[bytes | None], labels: list[int | None], image: str = "image") -> Path:
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    rows = pyarrow.array([{"bytes": picture, "path": None} for picture in pictures], kind)
    parquet_files.write_table(pyarrow.table({image: rows, "label": pyarrow.array(labels, pyarrow.int64())}), path)
    return path


def test_a_png_of_the_right_size_is_read_as_it_is() -> None:
    pixels = noise(32, 32)
    assert np.array_equal(decode_image(encoded(pixels), 32), pixels)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("shape", [(400, 300), (20, 50)])
def test_the_centre_square_is_resized(kind: str, shape: tuple[int, int]) -> None:
    pixels = np.zeros((*shape, 3), np.uint8)
    pixels[:, shape[1] // 2 :] = 255
    picture = decode_image(encoded(pixels, kind), 32)
    assert picture.shape == (32, 32, 3) and picture.dtype == np.uint8
    assert picture[:, :12].max() < 20 and picture[:, 20:].min() > 235


def test_grey_and_transparent_pictures_become_rgb() -> None:
    assert decode_image(encoded(noise(8, 8)[..., 0]), 8).shape == (8, 8, 3)
    rgba = np.concatenate([noise(8, 8), np.full((8, 8, 1), 7, np.uint8)], axis=2)
    assert np.array_equal(decode_image(encoded(rgba), 8), rgba[..., :3])


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "neither a JPEG nor a PNG"),
        (b"no picture at all", "neither a JPEG nor a PNG"),
        (encoded(noise(16, 16), "GIF"), "neither a JPEG nor a PNG"),
        (encoded(noise(64, 64), "JPEG")[:900], "broken or truncated"),
        (encoded(noise(64, 64))[:900], "broken or truncated"),
        (png_of(20_000, 20_000), "over 64000000 pixels"),
        (png_of(8_001, 8_000), "over 64000000 pixels"),
        (png_of(64, 64), "broken or truncated"),
    ],
)
def test_what_cannot_be_used_is_refused(data: bytes, why: str) -> None:
    with pytest.raises(ImageError, match=why):
        decode_image(data, 32)


def test_a_file_over_the_bound_is_refused_unread() -> None:
    with pytest.raises(ImageError, match="at most"):
        decode_image(bytes((32 << 20) + 1), 32)


def test_pixels_are_standardised_by_channel() -> None:
    spec = PixelSpec(4, (0.5, 0.25, 0.0), (0.5, 0.25, 1.0))
    pictures = np.zeros((2, 4, 4, 3), np.uint8)
    pictures[1] = 255
    standard_BCHW = spec.standardise(pictures)
    assert standard_BCHW.dtype == np.float32 and standard_BCHW.flags.c_contiguous
    np.testing.assert_allclose(standard_BCHW[:, :, 2, 3], [[-1, -1, 0], [1, 3, 1]], atol=1e-6)
    with pytest.raises(ValueError, match="deviation"):
        PixelSpec(4, (0.5, 0.5, 0.5), (0.5, 0.0, 0.5))


def test_a_set_is_read_in_order(tmp_path: Path) -> None:
    pictures = [noise(16, 24) for _ in range(5)]
    path = parquet(tmp_path / "a.parquet", [encoded(picture) for picture in pictures], [3, 1, 4, 1, 5])
    found = read_images(path, 16)
    assert found.labels_N.tolist() == [3, 1, 4, 1, 5]
    assert np.array_equal(found.pictures_NHWC, [centre_square(picture, 16) for picture in pictures])
    assert len(read_images(path, 16, limit=2)) == 2
    assert found.only(np.array([4, 0])).labels_N.tolist() == [5, 3]


def test_sets_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    good = encoded(noise(8, 8))
    bad: dict[str, tuple[list[Any], list[Any], str]] = {
        "broken": ([good, good[:70]], [0, 1], "row 1: a broken"),
        "unlabelled": ([good], [None], "row 0: its label"),
        "negative": ([good], [-1], "row 0: its label"),
        "pictureless": ([None], [1], "row 0: no picture"),
    }
    for name, (pictures, labels, why) in bad.items():
        with pytest.raises(ImageError, match=rf"{name}\.parquet, {why}"):
            read_images(parquet(tmp_path / f"{name}.parquet", pictures, labels), 8)
    with pytest.raises(ImageError, match="needed are image and label"):
        read_images(parquet(tmp_path / "columns.parquet", [good], [0], image="photo"), 8)
    with pytest.raises(ImageError, match="there is no file"):
        read_images(tmp_path / "missing.parquet", 8)
    (tmp_path / "text.parquet").write_text("no parquet", encoding="utf-8")
    with pytest.raises(ImageError, match="no Parquet file, or damaged"):
        read_images(tmp_path / "text.parquet", 8)


def test_cifar10() -> None:
    folder = os.environ.get("ISTHMUS_CIFAR10")
    if not folder:
        pytest.skip("set ISTHMUS_CIFAR10 to the folder with CIFAR-10's train.parquet and test.parquet")
    found = read_images(Path(folder) / "test.parquet", 32)
    assert found.pictures_NHWC.shape == (5_000, 32, 32, 3)
    assert np.bincount(found.labels_N).tolist() == [500] * 10
