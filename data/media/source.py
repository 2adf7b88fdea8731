"""Open a media file: which of its tracks are used, where their time begins, and why a file cannot be used."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Literal

import av
import av.error
from av.stream import Disposition

from isthmus.data.files import not_the_file
from isthmus.data.media.truncation import is_cut_off

MAX_PIXELS: Final = 50_000_000
"""A larger picture is refused before it is decoded."""
MISSING_SHARE: Final = 0.1
MISSING_S: Final = 0.25
"""A track is called truncated if it lacks more than both of these of the length that its header declares."""


class Unusable(Exception):
    """A file that cannot be used, with the reason. It becomes a ClipError once the clip's name is known."""


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Yield an input container. Every error of FFmpeg or of the file system inside becomes Unusable.

    Raises Unusable too if the file is empty, if it only stands in for another file, or if its end is cut off.
    """
    try:
        if path.stat().st_size == 0:
            raise Unusable(f"{path.name} is empty (zero bytes)")
        reason = not_the_file(path)
        if reason is not None:
            raise Unusable(f"{path.name} {reason}")
        if is_cut_off(path):
            raise Unusable(f"{path.name} is truncated: its last part is cut off")
        with av.open(str(path), metadata_errors="replace") as container:
            yield container
    except av.error.FFmpegError as error:
        raise Unusable(f"{path.name} is damaged or no media file: {error.strerror or error}") from error
    except OSError as error:
        raise Unusable(f"{path.name} cannot be read: {error.strerror or error}") from error


def track(container: Any, kind: Literal["audio", "video"]) -> Any | None:
    """Return the track that a player would choose, or None if there is none. A cover or thumbnail is no video."""
    stream = container.streams.best(kind)
    if stream is None or stream.codec_context is None:
        return None
    still = Disposition.attached_pic | Disposition.timed_thumbnails
    if kind == "video" and stream.disposition & still:
        moving = [other for other in container.streams.video if not other.disposition & still]
        return moving[0] if moving else None
    return stream


def origin_s(container: Any) -> float:
    """Return the time at which the file begins, in seconds: that of the first sound or picture, whichever is first.

    Events are counted from there, so that sound and picture stay together if one of them starts later.
    """
    tracks = (track(container, "audio"), track(container, "video"))
    starts = [float(one.start_time * one.time_base) for one in tracks if one is not None and one.start_time is not None]
    return min(starts, default=0.0)


class Whole:
    """Counts the packets of a track while they are read, to find out whether some of them are missing.

    An index (MP4) is compared by its entries. Otherwise, if the structure of the file says nothing about its end, the
    declared duration is compared.
    """

    def __init__(self, path: Path, container: Any, stream: Any):
        self._path = path
        self._stream = stream
        self._indexed = container.format.name.startswith("mov")
        self._declared_s = None if self._indexed or is_cut_off(path) is not None else _declared_s(stream)
        self._packets = 0
        self._first: int | None = None
        self._end = 0

    def add(self, packet: Any) -> None:
        """Count a packet, including one that is not to be shown."""
        self._packets += 1
        time = packet.dts if packet.pts is None else packet.pts
        if time is not None:
            self._first = time if self._first is None else min(self._first, time)
            self._end = max(self._end, time + (packet.duration or 0))

    def check(self, what: str, *, longest_s: float = 0.0) -> None:
        """Raise Unusable if the track lacks packets; ``longest_s`` is its length if another reader knows better."""
        if self._indexed:
            entries = len(getattr(self._stream, "index_entries", ()))  # older versions of PyAV have none
            if self._packets < (1 - MISSING_SHARE) * entries:
                raise Unusable(f"{self._path.name} is truncated: {self._packets} of {entries} parts of its {what}")
        elif self._declared_s is not None:
            span = 0 if self._first is None else self._end - self._first
            found_s = max(longest_s, float(span * self._stream.time_base))
            missing_s = self._declared_s - found_s
            if missing_s > MISSING_S and missing_s > MISSING_SHARE * self._declared_s:
                raise Unusable(f"{self._path.name} is truncated: {found_s:.2f} s of {self._declared_s:.2f} s of {what}")


def _declared_s(stream: Any) -> float | None:
    """Return the length that the file's header claims for a track, or None if it claims nothing."""
    return None if not stream.duration else float(stream.duration * stream.time_base)
