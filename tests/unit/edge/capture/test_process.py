"""Clips from the records of a child: what each watcher hears, and when the child starts over. Time is simulated."""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from isthmus.data.media.encode import write_mp4, write_wav
from isthmus.data.synthetic.voice import RATE_HZ
from isthmus.data.transforms import InputSpec
from isthmus.edge.capture import process, watch
from isthmus.edge.capture.assembly import Block, StampedPicture
from isthmus.edge.capture.process import NOBODY, Capture
from isthmus.edge.capture.records import Note, Source
from tests.rigs.project.patience import HANGS_S

SPEC = InputSpec(duration_s=1.0, spectrogram_bins=65, spectrogram_columns=60, frame_px=32, stored_px=36)
RNG = np.random.default_rng(0)


class Room:
    """What camera and microphone give, ten times a second. Each of the two is "well", "frozen", "gone" or "mute"."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.camera = self.microphone = "well"
        self.voice = self.face = True
        self.starts = 0
        self.cured_by_a_start = False
        self.said: list[tuple[float, str]] = []
        self._still = RNG.integers(0, 255, (40, 60, 3), dtype=np.uint8)

    def clock(self) -> float:
        return self.now_s


class Watched(Capture):
    """A capture without a child: records come from the room while it waits."""

    def __init__(self, room: Room, **options: object) -> None:
        self._room = room
        super().__init__(
            SPEC,
            room.clock,
            lambda text: room.said.append((room.now_s, text)),
            wait=self._pass,
            **options,  # type: ignore[arg-type]
        )
        self._voice = lambda waveform_T, rate_hz: room.voice
        self._face.find = lambda pictures: (20, 10, 20, 20) if room.face else None  # type: ignore[method-assign]

    def _start(self) -> None:
        room = self._room
        room.starts += 1
        if room.cured_by_a_start and room.starts > 1:
            room.camera = room.microphone = "well"
        since_s = room.now_s + self._opening_s() - watch.OPENING_S
        self._seen = {source: process.Seen(since_s) for source, used in self._uses.items() if used}
        self._notes = {}

    def close(self) -> None:
        pass

    def note(self, source: Source, text: str) -> None:
        self._take(Note(source, text))

    def _pass(self, seconds: float) -> None:
        room = self._room
        room.now_s += seconds
        if room.camera != "gone":
            fresh = RNG.integers(0, 255, (40, 60, 3), dtype=np.uint8)
            self._take(StampedPicture(room.now_s, room._still if room.camera == "frozen" else fresh))
        if room.microphone != "gone":
            loud = 0.0 if room.microphone == "mute" else 0.1
            samples_T = (loud * RNG.normal(size=RATE_HZ // 10)).astype(np.float32)
            self._take(Block(room.now_s - seconds, RATE_HZ, samples_T))


def test_a_clip_has_sound_and_the_framed_pictures() -> None:
    captured = Watched(Room()).next_clip("a")
    assert captured.taken is not None and captured.pictures is not None and captured.waveform_T is not None
    assert len(captured.waveform_T) == SPEC.samples
    assert captured.pictures[0].shape == (30, 30, 3), "1.5 faces wide"
    clip = captured.taken.clip
    assert clip.spectrogram_FT is not None and clip.spectrogram_FT.shape == (65, 60)
    assert clip.frames_KHWC is not None and clip.frames_KHWC.shape == (10, 36, 36, 3)


def test_the_last_seconds_of_sound_and_the_newest_picture_can_be_had() -> None:
    room = Room()
    capture = Watched(room)
    assert capture.recent() == ([], None)
    for name in "abc":
        capture.next_clip(name)
    blocks, picture = capture.recent()
    kept_s = SPEC.duration_s + 2.0
    assert [block.at_s for block in blocks] == sorted(block.at_s for block in blocks)
    assert room.now_s - kept_s <= blocks[0].at_s < room.now_s - kept_s + 0.2 and blocks[-1].at_s < room.now_s
    assert picture is not None and picture.at_s == pytest.approx(room.now_s)
    blocks.clear()
    assert capture.recent()[0], "the caller's list is its own"
    room.camera = room.microphone = "gone"
    for name in "defg":
        capture.next_clip(name)
    assert capture.recent()[0], "old sound is dropped when something new comes"


@pytest.mark.parametrize(("voice", "face"), [(True, False), (False, True), (False, False)])
def test_what_has_nothing_to_tell_is_left_out(voice: bool, face: bool) -> None:
    room = Room()
    room.voice, room.face = voice, face
    captured = Watched(room).next_clip("a")
    assert (captured.waveform_T is not None, captured.pictures is not None) == (voice, face)
    assert (captured.taken is None) == (not voice and not face)
    assert captured.reason == ("" if voice or face else NOBODY)
    ungated = Watched(room, gated=False).next_clip("a")
    assert ungated.waveform_T is not None and ungated.pictures is not None


def test_a_frozen_picture_is_said_within_2_s_and_the_child_started_anew() -> None:
    room = Room()
    capture = Watched(room)
    capture.next_clip("a")
    room.camera, room.cured_by_a_start, began_s = "frozen", True, room.now_s
    for name in "bcd":
        capture.next_clip(name)
    at_s, text = room.said[0]
    assert "same picture" in text and at_s - began_s <= 2.0
    assert (room.starts, room.camera, len(room.said)) == (2, "well", 1)


@pytest.mark.parametrize("source", ["camera", "microphone"])
def test_a_source_that_is_pulled_out_is_said_within_5_s_and_the_other_goes_on(source: str) -> None:
    room = Room()
    capture = Watched(room)
    capture.next_clip("a")
    setattr(room, source, "gone")
    began_s = room.now_s
    clips = [capture.next_clip(str(number)) for number in range(8)]
    at_s, text = room.said[0]
    assert text == f"the {source} gives no {'pictures' if source == 'camera' else 'sound'} any more; it is restarted"
    assert at_s - began_s <= 5.0
    last = clips[-1]
    assert last.taken is not None
    assert (last.pictures is None, last.waveform_T is None) == (source == "camera", source == "microphone")
    assert room.starts == 2, "once, and then after a pause that grows"


@pytest.mark.parametrize("source", ["camera", "microphone"])
def test_a_source_that_stays_away_disturbs_the_other_less_and_less(source: str) -> None:
    room = Room()
    capture = Watched(room)
    setattr(room, source, "gone")
    starts = []
    while room.now_s < 300:
        capture.next_clip("a")
        starts.append(room.starts)
    assert 3 <= room.starts <= 9
    assert starts[-1] - starts[len(starts) // 2] <= 3, "less than once per minute in the end"
    setattr(room, source, "well")
    for number in range(3):
        captured = capture.next_clip(str(number))
    assert captured.waveform_T is not None and captured.pictures is not None
    assert capture._restarts == 0


def test_a_slow_board_gets_more_time_with_each_start() -> None:
    """A child that needs 25 s to open its camera is started again twice, and then waited for."""
    room = Room()
    room.camera = room.microphone = "gone"
    capture = Watched(room)
    began_s, known = 0.0, 1
    while room.camera == "gone" and room.now_s < 600:
        capture.next_clip("a")
        if room.starts != known:
            began_s, known = room.now_s, room.starts
        if room.now_s - began_s > 25:
            room.camera = room.microphone = "well"
    assert room.now_s < 120
    assert capture.next_clip("b").taken is not None


def test_a_source_that_was_never_there_is_said_once_and_the_child_runs_on() -> None:
    room = Room()
    room.microphone = "gone"
    capture = Watched(room)
    capture.note(Source.MICROPHONE, "no usable microphone: none found")
    clips = [capture.next_clip(str(number)) for number in range(20)]
    assert [text for _, text in room.said] == ["no usable microphone: none found"]
    assert room.starts == 1
    assert all(clip.waveform_T is None and clip.pictures is not None for clip in clips)


def test_without_both_the_reasons_are_given_and_nothing_is_guessed() -> None:
    room = Room()
    room.microphone = room.camera = "gone"
    capture = Watched(room)
    capture.note(Source.MICROPHONE, "no microphone")
    capture.note(Source.CAMERA, "no camera")
    captured = capture.next_clip("a")
    assert captured.taken is None and set(captured.reason.split("; ")) == {"no microphone", "no camera"}


def test_a_muted_microphone_is_said_and_not_started_anew() -> None:
    room = Room()
    room.microphone = "mute"
    capture = Watched(room)
    for number in range(12):
        capture.next_clip(str(number))
    assert [text for _, text in room.said] == ["the microphone gives nothing but silence: is it muted?"]
    assert room.starts == 1


def test_an_hour_of_silence_is_said_once_and_takes_no_memory() -> None:
    room = Room()
    room.camera, room.microphone, room.voice = "gone", "mute", False
    capture = Watched(room, camera="none")
    captured = [capture.next_clip("a") for _ in range(5)][-1]
    kept = len(capture._blocks)
    while room.now_s < 3_600:
        captured = capture.next_clip("b")
        assert captured.waveform_T is None and captured.taken is None
    assert [text for _, text in room.said] == ["the microphone gives nothing but silence: is it muted?"]
    assert len(capture._blocks) <= kept + 1
    room.microphone, room.voice = "well", True
    assert capture.next_clip("c").taken is not None or capture.next_clip("d").taken is not None


def test_a_source_that_is_not_wanted_is_not_missed() -> None:
    room = Room()
    room.camera = "gone"
    capture = Watched(room, camera="none")
    clips = [capture.next_clip(str(number)) for number in range(14)]
    assert room.said == [] and room.starts == 1
    assert all(clip.waveform_T is not None and clip.pictures is None for clip in clips)


def real(tmp_path: Path, say: Callable[[str], None], command: list[str] | None = None) -> Capture:
    """Return a capture with a child process, a film and a sound file."""
    import time

    rng = np.random.default_rng(0)
    tone = 0.3 * np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000)
    write_wav(tmp_path / "tone.wav", tone.astype(np.float32), 16_000)
    pictures = rng.integers(0, 255, (30, 48, 64, 3), dtype=np.uint8)
    write_mp4(tmp_path / "noise.mp4", pictures, 15, np.zeros(32_000, np.float32), 16_000)
    return Capture(
        SPEC,
        time.monotonic,
        say,
        camera=str(tmp_path / "noise.mp4"),
        microphone=str(tmp_path / "tone.wav"),
        gated=False,
        command=command,
    )


def test_a_child_captures_a_film_and_a_tone(tmp_path: Path) -> None:
    said: list[str] = []
    with real(tmp_path, said.append) as capture:
        for number in range(200):  # a busy machine may need a while to start the child
            captured = capture.next_clip(str(number))
            if captured.waveform_T is not None and captured.pictures is not None:
                break
        assert captured.waveform_T is not None and captured.pictures is not None
        loudest_hz = np.abs(np.fft.rfft(captured.waveform_T)).argmax() * 16_000 / len(captured.waveform_T)
        assert loudest_hz == pytest.approx(440, abs=3)
        assert captured.pictures[0].shape == (48, 64, 3)
        child = capture._child
    assert [text for text in said if "restarted" not in text] == [], "a busy machine may start the child twice"
    assert child is not None and child.returncode is not None, "the child ends with the capture"


def test_a_child_that_writes_nonsense_is_ended(tmp_path: Path) -> None:
    nonsense = "import sys, time; sys.stdout.write('x' * 1000); sys.stdout.flush(); time.sleep(99)"
    with real(tmp_path, lambda text: None, [sys.executable, "-c", nonsense]) as capture:
        assert capture._child is not None
        assert capture._child.wait(HANGS_S) < 0
