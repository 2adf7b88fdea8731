"""A JSON file that holds a checksum of itself, written whole: a flipped bit is noticed and never read as a value."""

import json
import zlib
from pathlib import Path
from typing import Any, Final

from isthmus.data.files import write_atomically
from isthmus.proto.errors import Corrupt

_CHECKSUM: Final = "crc32"


def read_kept(path: Path) -> dict[str, Any] | None:
    """Return what the file holds, None if there is no file. Raises Corrupt with the way out."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, RecursionError, ValueError) as error:
        raise unreadable(path) from error
    if not isinstance(raw, dict):
        raise unreadable(path)
    # A file that was written before version 0.1.0 has no checksum.
    if _CHECKSUM in raw and raw.pop(_CHECKSUM) != _checksum(raw):
        raise unreadable(path)
    return raw


def write_kept(path: Path, content: dict[str, Any]) -> None:
    """Write the file for its owner alone. Raises what ``write_atomically`` raises."""
    write_atomically(path, json.dumps({**content, _CHECKSUM: _checksum(content)}), mode=0o600)


def unreadable(path: Path) -> Corrupt:
    """Return the error that names a damaged file and the way out."""
    return Corrupt(f"{path} cannot be read; move it away and run again")


def _checksum(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())
