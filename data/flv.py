"""Whether a Flash video ends where it should: FFmpeg reads a cut file without a word."""

from pathlib import Path
from typing import Final

_SIGNATURE: Final = b"FLV"
_TAG_HEADER_BYTES: Final = 11
_BACK_POINTER_BYTES: Final = 4


def flv_is_whole(path: Path) -> bool:
    """Walks the file's tags (Adobe Flash Video File Format 10.1, annex E) and says whether the last one is complete.

    Reads 15 bytes a tag and skips its body. A missing final back pointer, which some writers leave out, is forgiven.
    Another kind of file counts as whole: the decoder will say what is wrong with it.
    Raises OSError where the file cannot be read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        header = file.read(9)
        if not header.startswith(_SIGNATURE):
            return True
        if len(header) < 9:
            return False
        position = int.from_bytes(header[5:9], "big") + _BACK_POINTER_BYTES
        while position < size:
            if size - position < _TAG_HEADER_BYTES:
                return False
            file.seek(position)
            tag = file.read(_TAG_HEADER_BYTES)
            body_end = position + _TAG_HEADER_BYTES + int.from_bytes(tag[1:4], "big")
            if body_end > size:
                return False
            position = body_end + _BACK_POINTER_BYTES
    return True
