"""A look at what camera and microphone give just now: a JPEG picture, the face in it, and the sound as a spectrogram.

Nothing is computed before somebody looks, and two who look at once share one result.
"""

import base64
import threading
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from isthmus.data.transforms import InputSpec, spectrogram
from isthmus.edge.capture.assembly import Block
from isthmus.edge.capture.gates import FaceGate, Picture, resampled
from isthmus.edge.capture.process import Capture
from isthmus.edge.capture.sources import Clock

AGAIN_S: Final = 0.1
FACE_EVERY_S: Final = 0.4
JPEG_QUALITY: Final = 70
SHOWN_BINS: Final = 64
SHOWN_COLUMNS: Final = 150
DEVIATIONS: Final = 3.0
"""Standard deviations above the mean that are shown as the brightest; the quietest sound is the darkest."""


class LiveView:
    """Looks at a capture. Any thread may call ``look``."""

    def __init__(self, capture: Capture, spec: InputSpec, clock: Clock) -> None:
        self._capture = capture
        self._spec = spec
        self._clock = clock
        self._lock = threading.Lock()
        self._face_gate: FaceGate | None = None
        self._face_due_s = 0.0
        self._faces: list[tuple[int, int, int, int]] = []
        self._known: tuple[float, dict[str, Any]] = (-1e9, {})

    def look(self) -> dict[str, Any]:
        """Return the picture with its faces and the spectrogram of the seconds that end now, as JSON can hold them."""
        with self._lock:
            now_s = self._clock()
            if now_s - self._known[0] >= AGAIN_S:
                blocks, picture = self._capture.recent()
                seen = None if picture is None else self._picture(picture.picture_HWC, now_s)
                self._known = (now_s, {"picture": seen, "sound": self._sound(blocks, now_s)})
            return self._known[1]

    def _picture(self, picture_HWC: Picture, now_s: float) -> dict[str, Any]:
        import cv2

        if now_s >= self._face_due_s:
            self._face_gate = self._face_gate or FaceGate()
            self._faces = self._face_gate.faces(picture_HWC)
            self._face_due_s = now_s + FACE_EVERY_S
        _, jpeg = cv2.imencode(".jpg", picture_HWC[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
        height, width = picture_HWC.shape[:2]
        return {
            "jpeg": base64.b64encode(jpeg.tobytes()).decode(),
            "width": width,
            "height": height,
            "faces": [list(face) for face in self._faces],
        }

    def _sound(self, blocks: Sequence[Block], now_s: float) -> dict[str, Any] | None:
        if not blocks:
            return None
        rate_hz = blocks[-1].rate_hz
        samples_T = np.concatenate([each.samples_T for each in blocks if each.rate_hz == rate_hz])
        wanted = round(rate_hz * self._spec.duration_s)
        held_T = np.zeros(wanted, np.float32)
        held_T[wanted - min(wanted, len(samples_T)) :] = samples_T[-wanted:]
        values_FT = spectrogram(resampled(held_T, rate_hz, self._spec.sample_rate_hz), self._spec)
        return {
            "bins": min(SHOWN_BINS, values_FT.shape[0]),
            "columns": min(SHOWN_COLUMNS, values_FT.shape[1]),
            "levels": base64.b64encode(shown_levels(values_FT).tobytes()).decode(),
            "seconds": self._spec.duration_s,
            "loudness": float(np.sqrt(np.mean(np.square(held_T[-rate_hz // 4 :], dtype=np.float64)))),
        }


def shown_levels(values_FT: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """Return a spectrogram as levels of grey (bins, columns), low frequencies first, small enough to be shown."""
    import cv2

    values_FT = (values_FT - values_FT.mean()) / (values_FT.std() + 1e-9)
    size = (min(SHOWN_COLUMNS, values_FT.shape[1]), min(SHOWN_BINS, values_FT.shape[0]))
    small_FT = cv2.resize(values_FT, size, interpolation=cv2.INTER_AREA)
    quietest = float(small_FT.min())
    levels_FT = np.round((small_FT - quietest) / (DEVIATIONS - quietest) * 255)
    return np.ascontiguousarray(np.clip(levels_FT, 0, 255), np.uint8)
