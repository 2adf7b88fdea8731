"""Decoding real WAV, FLV and MP4 files: times, order, and every kind of unusable file."""

from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
import pytest

from isthmus.data.clip import ClipError, ClipRef
from isthmus.data.media.decode import check_decodes, decode
from isthmus.data.media.encode import write_flv, write_mp4, write_wav
from isthmus.data.media.truncation import is_cut_off
from isthmus.data.transforms import InputSpec, spectrogram

SPEC = InputSpec(spectrogram_bins=64, spectrogram_columns=64, stored_px=32, frame_px=32)
RATE = 16_000
FPS = 10


def _brightening(count: int) -> npt.NDArray[np.uint8]:
    """Return frames: frame k has grey level 5 k, and is white left and right of the centre square."""
    frames_KHWC = np.full((count, 64, 96, 3), 255, np.uint8)
    frames_KHWC[:, :, 16:80] = (5 * np.arange(count, dtype=np.uint8))[:, None, None, None]
    return frames_KHWC


def _rising(duration_s: float) -> npt.NDArray[np.float32]:
    """Return a whistle that rises by 500 Hz per second, so that its pitch shows the time."""
    time_T = np.arange(round(duration_s * RATE)) / RATE
    return (0.5 * np.sin(2 * np.pi * (200 * time_T + 250 * time_T**2))).astype(np.float32)


def _clip(root: Path, seconds: int = 3) -> ClipRef:
    write_wav(root / "c.wav", _rising(seconds), RATE)
    write_flv(root / "c.flv", _brightening(seconds * FPS), FPS, _rising(seconds), RATE)
    return ClipRef("c", root / "c.wav", root / "c.flv", 0, None)


def _levels(frames_KHWC: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    return np.asarray(frames_KHWC.mean(axis=(1, 2, 3)) / 5, np.float64)


def test_wav_and_flv(tmp_path: Path) -> None:
    decoded = decode(_clip(tmp_path), SPEC)
    np.testing.assert_allclose(decoded.spectrogram_FT, spectrogram(_rising(3), SPEC), atol=0.02)
    assert decoded.frames_KHWC.shape == (10, 32, 32, 3)
    assert decoded.frames_KHWC.dtype == np.uint8
    # The centre square, one frame from the middle of each tenth of the clip, in time order.
    np.testing.assert_allclose(_levels(decoded.frames_KHWC), np.arange(1, 30, 3), atol=1.2)


def test_mp4_event_cuts_sound_and_picture(tmp_path: Path) -> None:
    path = tmp_path / "v.mp4"
    write_mp4(path, _brightening(50), FPS, _rising(5), RATE)
    decoded = decode(ClipRef("v", path, path, 0, None, 2.0, 4.0), SPEC)
    np.testing.assert_allclose(_levels(decoded.frames_KHWC), np.arange(21, 40, 2), atol=1.2)
    # Between 2 s and 4 s the whistle goes from 1,200 to 2,200 Hz; then the two seconds repeat.
    bin_hz = 8_000 / 64
    pitch_T = decoded.spectrogram_FT.argmax(axis=0) * bin_hz
    assert 1_100 < pitch_T[1] < 1_450
    assert 1_900 < pitch_T[41] < 2_300
    assert 1_100 < pitch_T[45] < 1_500


def test_reordered_pictures_come_out_in_time_order(tmp_path: Path) -> None:
    path = tmp_path / "b.mp4"
    with av.open(str(path), "w") as output:
        stream = output.add_stream("mpeg4", rate=FPS)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 96, 64, "yuv420p", 500_000
        stream.codec_context.max_b_frames = 2
        for position, picture_HWC in enumerate(_brightening(30)):
            frame = av.VideoFrame.from_ndarray(picture_HWC, format="rgb24")
            frame.pts = position
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    with av.open(str(path)) as reopened:
        stamps = [packet.pts for packet in reopened.demux(video=0) if packet.pts is not None]
    assert stamps != sorted(stamps)  # the file itself is out of order
    write_wav(tmp_path / "b.wav", _rising(3), RATE)
    levels = _levels(decode(ClipRef("b", tmp_path / "b.wav", path, 0, None), SPEC).frames_KHWC)
    assert (np.diff(levels) > 1).all()


def test_fewer_pictures_than_asked_repeat_in_order(tmp_path: Path) -> None:
    clip = _clip(tmp_path)
    write_flv(tmp_path / "c.flv", _brightening(4), FPS, _rising(1), RATE)
    levels = _levels(decode(clip, SPEC).frames_KHWC)
    assert (np.diff(np.round(levels)) >= 0).all()
    assert len(set(np.round(levels))) == 4


def test_stereo_at_another_rate_becomes_mono_at_the_specs(tmp_path: Path) -> None:
    clip = _clip(tmp_path)
    time_T = np.arange(44_100 * 3) / 44_100
    tone_T = np.round(10_000 * np.sin(2 * np.pi * 1_000 * time_T)).astype(np.int16)
    with av.open(str(tmp_path / "c.wav"), "w") as output:
        stream = output.add_stream("pcm_s16le", rate=44_100, layout="stereo")
        frame = av.AudioFrame.from_ndarray(np.stack([tone_T, tone_T], 1).reshape(1, -1), format="s16", layout="stereo")
        frame.sample_rate = 44_100
        output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    spec = replace(SPEC, spectrogram_bins=257, spectrogram_columns=299)
    spectrogram_FT = decode(clip, spec).spectrogram_FT
    assert set(spectrogram_FT[:, 2:-2].argmax(axis=0)) == {32}  # 1,000 Hz at 31.25 Hz per bin


def _refused(clip: ClipRef, match: str) -> None:
    """Check that ``decode`` and ``check_decodes`` refuse the clip for the same reason."""
    with pytest.raises(ClipError, match=match) as decoded:
        decode(clip, SPEC)
    with pytest.raises(ClipError) as checked:
        check_decodes(clip, SPEC)
    assert str(checked.value) == str(decoded.value)


def _truncated(path: Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


@pytest.mark.parametrize("share", [0.001, 0.02, 0.5, 0.99])
def test_truncated_flv(tmp_path: Path, share: float) -> None:
    clip = _clip(tmp_path)
    assert not is_cut_off(tmp_path / "c.flv")
    _truncated(tmp_path / "c.flv", share)
    _refused(clip, r"c: c\.flv is truncated")


@pytest.mark.parametrize("share", [0.0005, 0.6, 0.999])
def test_truncated_wav(tmp_path: Path, share: float) -> None:
    clip = _clip(tmp_path)
    assert not is_cut_off(tmp_path / "c.wav")
    _truncated(tmp_path / "c.wav", share)
    _refused(clip, r"c: c\.wav is truncated")


def test_truncated_mp4_with_its_index_at_either_end(tmp_path: Path) -> None:
    path, streamed = tmp_path / "v.mp4", tmp_path / "s.mp4"
    write_mp4(path, _brightening(50), FPS, _rising(5), RATE)
    with av.open(str(path)) as source, av.open(str(streamed), "w", options={"movflags": "faststart"}) as output:
        tracks = {stream.index: output.add_stream_from_template(stream) for stream in source.streams}
        for packet in source.demux():
            if packet.dts is not None:
                packet.stream = tracks[packet.stream.index]
                output.mux(packet)
    assert decode(ClipRef("s", streamed, streamed, 0, None), SPEC).frames_KHWC.shape == (10, 32, 32, 3)
    _truncated(path, 0.6)
    _truncated(streamed, 0.6)
    _refused(ClipRef("v", path, path, 0, None), r"v\.mp4 is truncated")
    _refused(ClipRef("s", streamed, streamed, 0, None), r"s\.mp4 is truncated")


def test_wav_of_zero_bytes_and_of_zero_samples(tmp_path: Path) -> None:
    clip = _clip(tmp_path)
    (tmp_path / "c.wav").write_bytes(b"")
    _refused(clip, r"c: c\.wav is empty")
    write_wav(tmp_path / "c.wav", np.zeros(0, np.float32), RATE)
    _refused(clip, r"c\.wav has no samples|c\.wav is damaged")


def test_without_sound_and_without_picture(tmp_path: Path) -> None:
    clip = _clip(tmp_path)
    whole = decode(clip, SPEC)
    seen, heard = decode(replace(clip, audio_path=None), SPEC), decode(replace(clip, video_path=None), SPEC)
    assert seen.spectrogram_FT is None
    assert heard.frames_KHWC is None
    np.testing.assert_array_equal(seen.frames_KHWC, whole.frames_KHWC)
    np.testing.assert_array_equal(heard.spectrogram_FT, whole.spectrogram_FT)
    _refused(replace(clip, audio_path=None, video_path=None), "c: it has neither a sound nor a video file")
    _refused(replace(clip, video_path=clip.audio_path), r"c\.wav holds no picture")
    silent = tmp_path / "silent.mp4"
    with av.open(str(silent), "w") as output:
        stream = output.add_stream("mpeg4", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for picture_HWC in _brightening(10):
            output.mux(stream.encode(av.VideoFrame.from_ndarray(picture_HWC, format="rgb24")))
        output.mux(stream.encode(None))
    _refused(replace(clip, audio_path=silent, video_path=silent), r"silent\.mp4 holds no sound")


def test_missing_and_foreign_files(tmp_path: Path) -> None:
    clip = _clip(tmp_path)
    _refused(replace(clip, audio_path=tmp_path / "gone.wav"), r"gone\.wav cannot be read")
    (tmp_path / "c.wav").write_text("this is no sound\n" * 100)
    _refused(clip, r"c\.wav is damaged or no media file")


def test_event_beyond_the_end(tmp_path: Path) -> None:
    path = tmp_path / "v.mp4"
    write_mp4(path, _brightening(30), FPS, _rising(3), RATE)
    _refused(ClipRef("v", path, path, 0, None, 7.0, 9.0), "no sound between 7 s")
