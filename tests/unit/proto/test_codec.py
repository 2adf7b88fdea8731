"""The feature frame: sizes on the wire, and every way in which a frame can be wrong."""

import struct
import zlib

import numpy as np
import pytest

from isthmus.proto.codec import frame_bytes, pack_frame, unpack_frame
from isthmus.proto.errors import BadFrame
from isthmus.proto.messages import FeatureFrame, Features, NumberType

WIDTH = 12
RATIOS = (1.0, 1.5, 2.0)


def frame(ratio: float = 1.5, number_type: NumberType = NumberType.FP32, width: int = 8) -> bytes:
    rng = np.random.default_rng(0)
    features = Features(rng.standard_normal(width, np.float32), rng.standard_normal(width, np.float32))
    return pack_frame(FeatureFrame(features, ratio, number_type))


def resealed(body: bytes) -> bytes:
    """A frame with a right checksum over a wrong body."""
    return body + struct.pack("<I", zlib.crc32(body))


@pytest.mark.parametrize("number_type", NumberType)
def test_round_trip_keeps_ratio_and_number_type(number_type: NumberType) -> None:
    read = unpack_frame(frame(number_type=number_type), feature_width=WIDTH, ratios=RATIOS)
    assert (read.ratio, read.number_type) == (1.5, number_type)
    assert read.features.audio_D.dtype == np.float32
    assert read.features.visual_D.shape == (8,)


@pytest.mark.parametrize(
    ("ratio", "number_type", "expected"),
    [(1.0, NumberType.FP32, 4112), (1.0, NumberType.FP16, 2064), (3.0, NumberType.INT8, 364)],
)
def test_frame_size_at_the_papers_width(ratio: float, number_type: NumberType, expected: int) -> None:
    assert frame_bytes(512, ratio, number_type) == expected
    assert len(frame(ratio, number_type, int(512 / ratio))) == expected


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (slice(0, 1), b"X", "not a feature frame"),
        (slice(4, 5), b"\x01", "version 1 is unknown"),
        (slice(5, 6), b"\x09", "number type 9 is unknown"),
        (slice(6, 8), struct.pack("<H", 2500), "ratio 2.5 is unknown; this student has 1, 1.5, 2"),
        (slice(6, 8), struct.pack("<H", 2000), "width 8 is wrong; ratio 2 gives 6"),
        (slice(8, 10), struct.pack("<H", 7), "width 7 is wrong"),
        (slice(10, 11), b"\x00", "neither sound nor picture"),
        (slice(10, 11), b"\x07", "presence 0x7"),
        (slice(10, 11), b"\x01", "its header says"),
        (slice(11, 12), b"\x01", "the byte after it"),
    ],
)
def test_a_wrong_header_is_named_even_with_a_right_checksum(position: slice, value: bytes, message: str) -> None:
    body = bytearray(frame()[:-4])
    body[position] = value
    with pytest.raises(BadFrame, match=message):
        unpack_frame(resealed(bytes(body)), feature_width=WIDTH, ratios=RATIOS)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_undefined_numbers_are_refused_on_both_sides(value: float) -> None:
    body = bytearray(frame()[:-4])
    body[12:16] = struct.pack("<f", value)
    with pytest.raises(BadFrame, match="NaN or infinity"):
        unpack_frame(resealed(bytes(body)), feature_width=WIDTH, ratios=RATIOS)
    features = Features(np.full(8, value, np.float32), np.zeros(8, np.float32))
    with pytest.raises(BadFrame, match="NaN or infinity"):
        pack_frame(FeatureFrame(features, 1.5, NumberType.FP32))


@pytest.mark.parametrize("scale", [np.nan, np.inf, -1.0, 3e38])
def test_an_unsound_scale_is_refused(scale: float) -> None:
    body = bytearray(frame(number_type=NumberType.INT8)[:-4])
    body[12:16] = struct.pack("<f", scale)
    with pytest.raises(BadFrame, match=r"scale|NaN or infinity"):
        unpack_frame(resealed(bytes(body)), feature_width=WIDTH, ratios=RATIOS)


def test_missing_and_trailing_bytes_are_refused() -> None:
    whole = frame()
    for damaged in (whole[:-1], whole + b"\0", whole[:10], b"", resealed(whole[:-4] + b"\0\0\0\0")):
        with pytest.raises(BadFrame):
            unpack_frame(damaged, feature_width=WIDTH, ratios=RATIOS)


def test_a_wrong_checksum_is_refused() -> None:
    whole = frame()
    with pytest.raises(BadFrame, match="checksum"):
        unpack_frame(whole[:-1] + bytes([whole[-1] ^ 1]), feature_width=WIDTH, ratios=RATIOS)


def test_what_cannot_be_packed() -> None:
    fine = np.zeros(8, np.float32)
    with pytest.raises(BadFrame, match="too large for fp16"):
        pack_frame(FeatureFrame(Features(np.full(8, 1e6, np.float32), fine), 1.0, NumberType.FP16))
    with pytest.raises(BadFrame, match="too large for int8"):
        largest = np.full(8, np.finfo(np.float32).max)
        pack_frame(FeatureFrame(Features(largest, fine), 1.0, NumberType.INT8))
    with pytest.raises(BadFrame, match="one vector"):
        pack_frame(FeatureFrame(Features(np.zeros((2, 4), np.float32), fine), 1.0, NumberType.FP32))
    with pytest.raises(BadFrame, match="8 and 6 wide"):
        pack_frame(FeatureFrame(Features(fine, fine[:6]), 1.0, NumberType.FP32))
    with pytest.raises(ValueError, match="without sound and without picture"):
        Features(None, None)
    with pytest.raises(BadFrame, match="ratio"):
        pack_frame(FeatureFrame(Features(fine, fine), 0.5, NumberType.FP32))
