"""Sound and picture out of media files (WAV, FLV, MP4 and whatever else FFmpeg's libraries read), through PyAV.

PyAV's wheels carry the decoders, so no FFmpeg has to be installed on the machine.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import av
import av.error
import numpy as np
import numpy.typing as npt

from isthmus.data.clip import ClipError, ClipRef, DecodedClip
from isthmus.data.media.truncation import is_cut_off
from isthmus.data.transforms import InputSpec, evenly_spread, fitted, spectrogram, stored_frame

MAX_PIXELS: Final = 50_000_000
"""A larger picture is refused before it is decoded."""
MAX_FRAMES: Final = 200_000
MISSING_SHARE: Final = 0.1
MISSING_S: Final = 0.25
"""A track is called truncated when it lacks more than both of these of the length its header declares."""


class _Unusable(Exception):
    """Why a file cannot be used; becomes a ClipError as soon as the clip's name is known."""


def decode(ref: ClipRef, spec: InputSpec) -> DecodedClip:
    """Sound and picture of a clip, prepared as in ``transforms``.

    The event between ref.start_s and ref.end_s (the whole file where None) gives both: its sound tiled or cut to the
    spec's duration, and spec.frames_stored frames from the middles of as many equal stretches, in time order.
    A path that is None gives None: that was not captured. A file that is there must hold what it is there for.
    Raises ClipError naming the clip and the reason: missing, empty, truncated, damaged, without sound, without
    picture, or neither file.
    """
    with _naming(ref):
        if ref.audio_path is None and ref.video_path is None:
            raise _Unusable("it has neither a sound nor a video file")
        return DecodedClip(
            None if ref.audio_path is None else spectrogram(_sound_of(ref, spec), spec),
            None if ref.video_path is None else _pictures(ref.video_path, spec, ref.start_s, ref.end_s),
        )


def check_decodes(ref: ClipRef, spec: InputSpec) -> None:
    """Decode the clip as ``decode`` does, without computing its spectrogram.

    Raises ClipError for exactly the clips for which ``decode`` raises it, with the same reason.
    """
    with _naming(ref):
        if ref.audio_path is None and ref.video_path is None:
            raise _Unusable("it has neither a sound nor a video file")
        if ref.audio_path is not None:
            fitted(_sound_of(ref, spec), spec)
        if ref.video_path is not None:
            _pictures(ref.video_path, spec, ref.start_s, ref.end_s)


def decode_sound(ref: ClipRef, spec: InputSpec) -> npt.NDArray[np.float32]:
    """The clip's mono samples (T,) at the spec's rate, at most its duration; what ``decode``'s spectrogram is made of.

    Raises ClipError naming the clip and the reason.
    """
    with _naming(ref):
        return _sound_of(ref, spec)


@contextmanager
def _naming(ref: ClipRef) -> Iterator[None]:
    try:
        yield
    except (_Unusable, ValueError) as error:
        raise ClipError(ref.name, str(error)) from error


def _sound_of(ref: ClipRef, spec: InputSpec) -> npt.NDArray[np.float32]:
    if ref.audio_path is None:
        raise _Unusable("it has no sound file")
    return _sound(ref.audio_path, spec, ref.start_s or 0.0, ref.end_s)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """An input container. Every error of FFmpeg or the file system inside becomes _Unusable."""
    try:
        if path.stat().st_size == 0:
            raise _Unusable(f"{path.name} is empty (zero bytes)")
        if is_cut_off(path):
            raise _Unusable(f"{path.name} is truncated: its last part is cut off")
        with av.open(str(path)) as container:
            yield container
    except av.error.FFmpegError as error:
        raise _Unusable(f"{path.name} is damaged or no media file: {error.strerror or error}") from error
    except OSError as error:
        raise _Unusable(f"{path.name} cannot be read: {error.strerror or error}") from error


def _sound(path: Path, spec: InputSpec, start_s: float, end_s: float | None) -> npt.NDArray[np.float32]:
    """Mono samples at the spec's rate from start_s on, no more than the spec's duration (the rest would be cut)."""
    rate = spec.sample_rate_hz
    first = round(start_s * rate)
    stop = first + spec.samples
    if end_s is not None:
        stop = min(stop, round(end_s * rate))
    chunks: list[npt.NDArray[np.float32]] = []
    count = 0
    with _opened(path) as container:
        if not container.streams.audio:
            raise _Unusable(f"{path.name} holds no sound")
        stream = container.streams.audio[0]
        declared_s = _declared_s(stream)
        resampler = av.AudioResampler(format="flt", layout="mono", rate=rate)
        for frame in container.decode(stream):
            for resampled in resampler.resample(frame):
                chunks.append(resampled.to_ndarray()[0])
                count += resampled.samples
            if count >= stop:
                break
        else:
            if count:
                for resampled in resampler.resample(None):
                    chunks.append(resampled.to_ndarray()[0])
                    count += resampled.samples
    if count == 0:
        raise _Unusable(f"the sound of {path.name} has no samples")
    if declared_s is not None and count < stop:
        _check_whole(path, "sound", count / rate, min(declared_s, stop / rate))
    waveform_T = np.concatenate(chunks)[first:stop]
    if waveform_T.size == 0:
        raise _Unusable(f"{path.name} has no sound between {start_s:g} s and its end: it lasts {count / rate:.2f} s")
    return waveform_T


@dataclass(frozen=True)
class _Track:
    """Presentation times of a picture track, found without decoding it, in time order."""

    times: tuple[int, ...]
    second: float


def _pictures(path: Path, spec: InputSpec, start_s: float | None, end_s: float | None) -> npt.NDArray[np.uint8]:
    """Frames from the middles of equal stretches of the clip: uint8 (spec.frames_stored, stored_px, stored_px, 3).

    A first pass reads the times of all pictures without decoding, a second decodes and converts only the chosen.
    """
    track = _track(path)
    origin = track.times[0]
    inside = [
        time
        for time in track.times
        if (start_s is None or (time - origin) >= start_s * track.second)
        and (end_s is None or (time - origin) < end_s * track.second)
    ]
    if not inside:
        raise _Unusable(f"{path.name} holds no picture between {start_s or 0:g} s and {end_s or 0:g} s")
    wanted = [inside[position] for position in evenly_spread(spec.frames_stored, len(inside))]
    pictures = _decode_at(path, frozenset(wanted), spec)
    missing = len(set(wanted)) - len(pictures)
    if missing:
        raise _Unusable(f"{path.name} is damaged: {missing} of {len(set(wanted))} pictures do not decode")
    return np.stack([pictures[time] for time in wanted])


def _track(path: Path) -> _Track:
    with _opened(path) as container:
        if not container.streams.video:
            raise _Unusable(f"{path.name} holds no picture")
        stream = container.streams.video[0]
        context = stream.codec_context
        if context.width * context.height > MAX_PIXELS:
            raise _Unusable(f"{path.name} has pictures of {context.width} x {context.height}: too large")
        times: set[int] = set()
        for packet in container.demux(stream):
            if packet.pts is not None and packet.size:
                times.add(packet.pts)
            if len(times) > MAX_FRAMES:
                raise _Unusable(f"{path.name} has more than {MAX_FRAMES} pictures: cut the clip first")
        if not times:
            raise _Unusable(f"{path.name} holds no picture: its picture track is empty")
        ordered = tuple(sorted(times))
        second = float(1 / stream.time_base)
        if stream.frames:
            _check_count(path, len(ordered), stream.frames)
        declared_s = _declared_s(stream)
        if declared_s is not None:
            step = (ordered[-1] - ordered[0]) / max(1, len(ordered) - 1)
            _check_whole(path, "picture", (ordered[-1] - ordered[0] + step) / second, declared_s)
        return _Track(ordered, second)


def _decode_at(path: Path, wanted: frozenset[int], spec: InputSpec) -> dict[int, npt.NDArray[np.uint8]]:
    pictures: dict[int, npt.NDArray[np.uint8]] = {}
    with _opened(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        for frame in container.decode(stream):
            if frame.pts in wanted and frame.pts not in pictures:
                pictures[frame.pts] = stored_frame(frame.to_ndarray(format="rgb24"), spec)
                if len(pictures) == len(wanted):
                    break
    return pictures


def _declared_s(stream: Any) -> float | None:
    """The length the file's header claims for a track, or None where it claims nothing."""
    return None if not stream.duration else float(stream.duration * stream.time_base)


def _check_whole(path: Path, what: str, found_s: float, declared_s: float) -> None:
    missing_s = declared_s - found_s
    if missing_s > MISSING_S and missing_s > MISSING_SHARE * declared_s:
        raise _Unusable(f"{path.name} is truncated: {found_s:.2f} s of {declared_s:.2f} s of {what}")


def _check_count(path: Path, found: int, declared: int) -> None:
    if found < (1 - MISSING_SHARE) * declared:
        raise _Unusable(f"{path.name} is truncated: {found} of {declared} pictures")
