"""Whether a clip is of use: does somebody speak, and is there a face?

A voice is found by Silero's network if the package ``silero-vad`` is installed, else by energy alone. A face is found
by the cascade that comes with OpenCV. The picture is cut around the face as the training data is framed.
"""

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import numpy.typing as npt

Waveform = npt.NDArray[np.float32]
Picture = npt.NDArray[np.uint8]
Box = tuple[int, int, int, int]
"""Left, top, width and height, in pixels."""

VOICE_S: Final = 0.3
"""So much of a clip must be voice."""
FRAME_S: Final = 0.03
QUIETEST: Final = 0.003
"""Root mean square below which a frame is silent, whatever the noise: -50 dB of full scale."""
ABOVE_NOISE: Final = 3.0
"""How many times as loud as the quietest tenth of the clip a voice is (10 dB)."""
FRAMING: Final = 1.5
"""Side of the cut-out square, in widths of the face. It should be that of the data that the teacher learned from."""
FACE_SHARE: Final = 0.12
"""The smallest face, as a share of the picture's height."""
SEARCHED_PX: Final = 240
"""Larger pictures are searched at this height: the smallest face is 29 of these pixels, and the detector's is 24."""
STILL_LEVELS: Final = 6
"""A picture is that of the empty room as long as no part of it has changed by more (of 256 levels)."""
SEARCHED_AGAIN: Final = 60
"""After so many such pictures one is searched anyway: somebody who keeps still may have been missed the first time."""
_PARTS: Final = (32, 24)
_SILERO_HZ: Final = 16_000
_SILERO_SAMPLES, _SILERO_CONTEXT = 512, 64
_SILERO_SURE: Final = 0.5

VoiceGate = Callable[[Waveform, int], bool]
"""Returns whether somebody speaks in mono samples of this rate."""


def voice_by_energy(waveform_T: Waveform, rate_hz: int) -> bool:
    """Return whether VOICE_S of the clip are clearly louder than its quietest tenth.

    A steady noise is no voice, however loud; a voice that fills the whole clip without a pause counts if it is far
    above silence and changes in loudness.
    """
    size = max(1, round(FRAME_S * rate_hz))
    frames = len(waveform_T) // size
    if not frames:
        return False
    loudness_N = np.sqrt(np.square(waveform_T[: frames * size].reshape(frames, size), dtype=np.float64).mean(axis=1))
    noise = float(np.quantile(loudness_N, 0.1))
    threshold = max(QUIETEST, ABOVE_NOISE * noise)
    return bool(np.count_nonzero(loudness_N > threshold) * FRAME_S >= VOICE_S)


class SileroGate:
    """Silero's voice activity detector on ONNX Runtime. ``path`` is its model for 16 kHz."""

    def __init__(self, path: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self._session: Any = onnxruntime.InferenceSession(
            str(path), sess_options=options, providers=["CPUExecutionProvider"]
        )

    def __call__(self, waveform_T: Waveform, rate_hz: int) -> bool:
        samples_T = resampled(waveform_T, rate_hz, _SILERO_HZ)
        state, context_T = np.zeros((2, 1, 128), np.float32), np.zeros(_SILERO_CONTEXT, np.float32)
        spoken_s = 0.0
        for start in range(0, len(samples_T) - _SILERO_SAMPLES + 1, _SILERO_SAMPLES):
            part_T = samples_T[start : start + _SILERO_SAMPLES]
            inputs = {
                "input": np.concatenate([context_T, part_T])[None],
                "state": state,
                "sr": np.array(_SILERO_HZ, np.int64),
            }
            probability, state = self._session.run(None, inputs)
            context_T = part_T[-_SILERO_CONTEXT:]
            if float(probability[0, 0]) >= _SILERO_SURE:
                spoken_s += _SILERO_SAMPLES / _SILERO_HZ
        return spoken_s >= VOICE_S


def find_voice_gate() -> VoiceGate:
    """Return Silero's detector if its package is installed, without importing it: it would import torch."""
    found = importlib.util.find_spec("silero_vad")
    for folder in (found.submodule_search_locations or ()) if found is not None else ():
        path = Path(folder) / "data" / "silero_vad.onnx"
        if path.is_file():
            return SileroGate(path)
    return voice_by_energy


class FaceGate:
    """OpenCV's frontal face cascade (Viola and Jones, CVPR 2001). It needs no download and no GPU."""

    def __init__(self) -> None:
        import cv2

        data: Any = cv2.data  # type: ignore[attr-defined]
        self._cascade = cv2.CascadeClassifier(str(Path(data.haarcascades) / "haarcascade_frontalface_default.xml"))
        self._empty: npt.NDArray[np.uint8] | None = None
        self._passed_over = 0

    def faces(self, picture_HWC: Picture) -> list[Box]:
        """Return the faces of an RGB picture, the largest first."""
        import cv2

        grey, shrunk = cv2.cvtColor(picture_HWC, cv2.COLOR_RGB2GRAY), picture_HWC.shape[0] / SEARCHED_PX
        if shrunk > 1:
            size = (round(picture_HWC.shape[1] / shrunk), SEARCHED_PX)
            grey = cv2.resize(grey, size, interpolation=cv2.INTER_AREA)
        least = max(24, round(FACE_SHARE * grey.shape[0]))
        found = self._cascade.detectMultiScale(
            cv2.equalizeHist(grey), scaleFactor=1.15, minNeighbors=4, minSize=(least, least)
        )
        boxes = [cast(Box, tuple(int(side * max(1.0, shrunk)) for side in each)) for each in found]
        return sorted(boxes, key=lambda box: -box[2])

    def find(self, pictures: Sequence[Picture]) -> Box | None:
        """Return the box of the largest face in the middle picture, or else in one at a quarter or three quarters.

        None if there is no face in any of them. The search takes most of an idle device's processor time, so a room
        that was empty is searched again only if something in it has changed, or after ``SEARCHED_AGAIN`` pictures.
        """
        count = len(pictures)
        for place in dict.fromkeys((count // 2, count // 4, 3 * count // 4)):
            parts = _parts(pictures[place])
            if self._is_empty(parts) and self._passed_over < SEARCHED_AGAIN:
                self._passed_over += 1
                continue
            self._passed_over = 0
            faces = self.faces(pictures[place])
            if faces:
                return faces[0]
            self._empty = parts
        return None

    def _is_empty(self, parts: npt.NDArray[np.uint8]) -> bool:
        empty = self._empty
        return empty is not None and int(np.abs(parts.astype(np.int16) - empty).max()) <= STILL_LEVELS


def _parts(picture_HWC: Picture) -> npt.NDArray[np.uint8]:
    """Return the mean brightness of each part of a picture."""
    import cv2

    small_HWC = cv2.resize(picture_HWC, _PARTS, interpolation=cv2.INTER_AREA)
    return np.asarray(cv2.cvtColor(small_HWC, cv2.COLOR_RGB2GRAY), np.uint8)


def framed(picture_HWC: Picture, face: Box, framing: float = FRAMING) -> Picture:
    """Return the square around a face, ``framing`` faces wide if the picture allows. At an edge it is moved inwards."""
    height, width = picture_HWC.shape[:2]
    left, top, face_width, face_height = face
    side = min(height, width, max(1, round(framing * face_width)))
    x = min(max(0, left + face_width // 2 - side // 2), width - side)
    y = min(max(0, top + face_height // 2 - side // 2), height - side)
    return picture_HWC[y : y + side, x : x + side]


def resampled(waveform_T: Waveform, rate_hz: int, wanted_hz: int) -> Waveform:
    """Return the samples at another rate, as many as fit into the same time."""
    if rate_hz == wanted_hz:
        return waveform_T
    # FFmpeg's resampler, since PyAV is loaded anyway: scipy's takes 60 MB of memory.
    import av

    resampler = av.AudioResampler(format="flt", layout="mono", rate=wanted_hz)
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(waveform_T[np.newaxis], np.float32), "flt", "mono")
    frame.rate = rate_hz
    parts = [each.to_ndarray()[0] for each in (*resampler.resample(frame), *resampler.resample(None))]
    made_T = np.concatenate(parts) if parts else np.zeros(0, np.float32)
    wanted = round(len(waveform_T) * wanted_hz / rate_hz)
    return np.asarray(np.pad(made_T[:wanted], (0, max(0, wanted - len(made_T)))), np.float32)
