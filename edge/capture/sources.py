"""The sources of clips: a data set replayed from files, or this device's camera and microphone."""

import importlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from isthmus.data.clip import ClipError, ClipRef, Damage, DecodedClip
from isthmus.data.files import read_text
from isthmus.data.media.decode import decode
from isthmus.data.transforms import InputSpec, evenly_spread, spectrogram, stored_frame
from isthmus.proto.errors import IsthmusError

Clock = Callable[[], float]


class CaptureUnavailable(IsthmusError):
    """This device has no usable camera or microphone."""


@dataclass(frozen=True)
class Taken:
    """A clip ready for the encoders, and the milliseconds that decoding took."""

    ref: ClipRef
    clip: DecodedClip
    decode_ms: float


def replay(
    refs: Iterable[ClipRef], spec: InputSpec, clock: Clock, on_damage: Callable[[Damage], None]
) -> Iterator[Taken]:
    """Decode one clip at a time, in order. An unusable clip is reported to ``on_damage`` and left out."""
    for ref in refs:
        began_s = clock()
        try:
            clip = decode(ref, spec)
        except ClipError as error:
            on_damage(Damage(error.name, error.reason))
            continue
        yield Taken(ref, clip, (clock() - began_s) * 1000)


def raw_bytes(refs: Iterable[ClipRef]) -> int:
    """Return the bytes of the clips' files: the cost of sending them raw."""
    paths = {path for ref in refs for path in (ref.audio_path, ref.video_path) if path is not None}
    return sum(path.stat().st_size for path in paths if path.is_file())


def read_names(path: Path) -> tuple[str, ...]:
    """Read clip names from a text file, one per line, without blank lines and ``#`` comments. Raises ValueError."""
    try:
        lines = read_text(path).splitlines()
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: the list of clips cannot be read: {_reason(error)}") from error
    names = tuple(line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#"))
    if not names or len(set(names)) != len(names):
        raise ValueError(f"{path}: the list is empty or names a clip twice")
    return names


def _reason(error: OSError | ValueError) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error)


class LiveCapture:
    """Clips of ``spec.duration_s`` from a camera and the default microphone. A context manager.

    Opening it and recording raise CaptureUnavailable, which names what is missing.
    """

    def __init__(self, spec: InputSpec, clock: Clock, *, camera: int = 0) -> None:
        self._spec = spec
        self._clock = clock
        self._sound = _sound_library()
        self._camera = _open_camera(camera)

    def record(self, name: str) -> Taken:
        """Record one clip; blocks for its duration."""
        try:
            recording_T1 = self._sound.rec(
                self._spec.samples, samplerate=self._spec.sample_rate_hz, channels=1, dtype="float32"
            )
            pictures = self._pictures()
            self._sound.wait()
        except self._sound.PortAudioError as error:
            raise CaptureUnavailable(f"the microphone cannot be read: {error}") from error
        began_s = self._clock()
        waveform_T = np.clip(np.asarray(recording_T1, dtype=np.float32)[:, 0], -1.0, 1.0)
        picked = evenly_spread(self._spec.frames_stored, len(pictures))
        clip = DecodedClip(
            spectrogram_FT=spectrogram(waveform_T, self._spec),
            frames_KHWC=np.stack([stored_frame(pictures[index], self._spec) for index in picked]),
        )
        return Taken(ClipRef(name, None, None, None, None), clip, (self._clock() - began_s) * 1000)

    def close(self) -> None:
        self._camera.release()

    def __enter__(self) -> "LiveCapture":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _pictures(self) -> list[npt.NDArray[np.uint8]]:
        """Return the RGB pictures of one clip, at most four times as many as are kept."""
        every_s = self._spec.duration_s / (4 * self._spec.frames_stored)
        until_s = self._clock() + self._spec.duration_s
        due_s = self._clock()
        pictures: list[npt.NDArray[np.uint8]] = []
        while self._clock() < until_s:
            seen, picture_HWC = self._camera.read()
            if not seen:
                raise CaptureUnavailable("the camera stopped delivering pictures")
            if self._clock() >= due_s:
                pictures.append(np.ascontiguousarray(picture_HWC[:, :, ::-1]))
                due_s += every_s
        if not pictures:
            raise CaptureUnavailable("the camera delivered no picture during a clip")
        return pictures


def _sound_library() -> Any:
    try:
        sounddevice: Any = importlib.import_module("sounddevice")
    except ModuleNotFoundError as error:
        raise CaptureUnavailable("live sound needs the package sounddevice: pip install sounddevice") from error
    except OSError as error:
        raise CaptureUnavailable(
            "live sound needs the PortAudio library (Debian: apt install libportaudio2)"
        ) from error
    try:
        sounddevice.check_input_settings()
    except (sounddevice.PortAudioError, ValueError) as error:
        raise CaptureUnavailable(f"no usable microphone: {error}") from error
    return sounddevice


def _open_camera(index: int) -> Any:
    import cv2

    camera = cv2.VideoCapture(index)
    if not camera.isOpened():
        camera.release()
        raise CaptureUnavailable(f"camera {index} cannot be opened: is it plugged in, and may this user read it?")
    return camera
