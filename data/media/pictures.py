"""The pictures of a media file: which of them are shown when, and the chosen ones as a viewer sees them."""

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import av
import av.error
import cv2
import numpy as np
import numpy.typing as npt

from isthmus.data.media.source import MAX_PIXELS, MISSING_SHARE, Unusable, Whole, opened, origin_s, track
from isthmus.data.transforms import InputSpec, stored_frame

Picture = npt.NDArray[np.uint8]

MAX_FRAMES: Final = 200_000
_WIDEST_PIXEL: Final = 8.0
"""A pixel aspect ratio beyond this, or below one part in it, is an error of the header and is ignored."""
_DISPLAY_MATRIX: Final = "DISPLAYMATRIX"


@dataclass(frozen=True)
class Shown:
    """The times at which pictures appear: ascending, distinct, in ticks of ``tick_s`` seconds.

    ``end`` is when the last picture goes; ``origin`` is when the file begins.
    """

    times: npt.NDArray[np.int64]
    end: int
    origin: float
    tick_s: float


def read_pictures(path: Path, spec: InputSpec, start_s: float | None, end_s: float | None) -> Picture:
    """Return the pictures shown in the middles of equal stretches of the event, in time order.

    uint8 (spec.frames_stored, stored_px, stored_px, 3), RGB, turned and stretched as the file asks. The event is the
    whole picture track if ``start_s`` and ``end_s`` are None; otherwise they count from the file's beginning
    (``source.origin_s``). A picture is shown until the next one comes, so one that stands for long counts for long.

    A first pass reads the times of all pictures without decoding, a second decodes and converts only the chosen ones.
    If a chosen one does not come out (hidden packets, fields, a start without its key picture), the times are taken
    from the pictures that do.

    Raises Unusable.
    """
    shown = _listed(path)
    if shown is not None:
        wanted = _chosen(path, shown, spec.frames_stored, start_s, end_s)
        pictures = _decoded(path, frozenset(wanted), spec)
        if len(pictures) == len(set(wanted)):
            return np.stack([pictures[time] for time in wanted])
    shown = _decodable(path)
    wanted = _chosen(path, shown, spec.frames_stored, start_s, end_s)
    pictures = _decoded(path, frozenset(wanted), spec)
    missing = len(set(wanted)) - len(pictures)
    if missing:
        raise Unusable(f"{path.name} is damaged: {missing} of {len(set(wanted))} pictures do not decode")
    return np.stack([pictures[time] for time in wanted])


def _chosen(path: Path, shown: Shown, count: int, start_s: float | None, end_s: float | None) -> list[int]:
    """Return the times of the pictures shown in the middles of ``count`` equal stretches of the event."""
    second = 1 / shown.tick_s
    low = float(shown.times[0]) if start_s is None else shown.origin + start_s * second
    high = float(shown.end) if end_s is None else min(shown.origin + end_s * second, float(shown.end))
    if low >= high:
        raise Unusable(f"{path.name} holds no picture between {start_s or 0:g} s and {end_s or 0:g} s")
    # Timestamps are rounded to ticks: a picture that is due at the middle itself may be stamped a tick later.
    step = (shown.end - float(shown.times[0])) / len(shown.times)
    middles = low + (np.arange(count) + 0.5) * (high - low) / count + min(2.0, step / 8)
    positions = np.maximum(np.searchsorted(shown.times, middles, side="right") - 1, 0)
    return [int(time) for time in shown.times[positions]]


def _opened_track(path: Path, container: Any) -> Any:
    stream = track(container, "video")
    if stream is None:
        raise Unusable(f"{path.name} holds no picture")
    context = stream.codec_context
    if context.width * context.height > MAX_PIXELS:
        raise Unusable(f"{path.name} has pictures of {context.width} x {context.height}: too large")
    context.options = {"max_pixels": str(MAX_PIXELS)}  # a stream may change its size on the way
    return stream


def _listed(path: Path) -> Shown | None:
    """Return the times as the packets give them, or None if some packets have no time of presentation."""
    times: dict[int, int] = {}
    with opened(path) as container:
        stream = _opened_track(path, container)
        whole = Whole(path, container, stream)
        for packet in container.demux(stream):
            if packet.dts is None and packet.pts is None:
                continue  # the mark of the end
            whole.add(packet)
            if packet.is_discard or not packet.size:
                continue
            if packet.pts is None:
                return None
            times[packet.pts] = packet.duration or 0
            _check_count(path, len(times))
        whole.check("picture")
        return _shown(path, container, stream, times)


def _decodable(path: Path) -> Shown:
    """Return the times of the pictures that come out of the decoder."""
    times: dict[int, int] = {}
    with opened(path) as container:
        stream = _opened_track(path, container)
        for frame in _frames(path, container, stream):
            times[frame.pts] = frame.duration or 0
            _check_count(path, len(times))
        return _shown(path, container, stream, times)


def _check_count(path: Path, count: int) -> None:
    if count > MAX_FRAMES:
        raise Unusable(f"{path.name} has more than {MAX_FRAMES} pictures: cut the clip first")


def _shown(path: Path, container: Any, stream: Any, duration_of: dict[int, int]) -> Shown:
    if not duration_of:
        raise Unusable(f"{path.name} holds no picture: its picture track is empty")
    times = np.array(sorted(duration_of), np.int64)
    last = int(times[-1])
    usual = np.median(np.diff(times)) if len(times) > 1 else 1.0
    end = last + (duration_of[last] or max(1, round(float(usual))))
    return Shown(times, end, origin_s(container) / float(stream.time_base), float(stream.time_base))


def _frames(path: Path, container: Any, stream: Any) -> Iterable[Any]:
    """Yield the pictures that decode and have a time. Raises Unusable at the end if too many packets are damaged."""
    packets = bad = 0
    for packet in container.demux(stream):
        packets += 1
        try:
            frames = packet.decode()
        except av.error.FFmpegError:
            bad += 1
            continue
        yield from (frame for frame in frames if frame.pts is not None)
    if bad > MISSING_SHARE * packets:
        raise Unusable(f"{path.name} is damaged: {bad} of {packets} pictures do not decode")


def _decoded(path: Path, wanted: frozenset[int], spec: InputSpec) -> dict[int, Picture]:
    """Return the wanted pictures by their time, prepared for the cache; those that do not come out are not there."""
    pictures: dict[int, Picture] = {}
    with opened(path) as container:
        stream = _opened_track(path, container)
        stream.thread_type = "NONE"
        for frame in _frames(path, container, stream):
            if frame.pts in wanted and frame.pts not in pictures:
                seen_HWC = upright(frame.to_ndarray(format="rgb24"), _pixel_aspect(stream), _matrix(frame))
                pictures[frame.pts] = stored_frame(seen_HWC, spec)
                if len(pictures) == len(wanted):
                    break
    return pictures


def _pixel_aspect(stream: Any) -> float:
    """Return the width of a pixel over its height; 1 if the file gives no sensible one."""
    ratio = stream.sample_aspect_ratio
    value = float(ratio) if ratio else 1.0
    return value if 1 / _WIDEST_PIXEL <= value <= _WIDEST_PIXEL else 1.0


def _matrix(frame: Any) -> tuple[int, int, int, int] | None:
    """Return (a, b, c, d) of the frame's display matrix, or None without one."""
    for one in frame.side_data:
        if one.type.name == _DISPLAY_MATRIX:
            values = struct.unpack("<9i", bytes(one)[:36])
            return values[0], values[1], values[3], values[4]
    return None


def upright(picture_HWC: Picture, aspect: float, matrix: tuple[int, int, int, int] | None) -> Picture:
    """Return a stored picture as a player shows it, uint8 (H', W', 3).

    ``aspect`` is a pixel's width over its height; the longer side is shrunk, so that pixels become square. ``matrix``
    (a, b, c, d) maps a stored place (x right, y down) to the shown one, x' = a x + c y and y' = b x + d y. Its turn is
    rounded to a quarter, and it may mirror; a matrix of zeros changes nothing.
    """
    height, width = picture_HWC.shape[:2]
    if abs(aspect - 1) > 0.01:
        size = (width, max(1, round(height / aspect))) if aspect > 1 else (max(1, round(width * aspect)), height)
        picture_HWC = np.asarray(cv2.resize(picture_HWC, size, interpolation=cv2.INTER_AREA), np.uint8)
    if matrix is None or not any(matrix):
        return picture_HWC
    a, b, c, d = matrix
    if abs(b) + abs(c) > abs(a) + abs(d):  # lying: rows become columns
        picture_HWC = picture_HWC.transpose(1, 0, 2)
        down, right = b, c
    else:
        down, right = d, a
    picture_HWC = picture_HWC[:: -1 if down < 0 else 1, :: -1 if right < 0 else 1]
    return np.ascontiguousarray(picture_HWC)
