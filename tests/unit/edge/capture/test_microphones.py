"""The sound card's times, and what is said without one; the sound library is replaced by one that plays a script."""

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from isthmus.edge.capture import microphones
from isthmus.edge.capture.assembly import Block, BlockTimes, sound_of
from isthmus.edge.capture.microphones import open_microphone
from isthmus.edge.capture.sources import CaptureUnavailable

RATE_HZ = 1_000
DAY_S = 86_400.0
NAME = "HDA Intel PCH: ALC295 Analog/Front (hw:0,0)"


class Card:
    """A sound library with one card, which has the rates ``rates``. As PortAudio, it finds another one
    (``plugged_in``) only when it is initialised again."""

    class PortAudioError(Exception):
        pass

    def __init__(self, rates: tuple[int, ...] = (RATE_HZ,)) -> None:
        self.rates = rates
        self.callback: Callable[..., None] = lambda *ignored: None
        self.opened_hz = 0
        self.plugged_in = rates
        self.initialised = True

    def _terminate(self) -> None:
        if not self.initialised:
            raise self.PortAudioError("PortAudio not initialized")
        self.initialised = False

    def _initialize(self) -> None:
        self.initialised, self.rates = True, self.plugged_in

    def check_input_settings(self, *, device: object, samplerate: int, **ignored: object) -> None:
        if isinstance(device, str) and device not in NAME:
            raise ValueError(f"No input device matching {device!r}")
        if samplerate not in self.rates:
            raise self.PortAudioError("Invalid sample rate [PaErrorCode -9997]")

    def query_devices(self, device: object, kind: str) -> dict[str, Any]:
        if not self.rates:
            raise self.PortAudioError("Error querying device -1")
        return {"default_samplerate": float(self.rates[0])}

    def InputStream(self, *, samplerate: int, callback: Callable[..., None], **ignored: object) -> Any:
        self.callback, self.opened_hz = callback, samplerate
        return SimpleNamespace(start=lambda: None, close=lambda: None)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    made = Card()
    monkeypatch.setitem(sys.modules, "sounddevice", made)
    return made


def test_the_clock_may_jump_a_day_and_some_drivers_have_no_time(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    got: list[tuple[float, int]] = []
    now_s = 50.0
    monkeypatch.setattr(microphones.time, "monotonic", lambda: now_s)
    open_microphone("", RATE_HZ, lambda at_s, rate_hz, samples_T: got.append((at_s, rate_hz)))
    card_s = 1e9
    for jump_s, age_s in ((0.0, 0.1), (DAY_S, 0.1), (-DAY_S, 0.1), (0.0, 1e9), (0.0, 0.1)):
        # The jump comes between the two times of the block that is being recorded.
        times = SimpleNamespace(currentTime=card_s + jump_s, inputBufferAdcTime=card_s - age_s)
        card.callback(np.zeros((100, 1)), 100, times, SimpleNamespace(input_overflow=False))
        card_s, now_s = card_s + jump_s + 0.1, now_s + 0.1
    assert [at_s for at_s, _ in got] == pytest.approx([49.9, 50.0, 50.1, 50.2, 50.3])


def test_a_card_without_the_rate_is_opened_at_its_own(card: Card) -> None:
    card.rates = (44_100,)
    open_microphone("", 16_000, lambda *block: None)
    assert card.opened_hz == 44_100


def test_without_a_card_or_the_library_the_way_out_is_said(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    card.rates = card.plugged_in = ()
    with pytest.raises(CaptureUnavailable, match="no usable microphone: Error querying device"):
        open_microphone("", 16_000, lambda *block: None)
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    with pytest.raises(CaptureUnavailable, match=r"pip install 'isthmus\[live\]'"):
        open_microphone("", 16_000, lambda *block: None)
    assert open_microphone("none", 16_000, lambda *block: None) is None


@pytest.mark.parametrize("which", ["Analog/Front", "ALC295", NAME])
def test_a_card_is_found_by_a_part_of_its_name_also_with_a_slash(card: Card, which: str) -> None:
    assert open_microphone(which, RATE_HZ, lambda *block: None) is not None
    assert card.opened_hz == RATE_HZ


@pytest.mark.parametrize("which", ["faces/AudioWAV/none", "voice.WAV"])
def test_a_sound_file_that_is_not_there_is_no_name_of_a_card(card: Card, which: str) -> None:
    with pytest.raises(CaptureUnavailable, match="there is no sound file"):
        open_microphone(which, RATE_HZ, lambda *block: None)


def test_a_card_that_is_plugged_in_later_is_found_at_the_next_try(card: Card) -> None:
    card.rates = card.plugged_in = ()
    for _ in range(2):
        with pytest.raises(CaptureUnavailable, match="no usable microphone"):
            open_microphone("", RATE_HZ, lambda *block: None)
        card.initialised = False  # an initialisation that failed is no reason to give up
    card.plugged_in = (RATE_HZ,)
    with pytest.raises(CaptureUnavailable):
        open_microphone("", RATE_HZ, lambda *block: None)
    open_microphone("", RATE_HZ, lambda *block: None)
    assert card.opened_hz == RATE_HZ


def heard(late_s: np.ndarray, *, drift: float = 0.0) -> list[Block]:
    """Return blocks of 0.1 s that the process hears of late; their samples say their own time."""
    times, found = BlockTimes(RATE_HZ), []
    for number, each_s in enumerate(late_s):
        at_s = 10.0 + number * 0.1 / (1 + drift)
        samples_T = (at_s + np.arange(100) / RATE_HZ).astype(np.float32)
        found.append(Block(times.stamp(at_s + each_s, 100), RATE_HZ, samples_T))
    return found


@pytest.mark.parametrize("drift", [-3e-4, 0.0, 3e-4])
def test_a_busy_machine_tears_no_gaps_into_sound(drift: float) -> None:
    late_s = np.random.default_rng(1).exponential(0.03, 400)
    late_s[100:105] = 0.4  # it stands still for a moment
    blocks = heard(late_s, drift=drift)
    for start_s in (12.0, 19.5, 40.0):
        cut_T = sound_of(blocks, start_s, start_s + 3.0)
        assert cut_T is not None and (cut_T > 0).all(), "no sample is missing"
        skew_s = np.abs(cut_T.astype(np.float64) - (start_s + np.arange(3_000) / RATE_HZ))
        assert skew_s.max() < 0.040


def test_lost_samples_shift_what_follows() -> None:
    times = BlockTimes(RATE_HZ)
    assert times.stamp(5.0, 100) == 5.0
    assert times.stamp(5.1, 100) == pytest.approx(5.1)
    assert times.stamp(5.7, 100, lost=True) == pytest.approx(5.7)
    for number in range(1, 12):
        last_s = times.stamp(6.7 + number * 0.1, 100)
    assert last_s == pytest.approx(7.8), "a gap that the card does not report is believed after ten blocks"
