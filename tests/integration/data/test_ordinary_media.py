"""Files as cameras, phones, editors and converters write them are read as their usual players show them."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
import pytest

from isthmus.data.clip import ClipError, ClipRef
from isthmus.data.media.decode import check_decodes, decode, decode_sound
from isthmus.data.media.pictures import upright
from isthmus.data.media.truncation import is_cut_off
from isthmus.data.transforms import InputSpec
from tests.rigs.data.media import (
    copied_from,
    grey,
    pcm16,
    quarters,
    rf64,
    riff,
    set_display_matrix,
    tone,
    write_film,
)

SPEC = InputSpec(spectrogram_bins=64, spectrogram_columns=64, stored_px=32, frame_px=32)
RATE = SPEC.sample_rate_hz


def seen(path: Path, start_s: float | None = None, end_s: float | None = None) -> npt.NDArray[np.uint8]:
    frames_KHWC = decode(ClipRef("c", None, path, 0, None, start_s, end_s), SPEC).frames_KHWC
    assert frames_KHWC is not None
    return frames_KHWC


def levels(path: Path, start_s: float | None = None, end_s: float | None = None) -> list[int]:
    """Which of the pictures grey(8 k) are shown."""
    return [round(level / 8) for level in seen(path, start_s, end_s).mean(axis=(1, 2, 3))]


def heard(path: Path, start_s: float | None = None, end_s: float | None = None) -> npt.NDArray[np.float32]:
    return decode_sound(ClipRef("c", path, None, 0, None, start_s, end_s), SPEC)


def brightening(count: int = 25) -> list[npt.NDArray[np.uint8]]:
    return [grey(8 * k) for k in range(count)]


def test_pictures_before_the_cut_of_a_copied_film_are_not_shown(tmp_path: Path) -> None:
    options = {"g": "50", "keyint_min": "50", "sc_threshold": "0", "bf": "2"}
    write_film(tmp_path / "whole.mp4", brightening(30), fps=10, options=options, sound=tone(3, 44_100))
    copied_from(tmp_path / "whole.mp4", tmp_path / "cut.mp4", 2.0)
    assert levels(tmp_path / "cut.mp4") == list(range(20, 30))
    assert abs(len(heard(tmp_path / "cut.mp4")) / RATE - 1.0) < 0.05


def test_a_picture_counts_for_as_long_as_it_is_shown(tmp_path: Path) -> None:
    write_film(tmp_path / "cover.mp4", [grey(80)], last_ms=3000, sound=tone(3, 44_100))
    assert levels(tmp_path / "cover.mp4") == levels(tmp_path / "cover.mp4", 1.0, 2.0) == [10] * 10
    times_ms = [0, 100, 200, 300, 400]
    plain = {"bf": "0"}
    write_film(tmp_path / "stands.mp4", brightening(5), times_ms=times_ms, last_ms=600, options=plain)
    assert levels(tmp_path / "stands.mp4") == [0, 1, 2, 3, 4, 4, 4, 4, 4, 4]
    slower_ms = [0, 100, 200, 300, 400, 500, 1000, 1500]
    write_film(tmp_path / "slower.mp4", brightening(8), times_ms=slower_ms, last_ms=500, options=plain)
    assert levels(tmp_path / "slower.mp4") == [1, 3, 5, 5, 5, 6, 6, 7, 7, 7]


@pytest.mark.parametrize(
    ("matrix", "shown"),
    [
        ((1, 0, 0, 1), ("red", "green", "blue", "white")),
        ((0, 1, -1, 0), ("blue", "red", "white", "green")),
        ((-1, 0, 0, -1), ("white", "blue", "green", "red")),
        ((0, -1, 1, 0), ("green", "white", "red", "blue")),
        ((-1, 0, 0, 1), ("green", "red", "white", "blue")),
        ((1, 0, 0, -1), ("blue", "white", "red", "green")),
        ((0, 1, 1, 0), ("red", "blue", "green", "white")),
        ((0, -1, -1, 0), ("white", "green", "blue", "red")),
    ],
)
def test_films_are_turned_and_mirrored_as_they_ask(
    tmp_path: Path, matrix: tuple[int, int, int, int], shown: tuple[str, ...]
) -> None:
    colours = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}
    write_film(tmp_path / "turned.mp4", [quarters()] * 5)
    set_display_matrix(tmp_path / "turned.mp4", *matrix)
    first_HWC = seen(tmp_path / "turned.mp4")[0].astype(int)
    for place, colour in zip(((8, 8), (8, 24), (24, 8), (24, 24)), shown, strict=True):
        np.testing.assert_allclose(first_HWC[place], colours[colour], atol=60)


def test_a_broken_matrix_and_oblong_pixels() -> None:
    picture_HWC = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    np.testing.assert_array_equal(upright(picture_HWC, 1.0, (0, 0, 0, 0)), picture_HWC)
    np.testing.assert_array_equal(upright(picture_HWC, 1.0, (6, 5, -5, 6)), picture_HWC)  # rounded to a quarter
    assert upright(picture_HWC, 2.0, None).shape == (2, 6, 3)
    assert upright(picture_HWC, 0.5, (0, 1, -1, 0)).shape == (3, 4, 3)


def test_oblong_pixels_are_seen_as_square(tmp_path: Path) -> None:
    stripe_HWC = grey(0)
    stripe_HWC[16:48] = 255
    write_film(tmp_path / "wide.mp4", [stripe_HWC] * 5, pixel_aspect=Fraction(2, 1))
    column_H = seen(tmp_path / "wide.mp4")[0][:, 16].mean(axis=1)  # the centre square of 128 x 64
    assert (column_H > 128).sum() == 16


def test_sound_that_starts_later_stays_beside_its_pictures(tmp_path: Path) -> None:
    path = tmp_path / "late.mp4"
    write_film(path, brightening(20), fps=10, sound=tone(1, 44_100), sound_starts_s=0.5)
    whole_T = heard(path)
    assert abs(int(np.argmax(np.abs(whole_T) > 0.1)) / RATE - 0.5) < 0.03
    assert np.abs(heard(path, 0.2, 0.4)).max() == 0
    assert np.abs(heard(path, 0.6, 0.8)).max() > 0.4
    assert levels(path, 1.0, 2.0) == list(range(10, 20))


@pytest.mark.parametrize(
    ("codec", "container", "options"),
    [
        ("libx265", "mp4", {"x265-params": "log-level=none"}),
        ("libvpx", "webm", {"auto-alt-ref": "1", "lag-in-frames": "16"}),
        ("libvpx-vp9", "webm", {"auto-alt-ref": "1", "lag-in-frames": "16"}),
        ("libx264", "matroska", {"bf": "2"}),
        ("libx264", "mpegts", {"bf": "2"}),
        ("mpeg4", "avi", {"bf": "2"}),
        ("mjpeg", "mov", {"color_range": "pc"}),
    ],
)
def test_codecs_and_containers(tmp_path: Path, codec: str, container: str, options: dict[str, str]) -> None:
    path = tmp_path / f"film.{container}"
    if codec == "mjpeg":
        options = {"strict": "unofficial"}
    write_film(path, brightening(20), fps=10, codec=codec, container=container, options=options, last_ms=100)
    assert np.abs(np.array(levels(path)) - np.arange(1, 20, 2)).max() <= (2 if container == "avi" else 1)
    check_decodes(ClipRef("c", None, path, 0, None), SPEC)


def test_a_film_in_fragments_and_one_that_is_trimmed_by_its_edit_list(tmp_path: Path) -> None:
    fragments = tmp_path / "fragments.mp4"
    write_film(fragments, brightening(20), fps=10, muxing={"movflags": "frag_keyframe+empty_moov"}, last_ms=100)
    assert is_cut_off(fragments) is False
    assert levels(fragments) == list(range(1, 20, 2))
    trimmed = tmp_path / "trimmed.mp4"
    write_film(trimmed, brightening(20), fps=10, last_ms=100, options={"bf": "0"})
    content = bytearray(trimmed.read_bytes())
    place = content.index(b"elst") + 12  # one entry: length in milliseconds, then where it begins in the track
    content[place : place + 4] = (500).to_bytes(4, "big")
    trimmed.write_bytes(content)
    assert levels(trimmed) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]  # all 20 pictures are in the file, 5 are shown


@pytest.mark.parametrize("container", ["matroska", "avi", "mp4"])
def test_films_that_are_cut_off(tmp_path: Path, container: str) -> None:
    path = tmp_path / f"film.{container}"
    codec = "mpeg4" if container == "avi" else "libx264"
    write_film(path, brightening(), container=container, codec=codec)
    assert is_cut_off(path) is False
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ClipError, match="is truncated"):
        seen(path)


def test_a_cover_is_no_film(tmp_path: Path) -> None:
    path = tmp_path / "song.mp3"
    with av.open(str(path), "w") as out:
        track = out.add_stream("libmp3lame", rate=16_000)
        track.layout = "mono"
        cover = out.add_stream("png", rate=1)
        cover.width, cover.height, cover.pix_fmt = 64, 64, "rgb24"
        cover.disposition = av.stream.Disposition.attached_pic.value
        frame = av.AudioFrame.from_ndarray(np.frombuffer(pcm16(tone(1, RATE)), "<i2")[None], "s16p", "mono")
        frame.sample_rate, frame.pts = RATE, 0
        resampler = av.AudioResampler(format="s16p", layout="mono", rate=RATE, frame_size=576)
        out.mux(cover.encode(av.VideoFrame.from_ndarray(quarters(), format="rgb24")))
        out.mux(cover.encode(None))
        for each in [*resampler.resample(frame), *resampler.resample(None), None]:
            out.mux(track.encode(each))
    assert abs(len(heard(path)) / RATE - 1.0) < 0.1
    with pytest.raises(ClipError, match="holds no picture"):
        seen(path)


def test_all_channels_are_heard_and_none_is_clipped(tmp_path: Path) -> None:
    loud_T = 1.9 * tone(1, RATE)
    one = np.frombuffer(pcm16(loud_T), "<i2")
    (tmp_path / "mono.wav").write_bytes(riff(one.tobytes()))
    mono_T = heard(tmp_path / "mono.wav")
    for channels, mask in ((2, None), (2, 3), (6, None), (6, 0x3F), (16, None)):
        named = None if mask is None else (mask, 1)
        path = tmp_path / f"{channels}-{mask}.wav"
        path.write_bytes(riff(np.repeat(one, channels).tobytes(), channels=channels, extensible=named))
        np.testing.assert_allclose(heard(path), mono_T, atol=1e-6)
        for channel in range(channels):
            alone_TC = np.zeros((len(one), channels), "<i2")
            alone_TC[:, channel] = one
            path.write_bytes(riff(alone_TC.tobytes(), channels=channels, extensible=named))
            np.testing.assert_allclose(heard(path), mono_T / channels, atol=1e-6)


def test_sample_formats_sound_alike(tmp_path: Path) -> None:
    sound_T = tone(1, RATE)
    path = tmp_path / "c.wav"
    deep = b"".join(int(value).to_bytes(3, "little", signed=True) for value in np.round(sound_T * 8_388_607))
    for content in (
        riff(np.round(sound_T * 127 + 128).astype("u1").tobytes(), bits=8),
        riff(pcm16(sound_T)),
        riff(deep, bits=24),
        riff(deep, bits=24, extensible=(4, 1)),
        riff(np.round(sound_T * 2_147_483_000).astype("<i4").tobytes(), bits=32),
        riff(sound_T.astype("<f4").tobytes(), bits=32, kind=3),
        riff(sound_T.astype("<f8").tobytes(), bits=64, extensible=(4, 3)),
        rf64(pcm16(sound_T)),
    ):
        path.write_bytes(content)
        np.testing.assert_allclose(heard(path), sound_T, atol=0.01)


@pytest.mark.parametrize("declared", [0, 0x7FFF_F000, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF - 36, 0xFFFF_FFFF])
@pytest.mark.parametrize("whole", [0, None, 0xFFFF_FFFF])
def test_placeholders_for_the_size_of_a_wav_file(tmp_path: Path, declared: int, whole: int | None) -> None:
    path = tmp_path / "c.wav"
    path.write_bytes(riff(pcm16(tone(2, RATE)), declared=declared, whole=whole))
    assert len(heard(path)) == 2 * RATE


def test_a_few_bytes_too_many_are_no_truncation_and_many_are(tmp_path: Path) -> None:
    samples, path = pcm16(tone(2, RATE)), tmp_path / "c.wav"
    info = b"LIST" + (26).to_bytes(4, "little") + b"INFOISFT\x0e\0\0\0" + b"some encoder\0\0"
    for more in (16, 44, 60, 78):
        path.write_bytes(riff(samples, declared=len(samples) + more, before=info))
        assert len(heard(path)) == 2 * RATE
    for content in (riff(samples), rf64(samples)):
        path.write_bytes(content[:-2000])
        with pytest.raises(ClipError, match="is truncated"):
            heard(path)
    path.write_bytes(riff(samples) + b"\0" * 300)
    assert len(heard(path)) == 2 * RATE


@pytest.mark.parametrize(("container", "codec"), [("w64", "pcm_s16le"), ("flac", "flac"), ("ogg", "libopus")])
def test_other_kinds_of_sound_files(tmp_path: Path, container: str, codec: str) -> None:
    path = tmp_path / f"c.{container}"
    with av.open(str(path), "w", format=container) as out:
        track = out.add_stream(codec, rate=48_000)
        track.layout = "stereo"
        both = np.repeat(np.round(tone(2, 48_000) * 32767).astype("<i2"), 2)[None]
        frame = av.AudioFrame.from_ndarray(both, format="s16", layout="stereo")
        frame.sample_rate, frame.pts = 48_000, 0
        form = track.codec_context.format.name
        resampler = av.AudioResampler(format=form, layout="stereo", rate=48_000, frame_size=track.frame_size or 1024)
        for each in [*resampler.resample(frame), *resampler.resample(None), None]:
            out.mux(track.encode(each))
    assert abs(len(heard(path)) / RATE - 2.0) < 0.02
    assert 0.45 < np.abs(heard(path)[RATE // 2 : RATE]).max() < 0.55
    if container == "w64":
        path.write_bytes(path.read_bytes()[:-2000])
        with pytest.raises(ClipError, match="is truncated"):
            heard(path)


@pytest.mark.parametrize(
    ("content", "way_out"),
    [
        ("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 72862\n", "git lfs pull"),
        ("/annex/objects/SHA256E-s72862--00.wav\n", "git annex get"),
        ("\n<!DOCTYPE html><html><body>Please sign in", "web page"),
    ],
)
def test_what_stands_in_for_a_file_is_named_with_the_way_out(tmp_path: Path, content: str, way_out: str) -> None:
    path = tmp_path / "c.wav"
    path.write_text(content)
    with pytest.raises(ClipError, match=way_out):
        heard(path)
