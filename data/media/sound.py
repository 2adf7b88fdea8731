"""The sound of a media file as mono samples: the mean of all channels, at its place in time."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import av
import av.error
import numpy as np
import numpy.typing as npt

from isthmus.data.media.source import MISSING_SHARE, Unusable, Whole, opened, origin_s, track
from isthmus.data.transforms import InputSpec

Float32s = npt.NDArray[np.float32]

_GAP_S: Final = 0.1
"""A longer gap between two timestamps is silence; shorter ones are rounding of the timestamps."""


def read_sound(path: Path, spec: InputSpec, start_s: float | None, end_s: float | None) -> Float32s:
    """Return mono samples (T,) at the spec's rate from ``start_s`` on, at most the spec's duration.

    Channels are averaged: their mean cannot clip, and no channel is left out, whatever speakers the file names. Time
    is counted from the file's beginning (``source.origin_s``). A sound that starts later, and gaps inside it, are
    silence.

    Raises Unusable.
    """
    rate = spec.sample_rate_hz
    first = round((start_s or 0.0) * rate)
    stop = first + spec.samples
    if end_s is not None:
        stop = min(stop, round(end_s * rate))
    kept: list[Float32s] = []
    count = 0
    with opened(path) as container:
        stream = track(container, "audio")
        if stream is None:
            raise Unusable(f"{path.name} holds no sound")
        for samples_T in _at_rate(_timed(path, container, stream), rate):
            kept.append(samples_T[max(0, first - count) : max(0, stop - count)])
            count += len(samples_T)
            if count >= stop:
                break
    if count == 0:
        raise Unusable(f"the sound of {path.name} has no samples")
    waveform_T = np.concatenate(kept)
    if waveform_T.size == 0:
        raise Unusable(
            f"{path.name} has no sound between {start_s or 0:g} s and its end: it lasts {count / rate:.2f} s"
        )
    return waveform_T


def _timed(path: Path, container: Any, stream: Any) -> Iterator[tuple[Float32s, int]]:
    """Yield (mono samples, their rate) in order of time, with silence where the file has no sound.

    Raises Unusable at the end if the sound is truncated, or if too much of it does not decode.
    """
    whole = Whole(path, container, stream)
    due_s = origin_s(container)
    tolerance_s = 0.0  # the beginning is placed exactly
    parts = bad = 0
    for packet in container.demux(stream):
        if packet.size:
            whole.add(packet)
        parts += 1
        try:
            frames = packet.decode()
        except av.error.FFmpegError:
            bad += 1
            continue
        for frame in frames:
            if frame.samples == 0:
                continue
            time_s = due_s if frame.pts is None else float(frame.pts * frame.time_base)
            if time_s - due_s > tolerance_s:
                yield from _silence(time_s - due_s, frame.sample_rate)
                due_s = time_s
            tolerance_s = _GAP_S
            yield _mono(frame), frame.sample_rate
            due_s += frame.samples / frame.sample_rate
    if bad > MISSING_SHARE * parts:
        raise Unusable(f"{path.name} is damaged: {bad} of {parts} parts of its sound do not decode")
    whole.check("sound", longest_s=due_s - origin_s(container))


def _silence(length_s: float, rate: int) -> Iterator[tuple[Float32s, int]]:
    """Yield silence second by second, since a damaged timestamp may ask for years of it."""
    left = round(length_s * rate)
    while left > 0:
        piece = min(left, rate)
        yield np.zeros(piece, np.float32), rate
        left -= piece


def _mono(frame: Any) -> Float32s:
    """Return the mean of a frame's channels, as float32 with full scale at 1."""
    samples = frame.to_ndarray()
    if not frame.format.is_planar:
        samples = samples.reshape(-1, frame.layout.nb_channels).T
    mean_T = samples.mean(axis=0, dtype=np.float64)
    if samples.dtype.kind == "u":
        mean_T = (mean_T - 128) / 128
    elif samples.dtype.kind == "i":
        mean_T /= 2.0 ** (8 * samples.dtype.itemsize - 1)
    return np.asarray(mean_T, np.float32)


def _at_rate(pieces: Iterator[tuple[Float32s, int]], rate: int) -> Iterator[Float32s]:
    """Yield the samples at ``rate``. A file may change its own rate on the way."""
    resampler, before = None, rate
    for samples_T, own_rate in pieces:
        if own_rate != before and resampler is not None:
            yield from _resampled(resampler, None)
            resampler = None
        before = own_rate
        if own_rate == rate:
            yield samples_T
            continue
        if resampler is None:
            resampler = av.AudioResampler(format="flt", layout="mono", rate=rate)
        frame = av.AudioFrame.from_ndarray(samples_T[None], format="flt", layout="mono")
        frame.sample_rate = own_rate
        yield from _resampled(resampler, frame)
    if resampler is not None:
        yield from _resampled(resampler, None)


def _resampled(resampler: Any, frame: Any) -> Iterator[Float32s]:
    for resampled in resampler.resample(frame):
        yield resampled.to_ndarray()[0]
