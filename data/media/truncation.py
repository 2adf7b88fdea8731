"""Whether a media file ends where it should: FFmpeg reads most files that were cut off without an error.

Only headers are read; bodies are skipped.
"""

from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Final

_SLACK_BYTES: Final = 64
"""Writers that count a header in declare a few bytes too many; nothing is missing then."""
_UNKNOWN_BYTES: Final = 0x7FFF_0000
"""A 32-bit size from here on (about 2 GB) is a placeholder of a writer that did not know the length."""
_FLV_TAG_HEADER_BYTES: Final = 11
_FLV_BACK_POINTER_BYTES: Final = 4
_W64_RIFF: Final = bytes.fromhex("726966662e91cf11a5d628db04c10000")
_W64_DATA: Final = bytes.fromhex("64617461f3acd3118cd100c04f8edb8a")
_EBML: Final = bytes.fromhex("1a45dfa3")
_SEGMENT: Final = bytes.fromhex("18538067")


def is_cut_off(path: Path) -> bool | None:
    """Return whether the last part of a FLV, WAV (also RF64 and Wave64), AVI, MP4 or Matroska file is missing.

    Returns None for any other kind of file and for a structure that is not understood: the decoder must judge it.
    Raises OSError if the file cannot be read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(16)
        for fits, walk in _KINDS:
            if fits(start):
                return walk(file, size)
    return None


def _flv(file: BinaryIO, size: int) -> bool:
    """Walk the tags (Adobe Flash Video File Format 10.1, annex E). The last back pointer may be missing."""
    if size < 9:
        return True
    file.seek(5)
    position = int.from_bytes(file.read(4), "big") + _FLV_BACK_POINTER_BYTES
    while position < size:
        file.seek(position)
        tag = file.read(_FLV_TAG_HEADER_BYTES)
        if not any(tag):
            return False  # zeros behind the last tag
        if len(tag) < _FLV_TAG_HEADER_BYTES:
            return True
        body_end = position + _FLV_TAG_HEADER_BYTES + int.from_bytes(tag[1:4], "big")
        if body_end > size:
            return True
        position = body_end + _FLV_BACK_POINTER_BYTES
    return False


def _wave(file: BinaryIO, size: int) -> bool | None:
    """Walk the chunks (RIFF WAVE; RF64 and BW64 with 64-bit sizes in ds64) up to the one that holds the samples.

    Nothing is missing if the file ends where its first size says, or if the samples' size counts the header in.
    """
    file.seek(0)
    order = "big" if file.read(4) == b"RIFX" else "little"
    ends_as_declared = int.from_bytes(file.read(4), order) + 8 == size  # type: ignore[arg-type]
    position, long_bytes = 12, 0
    while position + 8 <= size:
        file.seek(position)
        head = file.read(8)
        name, length = head[:4], int.from_bytes(head[4:], order)  # type: ignore[arg-type]
        if not name.isascii():
            return None
        if name == b"ds64":
            long_bytes = int.from_bytes(file.read(16)[8:], "little")
        if name == b"data":
            if length >= _UNKNOWN_BYTES:
                length = long_bytes if length == 0xFFFF_FFFF else 0
            if ends_as_declared or length >= 1 << 62:
                return False
            return length > size - position - 8 + max(_SLACK_BYTES, position + 8)
        position += 8 + length + length % 2
    return True


def _wave64(file: BinaryIO, size: int) -> bool | None:
    """Walk the chunks of Sony Wave64: 16 bytes of name, 8 of length with the header counted in, ends on 8 bytes."""
    position = 40
    while position + 24 <= size:
        file.seek(position)
        head = file.read(24)
        length = int.from_bytes(head[16:], "little")
        if head[:16] == _W64_DATA:
            return length < 1 << 62 and position + length > size + _SLACK_BYTES
        if length < 24:
            return None
        position += length + -length % 8
    return True


def _avi(file: BinaryIO, size: int) -> bool | None:
    """Compare the first RIFF chunk, and those of OpenDML behind it, with the size of the file."""
    position = 0
    while position + 12 <= size:
        file.seek(position)
        head = file.read(12)
        length = int.from_bytes(head[4:8], "little")
        if head[:4] != b"RIFF" or length == 0 or length >= _UNKNOWN_BYTES:
            return None if position == 0 else False
        position += 8 + length + length % 2
    return position > size + _SLACK_BYTES


def _mp4(file: BinaryIO, size: int) -> bool | None:
    """Walk the boxes of the top level (ISO/IEC 14496-12, section 4.2). A box of size 0 reaches to the end."""
    position = 0
    while position + 8 <= size:
        file.seek(position)
        head = file.read(16)
        length, name = int.from_bytes(head[:4], "big"), head[4:8]
        if length == 0 or not name.isalnum():
            return None if position == 0 else False  # what follows the last box is not the film's
        if length == 1:
            length = int.from_bytes(head[8:16], "big")
        if length < 8:
            return None
        position += length
    return position > size + _SLACK_BYTES


def _matroska(file: BinaryIO, size: int) -> bool | None:
    """Compare the segment with the size of the file (RFC 8794). One of unknown size reaches to the end."""
    file.seek(4)
    length, width = _ebml_size(file.read(8))
    if length is None:
        return None
    file.seek(4 + width + length)
    if file.read(4) != _SEGMENT:
        return None
    begins = 4 + width + length + 4
    length, width = _ebml_size(file.read(8))
    return None if length is None else begins + width + length > size + _SLACK_BYTES


def _ebml_size(data: bytes) -> tuple[int | None, int]:
    """Return (value, width in bytes) of a variable-length integer; None for one whose bits are all 1: unknown."""
    if not data or data[0] == 0:
        return None, 0
    width = 9 - data[0].bit_length()
    value = int.from_bytes(data[:width], "big") & ((1 << 7 * width) - 1)
    return (None if value == (1 << 7 * width) - 1 else value), width


_KINDS: Final[tuple[tuple[Callable[[bytes], bool], Callable[[BinaryIO, int], bool | None]], ...]] = (
    (lambda start: start[:3] == b"FLV", _flv),
    (lambda start: start[:4] in (b"RIFF", b"RIFX", b"RF64", b"BW64") and start[8:12] == b"WAVE", _wave),
    (lambda start: start[:4] == b"RIFF" and start[8:12] == b"AVI ", _avi),
    (lambda start: start == _W64_RIFF, _wave64),
    (lambda start: start[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot"), _mp4),
    (lambda start: start[:4] == _EBML, _matroska),
)
