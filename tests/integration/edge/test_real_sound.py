"""A microphone through PortAudio: a sound server with a null sink plays tones whose pitch and level are known.

The whole path runs: PulseAudio, ALSA, PortAudio, sounddevice, the capturing child, and its pipe.
"""

import contextlib
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from isthmus.data.transforms import InputSpec
from isthmus.edge.capture.assembly import Block, BlockTimes, sound_of
from isthmus.edge.capture.process import Capture, Captured
from tests.rigs.edge import sound
from tests.rigs.edge.sound import SoundServer, drift_of, longest_run, sound_server
from tests.rigs.project.system import missing

SPEC = InputSpec(duration_s=1.0, spectrogram_bins=65, spectrogram_columns=60, frame_px=32, stored_px=36)
LEVEL = 0.25
MOST_DRIFT = 0.01
"""Of the time: how much faster or slower than the samples the stamps of a whole stretch may run."""
TRIES = 200
"""A busy machine may need several clips until the child, PortAudio and the player run."""


def tone(hertz: float, seconds: float = 300.0) -> npt.NDArray[np.float32]:
    times_T = np.arange(round(sound.RATE_HZ * seconds)) / sound.RATE_HZ
    return (LEVEL * np.sin(2 * np.pi * hertz * times_T)).astype(np.float32)


@pytest.fixture(scope="module")
def server() -> Iterator[SoundServer]:
    if find_spec("sounddevice") is None:
        missing("the Python package sounddevice is not installed: pip install 'isthmus[live]'")
    if sound.missing():
        missing(sound.missing())
    # Not in pytest's folder: the path of a socket must be short.
    with tempfile.TemporaryDirectory(prefix="isthmus-sound-") as folder, sound_server(Path(folder)) as running:
        yield running


@contextlib.contextmanager
def microphone(server: SoundServer, said: list[str], which: str = "", rate_hz: int = 16_000) -> Iterator[Capture]:
    """Capture from the server's monitor."""
    spec = InputSpec(**{**vars(SPEC), "sample_rate_hz": rate_hz})
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        with Capture(spec, time.monotonic, said.append, camera="none", microphone=which, gated=False) as capture:
            yield capture


def heard(capture: Capture, hertz: float) -> Captured:
    """Return the first clip that is full of the tone."""
    for number in range(TRIES):
        captured = capture.next_clip(str(number))
        if captured.waveform_T is not None:
            power_F = np.abs(np.fft.rfft(captured.waveform_T)) ** 2
            near = power_F[round(hertz) - 2 : round(hertz) + 3].sum() / max(power_F.sum(), 1e-9)
            if near > 0.98 and np.abs(captured.waveform_T).max() < 1.1 * LEVEL:
                return captured
    pytest.fail(f"{hertz} Hz was never heard")


@pytest.mark.parametrize("hertz", [440.0, 3_000.0])
def test_a_tone_has_its_pitch_and_its_level(server: SoundServer, hertz: float) -> None:
    server.play(tone(hertz))
    said: list[str] = []
    with microphone(server, said) as capture:
        waveform_T = heard(capture, hertz).waveform_T
    assert waveform_T is not None and len(waveform_T) == 16_000
    spectrum_F = np.abs(np.fft.rfft(waveform_T * np.hanning(len(waveform_T))))
    assert spectrum_F.argmax() == pytest.approx(hertz, abs=1), "one bin is 1 Hz"
    assert np.sqrt(np.square(waveform_T).mean()) == pytest.approx(LEVEL / np.sqrt(2), rel=0.05)
    assert [text for text in said if "restarted" not in text] == [], "a busy machine may start the child twice"


def test_blocks_are_stamped_by_the_sound_cards_clock(server: SoundServer) -> None:
    """Samples that follow each other have stamps that do, so no clip has a gap where nothing was lost."""
    server.play(tone(440))
    with microphone(server, []) as capture:
        heard(capture, 440)
        # A busy machine loses blocks, which is a real gap: the longest stretch without one is taken, once it is long.
        for number in range(TRIES):
            run = longest_run(capture.recent()[0])
            if sound.seconds_of(run) >= 2.0:
                break
            capture.next_clip(str(number))
    assert sound.seconds_of(run) >= 2.0, "no two seconds came whole"
    assert abs(drift_of(run)) < MOST_DRIFT
    whole_T = sound_of(run, run[0].at_s, run[0].at_s + 2.0)
    assert whole_T is not None and np.count_nonzero(np.abs(whole_T) < 1e-6) < 0.02 * len(whole_T)


@pytest.mark.parametrize(("fast", "drifts"), [(0.0, False), (0.03, True), (-0.03, True)])
def test_the_check_of_stamps_sees_a_clock_that_drifts_and_no_loss(fast: float, drifts: bool) -> None:
    """Blocks of a tenth of a second, stamped as if the card's clock ran fast, with some of them lost on the way."""
    chance = np.random.default_rng(0)
    times = BlockTimes(16_000)
    at_s, blocks = 0.0, []
    for number in range(60):
        lost = number in (7, 31)
        if lost:
            at_s += 0.7
        stamp_s = times.stamp(at_s * (1.0 + fast) + abs(chance.normal(0.0, 0.002)), 1_600, lost=lost)
        blocks.append(Block(stamp_s, 16_000, np.zeros(1_600, np.float32)))
        at_s += 0.1
    run = longest_run(blocks)
    assert 2.0 <= sound.seconds_of(run) <= 3.0, "from one loss to the next"
    assert (abs(drift_of(run)) > MOST_DRIFT) is drifts


def test_silence_of_a_real_card_is_said_to_be_muted(server: SoundServer) -> None:
    server.stop()
    said: list[str] = []
    with microphone(server, said) as capture:
        for number in range(TRIES):
            capture.next_clip(str(number))
            if any("muted" in text for text in said):
                break
    assert said[-1] == "the microphone gives nothing but silence: is it muted?"


def test_a_microphone_that_is_not_there_is_said_and_nothing_is_captured(server: SoundServer) -> None:
    said: list[str] = []
    with microphone(server, said, which="no such microphone") as capture:
        for number in range(TRIES):
            captured = capture.next_clip(str(number))
            assert captured.taken is None
            if any("no usable" in text for text in said):
                break
    assert said[-1].startswith("no usable microphone: ")


def test_a_microphone_pulled_out_in_mid_clip_is_said_and_heard_again_once_it_is_back() -> None:
    if find_spec("sounddevice") is None or sound.missing():
        missing(sound.missing() or "the Python package sounddevice is not installed: pip install 'isthmus[live]'")
    said: list[str] = []
    with tempfile.TemporaryDirectory(prefix="isthmus-sound-") as folder, sound_server(Path(folder)) as server:
        server.play(tone(440))
        with microphone(server, said) as capture:
            heard(capture, 440)
            server.unplug()
            said.clear()
            for number in range(TRIES):
                capture.next_clip(str(number))
                if any("no usable microphone" in text for text in said):
                    break
            assert "the microphone gives no sound any more" in said[0]
            assert "no usable microphone" in said[-1], "the child that was started again finds none"
            server.plug_in()
            server.play(tone(880))
            heard(capture, 880)
