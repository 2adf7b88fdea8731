"""Pictures: decoded with bounds, prepared in one way, read from Parquet; and refusals."""

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
from PIL import Image, ImageCms
from pyarrow import parquet as parquet_files

from isthmus.data.images import (
    Columns,
    ImageError,
    LabelledImages,
    PixelSpec,
    centre_square,
    decode_image,
    read_images,
)

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
    over_white = rgba[..., :3] * (7 / 255) + 255 * (248 / 255)
    np.testing.assert_allclose(decode_image(encoded(rgba), 8), over_white, atol=1.0)


def gradient() -> Image.Image:
    """A smooth picture without any symmetry."""
    y, x = np.mgrid[:96, :96]
    return Image.fromarray(np.stack([2 * y, 2 * x, 190 - y], 2).astype(np.uint8))


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize(
    ("orientation", "stored_as"),
    [
        (1, None),
        (2, Image.Transpose.FLIP_LEFT_RIGHT),
        (3, Image.Transpose.ROTATE_180),
        (4, Image.Transpose.FLIP_TOP_BOTTOM),
        (5, Image.Transpose.TRANSPOSE),
        (6, Image.Transpose.ROTATE_90),
        (7, Image.Transpose.TRANSVERSE),
        (8, Image.Transpose.ROTATE_270),
        (9, None),  # not an orientation
    ],
)
def test_every_exif_orientation(kind: str, orientation: int, stored_as: Image.Transpose | None) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = gradient() if stored_as is None else gradient().transpose(stored_as)
    options = {"quality": 95} if kind == "JPEG" else {}
    turned = decode_image(saved(stored, kind, exif=exif, **options), 32)
    np.testing.assert_allclose(turned, decode_image(saved(gradient(), "PNG"), 32).astype(int), atol=8)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_broken_exif_data_is_ignored() -> None:
    data = saved(gradient(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f")
    assert decode_image(data, 32).shape == (32, 32, 3)


def test_storage_that_viewers_show_alike() -> None:
    plain = decode_image(saved(gradient(), "PNG"), 32).astype(int)
    more = [gradient(), Image.new("RGB", (96, 96), "red")]
    for data, off in (
        (saved(gradient().convert("CMYK"), "JPEG", quality=95), 8),
        (saved(gradient().quantize(256), "PNG"), 8),
        (saved(gradient(), "JPEG", quality=95, progressive=True), 8),
        (saved(more[0], "PNG", save_all=True, append_images=more[1:]), 0),
        (saved(more[0], "MPO", save_all=True, append_images=more[1:], quality=95), 8),
        (saved(gradient(), "PNG", icc_profile=b"no profile"), 0),
    ):
        np.testing.assert_allclose(decode_image(data, 32), plain, atol=off)
    grey = gradient().convert("L")
    shown = decode_image(saved(grey, "PNG"), 32).astype(int)
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    with_alpha = Image.merge("LA", [grey, Image.new("L", grey.size, 255)])
    for image in (deep, with_alpha):
        np.testing.assert_allclose(decode_image(saved(image, "PNG"), 32), shown, atol=1)


def test_transparent_places_are_white() -> None:
    picture = gradient()
    mask = Image.new("L", picture.size, 255)
    mask.paste(0, (0, 48, 96, 96))
    clear = picture.copy()
    clear.putalpha(mask)
    indexed = Image.new("P", (96, 96), 1)
    indexed.putpalette([0, 0, 0, 255, 0, 0])
    indexed.paste(0, (0, 48, 96, 96))
    keyed = Image.new("RGB", (96, 96), (255, 0, 0))
    keyed.paste((0, 0, 0), (0, 48, 96, 96))
    for data in (
        saved(clear, "PNG"),
        saved(indexed, "PNG", transparency=0),
        saved(keyed, "PNG", transparency=(0, 0, 0)),
    ):
        shown = decode_image(data, 32)
        assert shown[18:].min() == 255
        assert shown[:14].min() < 255


def test_colours_of_an_embedded_profile_are_converted() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    blue_first = profile.replace(b"rXYZ", b"????", 1).replace(b"bXYZ", b"rXYZ", 1).replace(b"????", b"bXYZ", 1)
    red = Image.new("RGB", (8, 8), (250, 10, 10))
    assert decode_image(saved(red, "PNG", icc_profile=profile), 8)[0, 0].tolist() == [250, 10, 10]
    shown = decode_image(saved(red, "PNG", icc_profile=blue_first), 8)[0, 0].astype(int)
    assert shown[2] > 200 and shown[0] < 60


@pytest.mark.parametrize(("kind", "named"), [("GIF", "GIF"), ("WEBP", "WebP"), ("TIFF", "TIFF"), ("BMP", "BMP")])
def test_other_formats_are_named(kind: str, named: str) -> None:
    with pytest.raises(ImageError, match=f"neither a JPEG nor a PNG file, but {named}"):
        decode_image(saved(gradient(), kind), 32)


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


@pytest.mark.parametrize("kind", [pyarrow.binary(), pyarrow.large_binary()])
def test_pictures_as_plain_bytes(tmp_path: Path, kind: pyarrow.DataType) -> None:
    pixels = noise(8, 8)
    table = pyarrow.table({"image": pyarrow.array([encoded(pixels)] * 2, kind), "label": [1, 0]})
    parquet_files.write_table(table, tmp_path / "plain.parquet")
    found = read_images(tmp_path / "plain.parquet", 8)
    assert np.array_equal(found.pictures_NHWC, [pixels, pixels]) and found.labels_N.tolist() == [1, 0]


def test_a_folder_of_shards_and_a_pattern(tmp_path: Path) -> None:
    pictures = [encoded(noise(8, 8)) for _ in range(3)]
    folder = tmp_path / "data"
    folder.mkdir()
    parquet(folder / "train-00001-of-00002.parquet", pictures[2:], [2])
    parquet(folder / "train-00000-of-00002.parquet", pictures[:2], [0, 1])
    for path in (tmp_path, folder, folder / "train-*.parquet"):
        assert read_images(path, 8).labels_N.tolist() == [0, 1, 2]
    parquet(folder / "test-00000-of-00001.parquet", pictures[:1], [7])
    with pytest.raises(ImageError, match=r"several sets: name one of .*test-\*\.parquet, .*train-\*\.parquet"):
        read_images(folder, 8)
    assert read_images(folder / "test-*.parquet", 8).labels_N.tolist() == [7]
    (folder / "train-00000-of-00002.parquet").unlink()
    with pytest.raises(ImageError, match="only 1 of 2 shards are here"):
        read_images(folder / "train-*.parquet", 8)
    (folder / "train-00000-of-00002.parquet").symlink_to("../../blobs/0123")
    with pytest.raises(ImageError, match=r"train-00000-of-00002\.parquet is no Parquet file, or damaged"):
        read_images(folder / "train-*.parquet", 8)


def test_separate_files_of_a_folder_are_separate_sets(tmp_path: Path) -> None:
    for name in ("train", "test"):
        parquet(tmp_path / f"{name}.parquet", [encoded(noise(8, 8))], [0])
    with pytest.raises(ImageError, match=r"several sets: name one of .*test\.parquet, .*train\.parquet"):
        read_images(tmp_path, 8)
    with pytest.raises(ImageError, match=r"holds no \.parquet files"):
        (tmp_path / "empty").mkdir()
        read_images(tmp_path / "empty", 8)


def test_columns_by_their_usual_names_and_by_option(tmp_path: Path) -> None:
    picture = [{"bytes": encoded(noise(8, 8)), "path": None}]
    path = tmp_path / "fine [old].parquet"
    parquet_files.write_table(
        pyarrow.table({"img": picture, "fine_label": [51], "coarse_label": [4], "name": ["x"]}), path
    )
    with pytest.raises(ImageError, match=r"img, fine_label, coarse_label, name; needed is label.*--label-column"):
        read_images(path, 8)
    assert read_images(path, 8, columns=Columns(label="fine_label")).labels_N.tolist() == [51]
    assert read_images(path, 8, columns=Columns("img", "coarse_label")).labels_N.tolist() == [4]
    with pytest.raises(ImageError, match="needed is photo, or another by --image-column"):
        read_images(path, 8, columns=Columns("photo", "fine_label"))
    with pytest.raises(ImageError, match="row 0: its label is 'x'"):
        read_images(path, 8, columns=Columns(label="name"))


def test_paths_and_pointers_in_place_of_pictures_are_named(tmp_path: Path) -> None:
    rows = {"image": [{"bytes": None, "path": "cat.jpg"}], "label": [0]}
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    table = pyarrow.table({"image": pyarrow.array(rows["image"], kind), "label": rows["label"]})
    parquet_files.write_table(table, tmp_path / "paths.parquet")
    with pytest.raises(ImageError, match=r"only the path cat\.jpg"):
        read_images(tmp_path / "paths.parquet", 8)
    (tmp_path / "pointer.parquet").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ImageError, match="git lfs pull"):
        read_images(tmp_path / "pointer.parquet", 8)


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
    with pytest.raises(ImageError, match=r"columns photo, label; needed is image or img, or another by --image-column"):
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


@pytest.mark.parametrize("count", [1, 2, 3, 7, 40, 41, 100])
def test_pictures_of_a_file_that_is_sorted_by_class_are_taken_from_all_of_it(count: int) -> None:
    labels_N = np.repeat(np.arange(4), 10)
    pictures = np.arange(40, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)
    some = LabelledImages(pictures, labels_N).spread(count)
    assert len(some) == min(count, 40)
    positions_N = some.pictures_NHWC[:, 0, 0, 0]
    assert len(set(positions_N)) == len(some) and list(positions_N) == sorted(positions_N)
    assert (some.labels_N == labels_N[positions_N]).all()
    if count >= 7:
        assert set(some.labels_N) == {0, 1, 2, 3}
