"""Microphones: the sound card's, through PortAudio, and a sound file that plays as a microphone.

Blocks of mono samples are given to a callback with the time of their first sample, on the clock of ``time.monotonic``.
"""

import importlib
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from isthmus.data.clip import ClipError, ClipRef
from isthmus.data.transforms import InputSpec
from isthmus.edge.capture.assembly import BlockTimes
from isthmus.edge.capture.sources import CaptureUnavailable

BLOCK_S: Final = 0.1
NO_MICROPHONE: Final = "none"
SOUND_FILES: Final = frozenset({".wav", ".flac", ".mp3", ".ogg", ".m4a", ".mp4", ".flv"})
"""A name that ends so is that of a file, not of a microphone."""
MOST_AGE_S: Final = 2.0
"""A block that seems older than this was not: the sound card's clock jumped, or has no time for it."""

OnBlock = Callable[[float, int, npt.NDArray[np.float32]], None]
"""Called with the time of the first sample, the rate in Hz, and the samples."""


class Microphone(Protocol):
    def close(self) -> None: ...


def open_microphone(which: str, rate_hz: int, on_block: OnBlock) -> Microphone | None:
    """Open a microphone: "" for the default one, its number or a part of its name, or the path of a sound file.

    Returns None for "none". The rate is the sound card's own if it does not have ``rate_hz``. Raises
    CaptureUnavailable, which says what a person can do.
    """
    if which == NO_MICROPHONE:
        return None
    if which and Path(which).is_file():
        return SoundFile(Path(which), rate_hz, on_block)
    missing = f"there is no sound file {which!r}: give its path, a microphone's number or a part of its name"
    if Path(which).suffix.lower() in SOUND_FILES:
        raise CaptureUnavailable(missing)
    try:
        return SoundCard(int(which) if which.isdigit() else which or None, rate_hz, on_block)
    except CaptureUnavailable as error:
        if "/" in which:  # the name of a card, or the path of a file
            raise CaptureUnavailable(f"{error}; {missing}") from error
        raise


class SoundCard:
    """An input of PortAudio. Its own clock says when a block was recorded."""

    def __init__(self, which: int | str | None, rate_hz: int, on_block: OnBlock) -> None:
        library = _sound_library()
        try:
            self._stream = self._opened(library, which, rate_hz, on_block)
        except (library.PortAudioError, ValueError) as error:
            _list_cards_anew(library)
            raise CaptureUnavailable(f"no usable microphone: {error}") from error

    def close(self) -> None:
        self._stream.close()

    def _opened(self, library: Any, which: int | str | None, rate_hz: int, on_block: OnBlock) -> Any:
        try:
            library.check_input_settings(device=which, channels=1, samplerate=rate_hz, dtype="float32")
        except library.PortAudioError:
            rate_hz = int(library.query_devices(which, "input")["default_samplerate"])

        stamps = BlockTimes(rate_hz)

        def block(recorded_T1: Any, frames: int, times: Any, status: Any) -> None:
            # Both times are of the sound card's clock, so their difference is the age of the first sample. That clock
            # may be the time of day, which can jump in between; and some drivers leave a time at 0.
            age_s = times.currentTime - times.inputBufferAdcTime
            if not 0.0 <= age_s <= MOST_AGE_S:
                age_s = frames / rate_hz
            at_s = stamps.stamp(time.monotonic() - age_s, frames, lost=bool(status.input_overflow))
            on_block(at_s, rate_hz, np.array(recorded_T1[:, 0], np.float32))

        stream = library.InputStream(
            device=which,
            channels=1,
            samplerate=rate_hz,
            dtype="float32",
            blocksize=int(rate_hz * BLOCK_S),
            callback=block,
        )
        stream.start()
        return stream


class SoundFile:
    """A sound file at its own speed, from its beginning again after its end."""

    def __init__(self, path: Path, rate_hz: int, on_block: OnBlock) -> None:
        from isthmus.data.media.decode import decode_sound

        try:
            spec = InputSpec(sample_rate_hz=rate_hz, duration_s=600.0)
            self._samples_T = decode_sound(ClipRef(path.name, path, None, None, None), spec)
        except ClipError as error:
            raise CaptureUnavailable(f"the sound file cannot be used: {error.reason}") from error
        self._rate_hz = rate_hz
        self._on_block = on_block
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._play, name="sound-file", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._over.set()
        self._thread.join(2.0)

    def _play(self) -> None:
        size, position, due_s = int(self._rate_hz * BLOCK_S), 0, time.monotonic()
        while not self._over.wait(max(0.0, due_s + BLOCK_S - time.monotonic())):
            block_T = np.take(self._samples_T, np.arange(position, position + size), mode="wrap")
            self._on_block(due_s, self._rate_hz, block_T.astype(np.float32))
            position = (position + size) % len(self._samples_T)
            due_s += BLOCK_S


def _list_cards_anew(library: Any) -> None:
    """Let the next try find a card that was plugged in: PortAudio lists cards only when it is initialised."""
    for step in (library._terminate, library._initialize):
        with suppress(library.PortAudioError):
            step()


def _sound_library() -> Any:
    try:
        return importlib.import_module("sounddevice")
    except ModuleNotFoundError as error:
        raise CaptureUnavailable("live sound needs the package sounddevice: pip install 'isthmus[live]'") from error
    except OSError as error:
        raise CaptureUnavailable("live sound needs PortAudio (Debian: apt install libportaudio2)") from error
