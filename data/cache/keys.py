"""Keys of the decoded cache. They depend on the content and its preparation, not on time or name."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from isthmus.data.clip import ClipRef
from isthmus.data.transforms import InputSpec

PREPARATION_VERSION: Final = 2
"""Increased whenever decoding or the transforms change their result for the same file."""


class ContentHasher:
    """Hashes each file once, however many clips are cut from it."""

    def __init__(self) -> None:
        self._digests: dict[Path, str] = {}

    def file(self, path: Path | None) -> str:
        """Return the SHA-256 of a file's bytes in hex; for a missing or unreadable file, a mark that says so."""
        if path is None:
            return "none"
        if path not in self._digests:
            try:
                with path.open("rb") as file:
                    self._digests[path] = hashlib.file_digest(file, "sha256").hexdigest()
            except OSError as error:
                self._digests[path] = f"unreadable {error.errno}"
        return self._digests[path]

    def clip(self, ref: ClipRef) -> str:
        """Return the key of a clip's content: its sound, its picture, and the event cut from them, but not its name or
        label.
        """
        parts = (self.file(ref.audio_path), self.file(ref.video_path), repr(ref.start_s), repr(ref.end_s))
        return digest(parts)


def digest(parts: Iterable[str]) -> str:
    """Return the SHA-256 in hex over texts, so that texts split at other places give another hash."""
    total = hashlib.sha256()
    for part in parts:
        encoded = part.encode()
        total.update(len(encoded).to_bytes(8, "big"))
        total.update(encoded)
    return total.hexdigest()


def preparation(spec: InputSpec) -> str:
    """Return the part of the key besides content. ``frame_px`` and ``frames_used`` act after the cache, so they are not
    in it.
    """
    cached = (
        spec.sample_rate_hz,
        spec.duration_s,
        spec.window,
        spec.hop,
        spec.spectrogram_bins,
        spec.spectrogram_columns,
        spec.stored_px,
        spec.frames_stored,
    )
    return digest([str(PREPARATION_VERSION), *(repr(float(value)) for value in cached)])
