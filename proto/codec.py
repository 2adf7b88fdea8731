"""The feature frame: one clip's compressed features as bytes. No I/O.

Layout, little-endian:

    offset  size  field
         0     4  magic "ISTF"
         4     1  version (2)
         5     1  number type: 0 fp32, 1 fp16, 2 int8
         6     2  compression ratio in thousandths
         8     2  width of a vector
        10     1  presence: bit 0 the audio vector, bit 1 the visual vector; at least one
        11     1  zero
        12     -  int8 only: the scale of each vector in the frame, float32
         -     -  audio values if present, then visual values if present
      last     4  CRC-32 of everything before it

The largest error of a value x is 0 in fp32, ``max(|x| 2^-11, 2^-25)`` in fp16, and ``scale / 2`` in int8, where
``scale`` is the vector's largest magnitude over 127. The checksum covers every byte, so one changed byte is always
noticed.
"""

import math
import struct
import zlib
from collections.abc import Collection
from contextlib import nullcontext
from functools import lru_cache
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from isthmus.proto.errors import BadFrame
from isthmus.proto.limits import MAX_FEATURE_WIDTH
from isthmus.proto.messages import Captured, FeatureFrame, Features, FloatArray, NumberType, compressed_width

MAGIC: Final = b"ISTF"
VERSION: Final = 2
_HEADER: Final = struct.Struct("<4sBBHHBB")
_SCALE: Final = struct.Struct("<f")
_AUDIO: Final = 1
_VISUAL: Final = 2
_CAPTURED: Final = {_AUDIO: Captured.SOUND, _VISUAL: Captured.PICTURE, _AUDIO | _VISUAL: Captured.BOTH}
_CHECKSUM: Final = struct.Struct("<I")
_RATIO_UNIT: Final = 1_000
_INT8_LIMIT: Final = 127
_FLOAT32_LARGEST: Final = float(np.finfo(np.float32).max)
_LARGEST_SAFE_SCALE: Final = _FLOAT32_LARGEST / 256
_CODES: Final = {NumberType.FP32: 0, NumberType.FP16: 1, NumberType.INT8: 2}
_NUMBER_TYPES: Final = {code: number_type for number_type, code in _CODES.items()}
_DTYPES: Final[dict[NumberType, npt.DTypeLike]] = {
    NumberType.FP32: np.dtype("<f4"),
    NumberType.FP16: np.dtype("<f2"),
    NumberType.INT8: np.dtype("i1"),
}
_VALUE_BYTES: Final = {NumberType.FP32: 4, NumberType.FP16: 2, NumberType.INT8: 1}


def frame_bytes(feature_width: int, ratio: float, number_type: NumberType, *, vectors: int = 2) -> int:
    """Return the size in bytes of one clip's frame, with both modalities or ``vectors`` of them. Nothing is packed."""
    return _frame_bytes(compressed_width(feature_width, ratio), vectors, number_type)


def pack_frame(frame: FeatureFrame) -> bytes:
    """Return the frame's bytes. A modality that was not captured takes no bytes.

    Raises BadFrame for vectors that are not one-dimensional, are empty or too wide, differ in width, contain NaN or
    infinity, or contain a value too large for the number type. It also raises it for a ratio outside 1 to 65.535.
    """
    ratio_fixed = _ratio_fixed(frame.ratio)
    present = 0
    vectors: list[FloatArray] = []
    for bit, modality, values_W in (
        (_AUDIO, "audio", frame.features.audio_D),
        (_VISUAL, "visual", frame.features.visual_D),
    ):
        if values_W is not None:
            vectors.append(_checked(modality, values_W))
            present |= bit
    width = vectors[0].shape[0]
    if vectors[-1].shape[0] != width:
        raise BadFrame(f"audio and visual features are {width} and {vectors[-1].shape[0]} wide: one ratio gives one")
    header = _HEADER.pack(MAGIC, VERSION, _CODES[frame.number_type], ratio_fixed, width, present, 0)
    match frame.number_type:
        case NumberType.FP32 | NumberType.FP16:
            payload = b"".join(_narrowed(values_W, frame.number_type) for values_W in vectors)
        case NumberType.INT8:
            scaled = [_quantised(values_W) for values_W in vectors]
            payload = b"".join([*(_SCALE.pack(scale) for scale, _ in scaled), *(values for _, values in scaled)])
    body = header + payload
    return body + _CHECKSUM.pack(zlib.crc32(body))


class Values(NamedTuple):
    """What a frame holds: the vectors of its modalities one after the other, sound first, and how they were sent."""

    values_F: FloatArray
    captured: Captured
    ratio: float
    number_type: NumberType


def unpack_frame(data: bytes, *, feature_width: int, ratios: Collection[float]) -> FeatureFrame:
    """Return the frame in ``data``, with float32 features and the ratio as the member of ``ratios``.

    Raises BadFrame as ``unpack_values`` does, and for NaN or infinity.
    """
    values_F, captured, ratio, number_type = unpack_values(data, feature_width=feature_width, ratios=ratios)
    check_values(values_F)
    width = compressed_width(feature_width, ratio)
    audio_D = None if captured is Captured.PICTURE else values_F[:width]
    visual_D = None if captured is Captured.SOUND else values_F[-width:]
    return FeatureFrame(Features(audio_D, visual_D), ratio, number_type)


def unpack_values(data: bytes, *, feature_width: int, ratios: Collection[float]) -> Values:
    """Return what the frame in ``data`` holds, as float32, with the ratio as the member of ``ratios``.

    The values may be NaN or infinite: use ``check_values``, or check what you compute of them.

    Raises BadFrame for anything but exactly one sound frame: wrong magic, version, number type or checksum, a ratio
    outside ``ratios``, a width other than ``compressed_width(feature_width, ratio)``, no modality or an unknown one,
    missing or trailing bytes. Allocates at most four times the size of ``data`` (int8 to float32).
    """
    if len(data) < _HEADER.size + _CHECKSUM.size:
        raise BadFrame(f"frame of {len(data)} bytes is too short")
    number_type, ratio, width, captured, vectors, size = _layout(data[: _HEADER.size], feature_width, tuple(ratios))
    if len(data) != size:
        raise BadFrame(f"frame of {len(data)} bytes; its header says {size}")
    if zlib.crc32(memoryview(data)[: -_CHECKSUM.size]) != _CHECKSUM.unpack_from(data, size - _CHECKSUM.size)[0]:
        raise BadFrame("checksum does not match")
    if number_type is NumberType.INT8:
        return Values(_scaled(data, width, vectors), captured, ratio, number_type)
    values_F = np.frombuffer(data, _DTYPES[number_type], vectors * width, _HEADER.size).astype(np.float32)
    return Values(values_F, captured, ratio, number_type)


def check_values(values_F: FloatArray) -> None:
    """Raise BadFrame for NaN or infinity."""
    if not np.isfinite(values_F).all():
        raise BadFrame("feature holds NaN or infinity")


@lru_cache(maxsize=1024)
def _layout(
    header: bytes, feature_width: int, ratios: tuple[float, ...]
) -> tuple[NumberType, float, int, Captured, int, int]:
    """Return number type, ratio, width, modalities, number of vectors and size of a frame. Raises BadFrame.

    The frames of a stream have few different headers, so most calls find theirs in the cache.
    """
    magic, version, code, ratio_fixed, given_width, present, zero = _HEADER.unpack(header)
    if magic != MAGIC:
        raise BadFrame("not a feature frame")
    if version != VERSION:
        raise BadFrame(f"frame version {version} is unknown; this side reads version {VERSION}")
    number_type = _NUMBER_TYPES.get(code)
    if number_type is None:
        raise BadFrame(f"number type {code} is unknown")
    known = {_ratio_fixed(ratio): ratio for ratio in ratios}
    if ratio_fixed not in known:
        offered = ", ".join(f"{ratio:g}" for ratio in sorted(known.values()))
        raise BadFrame(f"ratio {ratio_fixed / _RATIO_UNIT:g} is unknown; this student has {offered}")
    ratio = known[ratio_fixed]
    width = compressed_width(feature_width, ratio)
    if given_width != width:
        raise BadFrame(f"width {given_width} is wrong; ratio {ratio:g} gives {width}")
    if present == 0:
        raise BadFrame("the frame has neither sound nor picture: there is nothing to answer")
    captured = _CAPTURED.get(present)
    if captured is None or zero != 0:
        raise BadFrame(f"presence {present:#x} or the byte after it ({zero:#x}) is unknown")
    vectors = present.bit_count()
    return number_type, ratio, width, captured, vectors, _frame_bytes(width, vectors, number_type)


def _frame_bytes(width: int, vectors: int, number_type: NumberType) -> int:
    scale = _SCALE.size if number_type is NumberType.INT8 else 0
    return _HEADER.size + vectors * (scale + width * _VALUE_BYTES[number_type]) + _CHECKSUM.size


def _ratio_fixed(ratio: float) -> int:
    if not math.isfinite(ratio) or not 1 <= ratio < (1 << 16) / _RATIO_UNIT:
        raise BadFrame(f"ratio {ratio!r} is not between 1 and 65.535")
    return round(ratio * _RATIO_UNIT)


def _checked(modality: str, values_W: FloatArray) -> FloatArray:
    if values_W.ndim != 1 or not 1 <= values_W.shape[0] <= MAX_FEATURE_WIDTH:
        raise BadFrame(f"{modality} feature of shape {values_W.shape}; wanted one vector of 1 to {MAX_FEATURE_WIDTH}")
    with np.errstate(over="ignore"):
        values_W = values_W.astype(np.float32, copy=False)
    if not np.isfinite(values_W).all():
        raise BadFrame(f"{modality} feature holds NaN or infinity")
    return values_W


def _narrowed(values_W: FloatArray, number_type: NumberType) -> bytes:
    with np.errstate(over="ignore"):
        narrow_W = values_W.astype(_DTYPES[number_type])
    if not np.isfinite(narrow_W).all():
        raise BadFrame(f"feature holds a value too large for {number_type.value}")
    return narrow_W.tobytes()


def _quantised(values_W: FloatArray) -> tuple[float, bytes]:
    """Return the float32 scale, rounded up so that no value is clipped, and the rounded int8 quotients."""
    largest = float(np.abs(values_W).max())
    scale = np.float32(largest / _INT8_LIMIT)
    if float(scale) * _INT8_LIMIT < largest:
        scale = np.nextafter(scale, np.float32(np.inf))
    if float(scale) * _INT8_LIMIT > _FLOAT32_LARGEST:
        raise BadFrame(f"feature holds a value too large for {NumberType.INT8.value}")
    if scale == 0:
        return 0.0, bytes(values_W.shape[0])
    quotients_W = np.rint(values_W.astype(np.float64) / float(scale))
    return float(scale), quotients_W.astype(np.int8).tobytes()


def _scaled(data: bytes, width: int, vectors: int) -> FloatArray:
    """Return the values of an int8 frame, each vector times its scale. Raises BadFrame for a scale that is none."""
    offset = _HEADER.size + vectors * _SCALE.size
    values_F = np.frombuffer(data, np.int8, vectors * width, offset).astype(np.float32)
    for vector in range(vectors):
        (scale,) = _SCALE.unpack_from(data, _HEADER.size + _SCALE.size * vector)
        if not 0 <= scale < math.inf:
            raise BadFrame("scale is not a finite, positive number")
        with np.errstate(over="ignore") if scale > _LARGEST_SAFE_SCALE else nullcontext():
            values_F[vector * width : (vector + 1) * width] *= scale
    return values_F
