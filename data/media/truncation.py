"""Whether a media file ends where it should: FFmpeg reads FLV and WAV files that were cut off without a word."""

from pathlib import Path
from typing import BinaryIO, Final

_FLV_TAG_HEADER_BYTES: Final = 11
_FLV_BACK_POINTER_BYTES: Final = 4
_RIFF_LENGTH_UNKNOWN: Final = (0, 0xFFFFFFFF)
"""What a WAV header says when it was written before the sound's length was known."""


def is_cut_off(path: Path) -> bool:
    """Says whether the last part of a FLV or WAV file is incomplete, from its headers alone; bodies are skipped.

    Any other kind of file counts as whole: its decoder will say what is wrong with it.
    Raises OSError where the file cannot be read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(12)
        if start.startswith(b"FLV"):
            return len(start) < 9 or _flv_is_cut_off(file, int.from_bytes(start[5:9], "big"), size)
        if start.startswith(b"RIFF") and start[8:] == b"WAVE":
            return _wav_is_cut_off(file, size)
    return False


def _flv_is_cut_off(file: BinaryIO, header_bytes: int, size: int) -> bool:
    """Walks the tags (Adobe Flash Video File Format 10.1, annex E). The last back pointer may be missing."""
    position = header_bytes + _FLV_BACK_POINTER_BYTES
    while position < size:
        if size - position < _FLV_TAG_HEADER_BYTES:
            return True
        file.seek(position)
        tag = file.read(_FLV_TAG_HEADER_BYTES)
        body_end = position + _FLV_TAG_HEADER_BYTES + int.from_bytes(tag[1:4], "big")
        if body_end > size:
            return True
        position = body_end + _FLV_BACK_POINTER_BYTES
    return False


def _wav_is_cut_off(file: BinaryIO, size: int) -> bool:
    """Walks the chunks (RIFF WAVE) up to the one that holds the samples."""
    position = 12
    while position + 8 <= size:
        file.seek(position)
        chunk = file.read(8)
        length = int.from_bytes(chunk[4:8], "little")
        if chunk.startswith(b"data"):
            return length not in _RIFF_LENGTH_UNKNOWN and position + 8 + length > size
        position += 8 + length + length % 2
    return True
