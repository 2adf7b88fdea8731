"""A feature frame: one clip's compressed features as bytes. No I/O.

Layout, little-endian:

    offset  size  field
         0     4  magic "ISTF"
         4     1  version (1)
         5     1  number type: 0 fp32, 1 fp16, 2 int8
         6     2  compression ratio in thousandths
         8     2  width of the audio vector
        10     2  width of the visual vector
        12     8  int8 only: the two vectors' scales, float32
         -     -  audio values, then visual values
      last     4  CRC-32 of everything before it

Error of a value x, at most: fp32 0; fp16 ``max(|x| 2^-11, 2^-25)``; int8 ``scale / 2`` with ``scale`` the vector's
largest magnitude over 127. Every byte of a frame is covered by the checksum, so one changed byte is always noticed.
"""

import math
import struct
import zlib
from collections.abc import Collection
from typing import Final

import numpy as np
import numpy.typing as npt

from isthmus.proto.errors import BadFrame
from isthmus.proto.limits import MAX_FEATURE_WIDTH
from isthmus.proto.messages import FeatureFrame, Features, FloatArray, NumberType, compressed_width

MAGIC: Final = b"ISTF"
VERSION: Final = 1
_HEADER: Final = struct.Struct("<4sBBHHH")
_SCALES: Final = struct.Struct("<ff")
_CHECKSUM: Final = struct.Struct("<I")
_RATIO_UNIT: Final = 1_000
_INT8_LIMIT: Final = 127
_FLOAT32_LARGEST: Final = float(np.finfo(np.float32).max)
_CODES: Final = {NumberType.FP32: 0, NumberType.FP16: 1, NumberType.INT8: 2}
_NUMBER_TYPES: Final = {code: number_type for number_type, code in _CODES.items()}
_DTYPES: Final[dict[NumberType, npt.DTypeLike]] = {
    NumberType.FP32: np.dtype("<f4"),
    NumberType.FP16: np.dtype("<f2"),
    NumberType.INT8: np.dtype("i1"),
}
_VALUE_BYTES: Final = {NumberType.FP32: 4, NumberType.FP16: 2, NumberType.INT8: 1}


def frame_bytes(feature_width: int, ratio: float, number_type: NumberType) -> int:
    """Size in bytes of the frame of one clip, both modalities, before anything is packed."""
    return _frame_bytes(compressed_width(feature_width, ratio) * 2, number_type)


def pack_frame(frame: FeatureFrame) -> bytes:
    """The frame's bytes.

    Raises BadFrame for vectors that are not one-dimensional, are empty or too wide, hold NaN or infinity, or hold a
    value too large for the number type; and for a ratio that thousandths cannot hold.
    """
    ratio_fixed = _ratio_fixed(frame.ratio)
    audio_W = _checked("audio", frame.features.audio_D)
    visual_W = _checked("visual", frame.features.visual_D)
    header = _HEADER.pack(MAGIC, VERSION, _CODES[frame.number_type], ratio_fixed, audio_W.shape[0], visual_W.shape[0])
    scales = b""
    match frame.number_type:
        case NumberType.FP32 | NumberType.FP16:
            payload = _narrowed(audio_W, frame.number_type) + _narrowed(visual_W, frame.number_type)
        case NumberType.INT8:
            audio_scale, audio = _quantised(audio_W)
            visual_scale, visual = _quantised(visual_W)
            scales = _SCALES.pack(audio_scale, visual_scale)
            payload = audio + visual
    body = header + scales + payload
    return body + _CHECKSUM.pack(zlib.crc32(body))


def unpack_frame(data: bytes, *, feature_width: int, ratios: Collection[float]) -> FeatureFrame:
    """The frame that ``data`` holds. Features come back as float32, the ratio as the very member of ``ratios``.

    Raises BadFrame for anything but exactly one sound frame: wrong magic, version, number type or checksum, a ratio
    outside ``ratios``, a width other than ``compressed_width(feature_width, ratio)``, missing or trailing bytes, NaN
    or infinity. Nothing larger than ``data`` (times four, from int8) is allocated.
    """
    if len(data) < _HEADER.size + _CHECKSUM.size:
        raise BadFrame(f"frame of {len(data)} bytes is too short")
    magic, version, code, ratio_fixed, audio_width, visual_width = _HEADER.unpack_from(data)
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
    if audio_width != width or visual_width != width:
        raise BadFrame(f"widths {audio_width} and {visual_width} are wrong; ratio {ratio:g} gives {width}")
    expected = _frame_bytes(audio_width + visual_width, number_type)
    if len(data) != expected:
        raise BadFrame(f"frame of {len(data)} bytes; its header says {expected}")
    if zlib.crc32(data[: -_CHECKSUM.size]) != _CHECKSUM.unpack_from(data, len(data) - _CHECKSUM.size)[0]:
        raise BadFrame("checksum does not match")
    return FeatureFrame(_features(data, number_type, width), ratio, number_type)


def _frame_bytes(values: int, number_type: NumberType) -> int:
    scales = _SCALES.size if number_type is NumberType.INT8 else 0
    return _HEADER.size + scales + values * _VALUE_BYTES[number_type] + _CHECKSUM.size


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
    """Symmetric int8: the scale (float32, rounded up so that no value needs clipping) and the rounded quotients."""
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


def _features(data: bytes, number_type: NumberType, width: int) -> Features:
    offset = _HEADER.size
    scales = (1.0, 1.0)
    if number_type is NumberType.INT8:
        scales = _SCALES.unpack_from(data, offset)
        offset += _SCALES.size
        if not all(math.isfinite(scale) and scale >= 0 for scale in scales):
            raise BadFrame("scale is not a finite, positive number")
    values_2W = np.frombuffer(data, dtype=_DTYPES[number_type], count=2 * width, offset=offset).astype(np.float32)
    values_MW = values_2W.reshape(2, width)
    if number_type is NumberType.INT8:
        with np.errstate(over="ignore", invalid="ignore"):
            values_MW = values_MW * np.asarray(scales, dtype=np.float32)[:, np.newaxis]
    if not np.isfinite(values_MW).all():
        raise BadFrame("feature holds NaN or infinity")
    return Features(audio_D=values_MW[0], visual_D=values_MW[1])
