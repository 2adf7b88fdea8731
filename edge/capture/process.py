"""Clips from a camera and a microphone, captured in a child process that is killed if it hangs or freezes."""

import contextlib
import subprocess
import sys
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from isthmus.data.clip import ClipRef, DecodedClip
from isthmus.data.transforms import InputSpec, evenly_spread, spectrogram, stored_frame
from isthmus.edge.capture import watch
from isthmus.edge.capture.assembly import Block, StampedPicture, pictures_of, sound_of
from isthmus.edge.capture.gates import (
    FRAMING,
    FaceGate,
    Picture,
    VoiceGate,
    Waveform,
    find_voice_gate,
    framed,
    resampled,
)
from isthmus.edge.capture.records import BadRecord, Note, Source, read_record
from isthmus.edge.capture.sources import Clock, Taken
from isthmus.edge.capture.watch import Health, Seen

NOBODY: Final = "nobody here"
_LOOK_S: Final = 0.1
_SETTLE_S: Final = 0.3
"""How long after a clip's end its last pictures and sound may still be in the pipe."""
_KEEP_S: Final = 2.0
"""What is older than a clip and this is dropped."""
_RESTART_FIRST_S, _RESTART_MOST_S = 1.0, 30.0
_MOST_PATIENCE: Final = 5
"""A child that is started again and again gets up to so many times OPENING_S more to give its first picture."""
_SAID: Final = {
    (Source.CAMERA, Health.FROZEN): "the camera shows one and the same picture; it is restarted",
    (Source.CAMERA, Health.GONE): "the camera gives no pictures any more; it is restarted",
    (Source.MICROPHONE, Health.GONE): "the microphone gives no sound any more; it is restarted",
    (Source.MICROPHONE, Health.MUTED): "the microphone gives nothing but silence: is it muted?",
}


@dataclass(frozen=True)
class Captured:
    """What a stretch of time has brought. ``taken`` is None if nothing of use came; ``reason`` says why.

    ``waveform_T``: mono at the spec's rate, and ``pictures``: RGB, cut around the face; None for what was not captured
    or is of no use.
    """

    taken: Taken | None
    reason: str = ""
    waveform_T: Waveform | None = None
    pictures: Sequence[Picture] | None = None


class Capture:
    """A camera and a microphone, see ``cameras.open_camera`` and ``microphones.open_microphone``. A context manager.

    ``gated``: a clip needs a voice or a face; else everything is a clip. ``framing``: see ``gates.framed``. ``say`` is
    called with what a person should know, once per trouble.
    """

    def __init__(
        self,
        spec: InputSpec,
        clock: Clock,
        say: Callable[[str], None],
        *,
        camera: str = "0",
        microphone: str = "",
        gated: bool = True,
        framing: float = FRAMING,
        wait: Callable[[float], None] = time.sleep,
        command: Sequence[str] | None = None,
    ) -> None:
        self._spec = spec
        self._clock = clock
        self._say = say
        self._wait = wait
        self._gated = gated
        self._framing = framing
        self._uses = {Source.CAMERA: camera != "none", Source.MICROPHONE: microphone != "none"}
        # -P: a folder called isthmus in the working directory must not be imported.
        recorder = [sys.executable, "-P", "-m", "isthmus.edge.capture.recorder"]
        self._command = [*(command or recorder), camera, microphone, str(spec.sample_rate_hz)]
        self._voice: VoiceGate = find_voice_gate()
        self._face = FaceGate()
        self._lock = threading.Lock()
        self._pictures: deque[StampedPicture] = deque()
        self._blocks: deque[Block] = deque()
        self._seen: dict[Source, Seen] = {}
        self._notes: dict[Source, str] = {}
        self._said: dict[Source, str] = {}
        self._restarts = 0
        self._restart_at_s = 0.0
        self._child: subprocess.Popen[bytes] | None = None
        self._start()

    def next_clip(self, name: str) -> Captured:
        """Capture for the spec's duration from now on, and return what came of it."""
        start_s = self._clock()
        end_s = start_s + self._spec.duration_s
        while self._clock() < end_s + _SETTLE_S:
            self._wait(_LOOK_S)
            self._look()
        with self._lock:
            blocks, pictures = list(self._blocks), list(self._pictures)
        began_s = self._clock()
        return self._told(
            name, sound_of(blocks, start_s, end_s), blocks, pictures_of(pictures, start_s, end_s), began_s
        )

    def recent(self) -> tuple[list[Block], StampedPicture | None]:
        """Return the blocks of sound and the newest picture of the last seconds. Any thread may call it.

        What is older than a clip and two seconds is left out; a source that gives nothing leaves its part empty.
        """
        with self._lock:
            return list(self._blocks), self._pictures[-1] if self._pictures else None

    def close(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            child.wait()
            assert child.stdout is not None
            child.stdout.close()

    def __enter__(self) -> "Capture":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _told(
        self,
        name: str,
        sound_T: npt.NDArray[np.float32] | None,
        blocks: Sequence[Block],
        pictures: Sequence[Picture] | None,
        began_s: float,
    ) -> Captured:
        waveform_T = None if sound_T is None else resampled(sound_T, blocks[-1].rate_hz, self._spec.sample_rate_hz)
        if waveform_T is None and pictures is None:
            return Captured(None, "; ".join(filter(None, self._notes.values())) or "no picture and no sound came")
        if self._gated:
            if waveform_T is not None and not self._voice(waveform_T, self._spec.sample_rate_hz):
                waveform_T = None
            face = None if pictures is None else self._face.find(pictures)
            pictures = (
                None if face is None or pictures is None else [framed(each, face, self._framing) for each in pictures]
            )
            if waveform_T is None and pictures is None:
                return Captured(None, NOBODY)
        if pictures is not None:
            picked = evenly_spread(self._spec.frames_stored, len(pictures))
            pictures = [pictures[place] for place in picked]
        if waveform_T is not None:
            waveform_T = np.clip(waveform_T, -1.0, 1.0)
        clip = DecodedClip(
            None if waveform_T is None else spectrogram(waveform_T, self._spec),
            None if pictures is None else np.stack([stored_frame(each, self._spec) for each in pictures]),
        )
        taken = Taken(ClipRef(name, None, None, None, None), clip, (self._clock() - began_s) * 1000)
        return Captured(taken, "", waveform_T, pictures)

    def _start(self) -> None:
        since_s = self._clock() + self._opening_s() - watch.OPENING_S
        with self._lock:
            self._seen = {source: Seen(since_s) for source, used in self._uses.items() if used}
            self._notes = {}
        child = subprocess.Popen(
            self._command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._child = child
        threading.Thread(target=self._read, args=(child,), name="isthmus-capture", daemon=True).start()

    def _read(self, child: "subprocess.Popen[bytes]") -> None:
        assert child.stdout is not None
        with contextlib.suppress(BadRecord, OSError, ValueError):
            while (record := read_record(child.stdout)) is not None:
                with self._lock:
                    if self._child is not child:
                        return
                    self._take(record)
        child.kill()  # It has ended, or writes nonsense. ``_look`` notices that nothing comes any more.

    def _take(self, record: Block | StampedPicture | Note) -> None:
        now_s = self._clock()
        match record:
            case Note(source, text):
                self._notes[source] = text
            case StampedPicture(_, picture_HWC):
                self._pictures.append(record)
                self._came(Source.CAMERA, now_s, zlib.crc32(picture_HWC.data) | 1)
            case Block(_, _, samples_T):
                self._blocks.append(record)
                self._came(Source.MICROPHONE, now_s, zlib.crc32(samples_T.data) | 1 if samples_T.any() else 0)
        oldest_s = now_s - self._spec.duration_s - _KEEP_S
        for kept in (self._pictures, self._blocks):
            while kept and kept[0].at_s < oldest_s:
                kept.popleft()

    def _came(self, source: Source, now_s: float, digest: int) -> None:
        if source in self._seen:
            self._seen[source] = watch.came(self._seen[source], now_s, digest)

    def _look(self) -> None:
        """Say what is wrong, and restart a child that hangs or has frozen."""
        now_s = self._clock()
        with self._lock:
            seen, notes = dict(self._seen), dict(self._notes)
        again, sound = False, True
        for source, each in seen.items():
            health = (watch.camera_health if source is Source.CAMERA else watch.microphone_health)(each, now_s)
            text = notes.get(source, "")
            if not text and (source, health) in _SAID:
                text = _SAID[source, health]
                again |= health in (Health.FROZEN, Health.GONE)
            sound &= health in (Health.WELL, Health.MUTED) or bool(notes.get(source))
            if text and text != self._said.get(source):
                self._say(text)
            if text or health is Health.WELL:
                self._said[source] = text
        if sound:
            self._restarts = 0
        if again and now_s >= self._restart_at_s:
            pause_s = min(_RESTART_MOST_S, _RESTART_FIRST_S * 2.0 ** min(self._restarts, 8))
            self._restarts += 1
            self._restart_at_s = now_s + self._opening_s() + pause_s
            self.close()
            self._start()

    def _opening_s(self) -> float:
        """Return how long the present child may take for its first picture or sound.

        Each start gets more time than the one before: a slow or busy board may need it to load the libraries.
        """
        return watch.OPENING_S * (1 + min(self._restarts, _MOST_PATIENCE))
