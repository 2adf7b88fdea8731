"""From waveform and frames to what the encoders read: the one definition that device and training share.

numpy, scipy and OpenCV only: the device installs this file.
Axes: T samples or spectrogram columns, F frequency bins, K frames of a clip, H W pixels, C channels.
"""

import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class InputSpec:
    """How a clip is prepared. It travels to the device as JSON, and is part of every cache key.

    The defaults are CREMA-D's of the paper: 3 s at 16 kHz, window 512, hop 159, so a spectrogram of 257 x 299.
    A preset may resize the spectrogram (area interpolation, before log and standardisation) and the frames.
    """

    sample_rate_hz: int = 16_000
    duration_s: float = 3.0
    window: int = 512
    hop: int = 159
    spectrogram_bins: int = 257
    spectrogram_columns: int = 299
    frame_px: int = 224
    """Side of the square that the encoder reads."""
    stored_px: int = 256
    """Side of the square that is decoded and cached; training crops from it."""
    frames_stored: int = 10
    frames_used: int = 2

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> "InputSpec":
        """Raises ValueError for text that is not exactly a spec's fields with sane bounds."""
        raw = json.loads(text)
        if not isinstance(raw, dict):
            raise ValueError("input spec: not a JSON object")
        try:
            spec = InputSpec(**raw)
        except TypeError as error:
            raise ValueError(f"input spec: {error}") from error
        for name, value in asdict(spec).items():
            if not isinstance(value, (int, float)) or not 0 < value <= 1_000_000:
                raise ValueError(f"input spec: {name} is {value!r}")
        return spec
