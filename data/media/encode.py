"""Write samples and frames as WAV, FLV and MP4, through PyAV. The same input gives the same bytes."""

import wave
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import av
import numpy as np
import numpy.typing as npt

from isthmus.data.files import replaced

FLV_SOUND_HZ: Final = 22_050
"""MP3 in Flash video has 11,025, 22,050 and 44,100 Hz only."""


def write_wav(path: Path, waveform_T: npt.NDArray[np.float32], rate_hz: int, *, durable: bool = False) -> None:
    """Write samples in [-1, 1] as mono 16-bit WAV. The file appears whole or not at all.

    ``durable``: it is on the disk when this returns.
    """
    with replaced(path, durable=durable) as part, part.open("wb") as raw, wave.open(raw, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate_hz)
        file.writeframes(_pcm16(waveform_T).tobytes())


def write_flv(
    path: Path, frames_KHWC: npt.NDArray[np.uint8], fps: int, waveform_T: npt.NDArray[np.float32], rate_hz: int
) -> None:
    """Write Flash video as in CREMA-D: FLV1 (Sorenson H.263) pictures with MP3 sound."""
    _write(path, frames_KHWC, fps, waveform_T, rate_hz, container="flv", codecs=("flv", "libmp3lame"))


def write_mp4(
    path: Path,
    frames_KHWC: npt.NDArray[np.uint8],
    fps: int,
    waveform_T: npt.NDArray[np.float32],
    rate_hz: int,
    *,
    durable: bool = False,
) -> None:
    """Write MPEG-4 pictures with AAC sound. ``durable``: the file is on the disk when this returns."""
    _write(path, frames_KHWC, fps, waveform_T, rate_hz, container="mp4", codecs=("mpeg4", "aac"), durable=durable)


def _write(
    path: Path,
    frames_KHWC: npt.NDArray[np.uint8],
    fps: int,
    waveform_T: npt.NDArray[np.float32],
    rate_hz: int,
    *,
    container: str,
    codecs: tuple[str, str],
    durable: bool = False,
) -> None:
    _, height, width, _ = frames_KHWC.shape
    sound_hz = FLV_SOUND_HZ if container == "flv" else rate_hz
    with (
        replaced(path, durable=durable) as part,
        av.open(str(part), "w", format=container, options={"fflags": "+bitexact"}) as output,
    ):
        picture: Any = output.add_stream(codecs[0], rate=fps)
        picture.width, picture.height, picture.pix_fmt = width, height, "yuv420p"
        picture.bit_rate = 6 * width * height * fps // 5
        picture.options = {"flags": "+bitexact"}
        picture.thread_count = 1
        sound: Any = output.add_stream(codecs[1], rate=sound_hz)
        sound.layout = "mono"
        sound.bit_rate = 48_000
        sound.options = {"flags": "+bitexact"}
        for packet in _interleaved(
            _picture_packets(picture, frames_KHWC), _sound_packets(sound, waveform_T, rate_hz, sound_hz)
        ):
            output.mux(packet)


def _picture_packets(stream: Any, frames_KHWC: npt.NDArray[np.uint8]) -> Iterator[Any]:
    for position, frame_HWC in enumerate(frames_KHWC):
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame_HWC), format="rgb24")
        frame.pts = position
        yield from stream.encode(frame)
    yield from stream.encode(None)


def _sound_packets(stream: Any, waveform_T: npt.NDArray[np.float32], rate_hz: int, sound_hz: int) -> Iterator[Any]:
    frame = av.AudioFrame.from_ndarray(_pcm16(waveform_T)[None], format="s16", layout="mono")
    frame.sample_rate = rate_hz
    frame.pts = 0
    resampler = av.AudioResampler(format="fltp", layout="mono", rate=sound_hz, frame_size=stream.frame_size or 1024)
    for resampled in [*resampler.resample(frame), *resampler.resample(None)]:
        yield from stream.encode(resampled)
    yield from stream.encode(None)


def _interleaved(first: Iterator[Any], second: Iterator[Any]) -> Sequence[Any]:
    """Return the packets of both tracks in order of time, as players need them."""
    packets = [*first, *second]
    return sorted(packets, key=lambda packet: float(packet.dts * packet.time_base))


def _pcm16(waveform_T: npt.NDArray[np.float32]) -> npt.NDArray[np.int16]:
    return np.round(np.clip(waveform_T, -1.0, 1.0) * 32_767).astype(np.int16)
