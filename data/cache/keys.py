"""Keys of the decoded cache: what was read and how it was prepared, never when or under which name."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from isthmus.data.clip import ClipRef
from isthmus.data.transforms import InputSpec

PREPARATION_VERSION: Final = 1
"""Raised whenever decoding or the transforms change what they give for the same file."""


class ContentHasher:
    """Hashes files, each once, however many clips are cut from it."""

    def __init__(self) -> None:
        self._digests: dict[Path, str] = {}

    def file(self, path: Path | None) -> str:
        """SHA-256 of a file's bytes in hex; of a missing or unreadable one, a mark that says so."""
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
        """Key of a clip's content: its sound, its picture, and the event cut out of them. Not its name or label."""
        parts = (self.file(ref.audio_path), self.file(ref.video_path), repr(ref.start_s), repr(ref.end_s))
        return digest(parts)


def digest(parts: Iterable[str]) -> str:
    """SHA-256 in hex over texts, none of which can run into the next."""
    total = hashlib.sha256()
    for part in parts:
        encoded = part.encode()
        total.update(len(encoded).to_bytes(8, "big"))
        total.update(encoded)
    return total.hexdigest()


def preparation(spec: InputSpec) -> str:
    """What a decoded clip depends on besides its content. ``frame_px`` and ``frames_used`` act after the cache."""
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
