"""A student's file as a patch against the same file of another student: a few bits per weight. No I/O.

Two ONNX files of one architecture have the same layout; only their weights differ. A patch lists spans of weights with
the coded difference of each weight, and the few other bytes that differ. Little endian:

    magic "ISP1" | coding u8 | 3 zero bytes | base SHA-256 | file size u64 | spans u32 | pieces u32 | body size u64
    body, compressed by zlib:
        for each span    offset u64 | values u32 | rows u32
        for each piece   offset u64 | length u32
        the spans' scales, float32, one per row (int8 only)
        the spans' differences, int8, float16 or bytes
        the pieces' bytes
    CRC-32 of everything before it, u32

In int8, row r (an output channel) of the difference d = target - base has scale_r = max |d| / levels. A weight becomes
base + q * scale with q = round(d / scale): two float32 operations, so every machine gets the same bytes. The result is
close to the target but not equal to it, so the publisher signs the hash of the *result*. Fewer levels cost accuracy and
save bytes, because the entropy coder needs fewer bits for smaller numbers.

Spans of int8 weights are coded in bytes: (target - base) mod 256, so the result is the target itself. Devices of 0.1.0
do not know this coding; they fetch the whole file after it.
"""

import hashlib
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final

import numpy as np
import numpy.typing as npt

from isthmus.proto.errors import Corrupt, InvalidInput
from isthmus.proto.limits import MAX_PATCH_PARTS, MAX_STUDENT_FILE_BYTES

_MAGIC: Final = b"ISP1"
_HEADER: Final = struct.Struct("<4sB3s32sQIIQ")
_SPAN: Final = np.dtype([("offset", "<u8"), ("values", "<u4"), ("rows", "<u4")])
_PIECE: Final = np.dtype([("offset", "<u8"), ("length", "<u4")])
_CRC: Final = struct.Struct("<I")
MOST_LEVELS: Final = 127


class Differences(Enum):
    """How a patch codes the differences of weights: the first two those of float32, ``BYTES`` those of int8."""

    INT8 = 1
    FP16 = 2
    BYTES = 3

    @property
    def coded_bytes(self) -> int:
        """Bytes of a coded difference."""
        return 2 if self is Differences.FP16 else 1

    @property
    def weight_bytes(self) -> int:
        """Bytes of a weight in the file."""
        return 1 if self is Differences.BYTES else 4


@dataclass(frozen=True)
class Span:
    """A run of ``values`` weights at ``offset_bytes``, in ``rows`` equal rows (output channels of a tensor)."""

    offset_bytes: int
    values: int
    rows: int = 1


def make_patch(
    base: bytes,
    target: bytes,
    spans: Sequence[Span],
    *,
    coding: Differences = Differences.INT8,
    levels: int = MOST_LEVELS,
) -> bytes:
    """Return the patch that turns ``base`` into ``target``: exactly outside the spans, within half a step inside.

    Inside, ``BYTES`` is exact, too. int8 differences range from ``-levels`` to ``levels`` (1 to 127). Raises
    InvalidInput for files of different size, spans outside the file or overlapping, or weights that are not finite.
    """
    if not 1 <= levels <= MOST_LEVELS:
        raise InvalidInput("patch: differences are coded in int8 with 1 to 127 levels, in fp16, or in bytes")
    if len(base) != len(target) or not 0 < len(base) <= MAX_STUDENT_FILE_BYTES:
        raise InvalidInput("patch: the two files do not have the same layout")
    ordered = sorted(spans, key=lambda span: span.offset_bytes)
    span_table = np.array([(span.offset_bytes, span.values, span.rows) for span in ordered], _SPAN)
    if not _in_order(span_table, np.zeros(0, _PIECE), len(base), coding):
        raise InvalidInput("patch: a span is outside the file or overlaps another")
    scales, differences = [], []
    for span in ordered:
        if coding is Differences.BYTES:
            differences.append((_bytes(target, span) - _bytes(base, span)).tobytes())
            continue
        difference_RV = _floats(target, span).astype(np.float64) - _floats(base, span)
        if not np.isfinite(difference_RV).all():
            raise InvalidInput("patch: a weight is not finite")
        scale_R, coded_RV = _code(difference_RV, coding, levels)
        scales.append(scale_R.tobytes())
        differences.append(coded_RV.tobytes())
    pieces = list(_pieces(base, target, ordered, coding))
    piece_table = np.array([(offset, length) for offset, length in pieces], _PIECE)
    if len(ordered) + len(pieces) > MAX_PATCH_PARTS:
        raise InvalidInput("patch: the two files differ in too many places")
    verbatim = [target[offset : offset + length] for offset, length in pieces]
    body = b"".join([span_table.tobytes(), piece_table.tobytes(), *scales, *differences, *verbatim])
    header = _HEADER.pack(
        _MAGIC,
        coding.value,
        bytes(3),
        hashlib.sha256(base).digest(),
        len(base),
        len(ordered),
        len(pieces),
        len(body),
    )
    # Coded differences do not repeat, but small numbers are frequent: Huffman codes alone are as small, and faster.
    packer = zlib.compressobj(9, zlib.DEFLATED, zlib.MAX_WBITS, 9, zlib.Z_HUFFMAN_ONLY)
    sealed = header + packer.compress(body) + packer.flush()
    return sealed + _CRC.pack(zlib.crc32(sealed))


def base_sha256(patch: bytes) -> bytes:
    """Return the SHA-256 of the file that the patch applies to. Raises Corrupt for an incomplete patch."""
    return _opened(patch)[1]


def coding_of(patch: bytes) -> Differences:
    """Return how the patch codes differences. Raises Corrupt for an incomplete patch."""
    return _opened(patch)[0]


def apply_patch(base: bytes, patch: bytes) -> bytes:
    """Return the patched ``base``: the same bytes on every machine.

    Raises Corrupt for a patch that was cut or changed, or that applies to another file. Sizes are checked before
    anything is unpacked.
    """
    coding, wanted, size_bytes, span_count, piece_count, body_bytes = _opened(patch)
    if len(base) != size_bytes or hashlib.sha256(base).digest() != wanted:
        raise Corrupt("patch: it applies to another file")
    body = _unpacked(patch, body_bytes)
    spans = np.frombuffer(body, _SPAN, span_count)
    pieces = np.frombuffer(body, _PIECE, piece_count, span_count * _SPAN.itemsize)
    position = span_count * _SPAN.itemsize + piece_count * _PIECE.itemsize
    scale_count = int(spans["rows"].sum(dtype=np.uint64)) if coding is Differences.INT8 else 0
    value_bytes = int(spans["values"].sum(dtype=np.uint64)) * coding.coded_bytes
    verbatim_bytes = int(pieces["length"].sum(dtype=np.uint64))
    if body_bytes != position + 4 * scale_count + value_bytes + verbatim_bytes:
        raise Corrupt("patch: its parts do not add up")
    if not _in_order(spans, pieces, size_bytes, coding):
        raise Corrupt("patch: a part is outside the file or overlaps another")
    scales = np.frombuffer(body, "<f4", scale_count, position)
    position += 4 * scale_count
    if not np.isfinite(scales).all():
        raise Corrupt("patch: a scale is not finite")
    made = bytearray(base)
    row = 0
    for offset, values, rows in spans.tolist():
        span = Span(offset, values, rows)
        if coding is Differences.BYTES:
            weights = _bytes(base, span) + np.frombuffer(body, np.uint8, values, position)
        elif coding is Differences.INT8:
            coded_RV = np.frombuffer(body, np.int8, values, position).reshape(rows, -1)
            difference_RV = coded_RV.astype(np.float32) * scales[row : row + rows, np.newaxis]
            weights = (_floats(base, span) + difference_RV).astype("<f4")
            row += rows
        else:
            difference_RV = np.frombuffer(body, "<f2", values, position).reshape(rows, -1).astype(np.float32)
            weights = (_floats(base, span) + difference_RV).astype("<f4")
        position += values * coding.coded_bytes
        made[offset : offset + values * coding.weight_bytes] = weights.tobytes()
    for offset, length in pieces.tolist():
        made[offset : offset + length] = body[position : position + length]
        position += length
    return bytes(made)


def _code(
    difference_RV: npt.NDArray[np.float64], coding: Differences, levels: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.generic]]:
    if coding is Differences.FP16:
        return np.zeros(0, np.float32), difference_RV.clip(-65_504, 65_504).astype("<f2")
    scale_R = (np.abs(difference_RV).max(axis=1) / levels).astype("<f4")
    if not np.isfinite(scale_R).all():
        raise InvalidInput("patch: a difference is too large for float32")
    divisor_R1 = np.where(scale_R > 0, scale_R, 1).astype(np.float64)[:, np.newaxis]
    return scale_R, np.rint(difference_RV / divisor_R1).clip(-levels, levels).astype(np.int8)


def _floats(content: bytes, span: Span) -> npt.NDArray[np.float32]:
    return np.frombuffer(content, "<f4", span.values, span.offset_bytes).reshape(span.rows, -1)


def _bytes(content: bytes, span: Span) -> npt.NDArray[np.uint8]:
    return np.frombuffer(content, np.uint8, span.values, span.offset_bytes)


def _in_order(spans: npt.NDArray[np.void], pieces: npt.NDArray[np.void], size_bytes: int, coding: Differences) -> bool:
    """Return whether spans and pieces are inside the file, not empty, each kind in order, and do not overlap."""
    if (spans["values"] == 0).any() or (spans["rows"] == 0).any() or (pieces["length"] == 0).any():
        return False
    if (spans["values"] % np.maximum(spans["rows"], 1) != 0).any():
        return False
    starts = np.concatenate([spans["offset"], pieces["offset"]])
    if (starts > size_bytes).any():
        return False
    span_bytes = coding.weight_bytes * spans["values"].astype(np.uint64)
    lengths = np.concatenate([span_bytes, pieces["length"].astype(np.uint64)])
    order = np.argsort(starts, kind="stable")
    starts, ends = starts[order], (starts + lengths)[order]
    return bool((ends <= size_bytes).all() and (starts[1:] >= ends[:-1]).all())


def _pieces(base: bytes, target: bytes, spans: Sequence[Span], coding: Differences) -> Iterator[tuple[int, int]]:
    """Yield (offset, length) of differing bytes outside the ordered spans; runs a few bytes apart become one."""
    start = 0
    ends = [(span.offset_bytes, span.offset_bytes + coding.weight_bytes * span.values) for span in spans]
    for end, after in [*ends, (len(base), len(base))]:
        one, other = (np.frombuffer(each, np.uint8, end - start, start) for each in (base, target))
        changed = np.flatnonzero(one != other)
        if len(changed):
            for run in np.split(changed, np.flatnonzero(np.diff(changed) > _PIECE.itemsize) + 1):
                yield start + int(run[0]), int(run[-1] - run[0]) + 1
        start = after


def _opened(patch: bytes) -> tuple[Differences, bytes, int, int, int, int]:
    if len(patch) < _HEADER.size + _CRC.size:
        raise Corrupt("patch: cut short")
    if zlib.crc32(patch[: -_CRC.size]) != _CRC.unpack(patch[-_CRC.size :])[0]:
        raise Corrupt("patch: the checksum does not match")
    magic, coding, zeros, sha256, size_bytes, spans, pieces, body_bytes = _HEADER.unpack_from(patch)
    if magic != _MAGIC or coding not in {each.value for each in Differences} or zeros != bytes(3):
        raise Corrupt("patch: not a patch of this version")
    tables = spans * _SPAN.itemsize + pieces * _PIECE.itemsize
    # A weight costs at most a scale and a difference: never more than 5 bytes for its 4.
    if (
        not 0 < size_bytes <= MAX_STUDENT_FILE_BYTES
        or spans + pieces > MAX_PATCH_PARTS
        or not tables <= body_bytes <= tables + 2 * size_bytes
    ):
        raise Corrupt("patch: its sizes are impossible")
    return Differences(coding), sha256, size_bytes, spans, pieces, body_bytes


def _unpacked(patch: bytes, body_bytes: int) -> bytes:
    unpacker = zlib.decompressobj()
    try:
        body = unpacker.decompress(patch[_HEADER.size : -_CRC.size], body_bytes + 1)
    except zlib.error as error:
        raise Corrupt("patch: its body does not unpack") from error
    if len(body) != body_bytes or not unpacker.eof or unpacker.unused_data:
        raise Corrupt("patch: its body does not have the stated size")
    return body
