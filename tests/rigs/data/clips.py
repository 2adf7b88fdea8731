"""Synthetic clips in CREMA-D's layout for tests: takes of each emotion."""

from pathlib import Path

import numpy as np

from isthmus.data.media.encode import write_flv, write_wav

EMOTIONS = ("NEU", "HAP", "SAD", "FEA")
TAKES = 4


def write_tiny_clips(root: Path) -> None:
    """Write sixteen clips of half a second and six pictures each."""
    rng = np.random.default_rng(0)
    for folder in ("AudioWAV", "VideoFlash"):
        (root / folder).mkdir()
    for number in range(TAKES):
        for index, emotion in enumerate(EMOTIONS):
            name = f"1001_A{number:02}_{emotion}_XX"
            sound_T = (0.3 * np.sin(np.arange(8_000) * (0.05 + 0.05 * index))).astype(np.float32)
            pictures = rng.integers(0, 255, (6, 32, 32, 3), np.uint8)
            write_wav(root / "AudioWAV" / f"{name}.wav", sound_T, 16_000)
            write_flv(root / "VideoFlash" / f"{name}.flv", pictures, 12, sound_T, 16_000)
