"""Media files that are valid but unusual, written with PyAV and by hand."""

import struct
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt

SIDE = 64


def grey(level: int) -> npt.NDArray[np.uint8]:
    return np.full((SIDE, SIDE, 3), level, np.uint8)


def quarters() -> npt.NDArray[np.uint8]:
    """Return a picture whose quarters are red, green, blue and white, row by row."""
    picture_HWC = np.zeros((SIDE, SIDE, 3), np.uint8)
    half = SIDE // 2
    picture_HWC[:half, :half, 0] = picture_HWC[:half, half:, 1] = picture_HWC[half:, :half, 2] = 255
    picture_HWC[half:, half:] = 255
    return picture_HWC


def tone(seconds: float, rate: int, hz: float = 440.0) -> npt.NDArray[np.float32]:
    return (0.5 * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def write_film(
    path: Path,
    pictures: Sequence[npt.NDArray[np.uint8]],
    *,
    times_ms: Sequence[int] | None = None,
    last_ms: int = 40,
    fps: int = 25,
    codec: str = "libx264",
    container: str = "mp4",
    options: Mapping[str, str] | None = None,
    pixel_aspect: Fraction | None = None,
    sound: npt.NDArray[np.float32] | None = None,
    sound_starts_s: float = 0.0,
    muxing: Mapping[str, str] | None = None,
) -> None:
    """Write pictures at their times (without times: at ``fps``) and 44.1 kHz sound. The last lasts ``last_ms``."""
    times_ms = [1000 * k // fps for k in range(len(pictures))] if times_ms is None else times_ms
    ends_ms = dict(zip(times_ms, [*times_ms[1:], times_ms[-1] + last_ms], strict=True))
    with av.open(str(path), "w", format=container, options=dict(muxing or {})) as out:
        film: Any = out.add_stream(codec, rate=fps)
        film.width, film.height, film.pix_fmt = SIDE, SIDE, "yuv420p"
        film.options = dict(options or {})
        film.codec_context.time_base = Fraction(1, 1000)
        if pixel_aspect is not None:
            film.codec_context.sample_aspect_ratio = pixel_aspect
        track: Any = None if sound is None else out.add_stream("aac", rate=44_100)
        if track is not None:
            track.layout = "mono"
        packets = []
        for picture_HWC, time_ms in zip(pictures, times_ms, strict=True):
            frame = av.VideoFrame.from_ndarray(picture_HWC, format="rgb24")
            frame.pts, frame.time_base = time_ms, Fraction(1, 1000)
            packets += film.encode(frame)
        packets += film.encode(None)
        for packet in packets:
            begins_ms = round(float(packet.pts * packet.time_base) * 1000)
            packet.duration = round((ends_ms[begins_ms] - begins_ms) / 1000 / packet.time_base)
        if track is not None and sound is not None:
            frame = av.AudioFrame.from_ndarray(np.round(sound * 32767).astype("<i2")[None], format="s16", layout="mono")
            frame.sample_rate, frame.pts = 44_100, 0
            resampler = av.AudioResampler(format="fltp", layout="mono", rate=44_100, frame_size=1024)
            heard = [p for f in [*resampler.resample(frame), *resampler.resample(None)] for p in track.encode(f)]
            heard += track.encode(None)
            for packet in heard:
                packet.pts += round(sound_starts_s * 44_100)
                packet.dts += round(sound_starts_s * 44_100)
            packets += heard
        for packet in sorted(packets, key=lambda packet: float(packet.dts * packet.time_base)):
            out.mux(packet)


def copied_from(source: Path, target: Path, start_s: float) -> None:
    """Cut without coding: copy packets from the key picture before ``start_s`` on. Times count from ``start_s``."""
    with av.open(str(source)) as given, av.open(str(target), "w", format="mp4") as out:
        tracks = {stream.index: out.add_stream_from_template(stream) for stream in given.streams}
        packets = [packet for packet in given.demux() if packet.dts is not None]
        key_s = max(
            float(packet.pts * packet.time_base)
            for packet in packets
            if packet.stream.type == "video" and packet.is_keyframe and packet.pts * packet.time_base <= start_s
        )
        kept = [
            packet
            for packet in packets
            if packet.pts * packet.time_base >= (key_s if packet.stream.type == "video" else start_s)
        ]
        for packet in sorted(kept, key=lambda packet: float(packet.dts * packet.time_base)):
            shift = round(start_s / packet.time_base)
            packet.pts -= shift
            packet.dts -= shift
            packet.stream = tracks[packet.stream.index]
            out.mux(packet)


def set_display_matrix(path: Path, a: int, b: int, c: int, d: int) -> None:
    """Give the first track of an MP4 file a display matrix (ISO/IEC 14496-12, section 8.3.2), in whole turns."""
    content = bytearray(path.read_bytes())
    plain = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    place = content.index(plain, content.index(b"tkhd"))
    content[place : place + 36] = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    path.write_bytes(content)


def riff(
    samples: bytes,
    *,
    rate: int = 16_000,
    channels: int = 1,
    bits: int = 16,
    kind: int = 1,
    extensible: tuple[int, int] | None = None,
    before: bytes = b"",
    declared: int | None = None,
    whole: int | None = None,
) -> bytes:
    """Return a RIFF WAVE file. ``extensible`` is (channel mask, kind); ``declared`` and ``whole`` are its two sizes."""
    block = channels * bits // 8
    head = struct.pack("<HHIIHH", 0xFFFE if extensible else kind, channels, rate, rate * block, block, bits)
    if extensible:
        guid = struct.pack("<H", extensible[1]) + bytes.fromhex("000000001000800000aa00389b71")
        head += struct.pack("<HHI", 22, bits, extensible[0]) + guid
    body = b"fmt " + struct.pack("<I", len(head)) + head + before + b"data"
    body += struct.pack("<I", len(samples) if declared is None else declared) + samples
    return b"RIFF" + struct.pack("<I", 4 + len(body) if whole is None else whole) + b"WAVE" + body


def rf64(samples: bytes, rate: int = 16_000) -> bytes:
    """Return mono 16-bit RF64 (EBU Tech 3306): the sizes are in ds64, the 32-bit ones are placeholders."""
    plain = riff(samples, rate=rate)
    sizes = b"ds64" + struct.pack("<IQQQI", 28, len(plain) + 28, len(samples), len(samples) // 2, 0)
    return b"RF64\xff\xff\xff\xffWAVE" + sizes + plain[12:36] + b"data\xff\xff\xff\xff" + samples


def pcm16(samples_T: npt.NDArray[np.float32]) -> bytes:
    return np.round(np.clip(samples_T, -1, 1) * 32767).astype("<i2").tobytes()
