"""Synthetic audio-visual events: chimes, rattles and hisses with turning shapes, one recipe per category.

Nothing here was recorded; only the names of the categories are AVE's. K frames, H W pixels, C channels, T samples.
"""

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import cv2
import numpy as np
import numpy.typing as npt
from scipy import signal

RATE_HZ: Final = 16_000
DURATION_S: Final = 10
FPS: Final = 8
PX: Final = 128

CATEGORIES: Final = (
    "Church bell",
    "Male speech, man speaking",
    "Bark",
    "Fixed-wing aircraft, airplane",
    "Race car, auto racing",
    "Female speech, woman speaking",
    "Helicopter",
    "Violin, fiddle",
    "Flute",
    "Ukulele",
    "Frying (food)",
    "Truck",
    "Shofar",
    "Motorcycle",
    "Acoustic guitar",
    "Train horn",
    "Clock",
    "Banjo",
    "Goat",
    "Baby cry, infant cry",
    "Bus",
    "Chainsaw",
    "Cat",
    "Horse",
    "Toilet flush",
    "Rodents, rats, mice",
    "Accordion",
    "Mandolin",
)


@dataclass(frozen=True)
class Span:
    """The time of an event in a video, in whole seconds, as AVE annotates it."""

    category: int
    start_s: int
    end_s: int


@dataclass(frozen=True)
class Recipe:
    """The sound and look of a category."""

    base_hz: float
    repeat_hz: float
    hiss: float
    hue: float
    sides: int
    spin_hz: float

    @staticmethod
    def of(category: int) -> "Recipe":
        """Return the category's own recipe; consecutive categories differ strongly in sound and look."""
        return Recipe(
            base_hz=110 * 2 ** (4 * (category * 5 % 28) / 28),
            repeat_hz=0.8 * 2 ** (3 * (category * 11 % 28) / 28),
            hiss=(category % 3) / 2,
            hue=category * 9 % 28 / 28,
            sides=3 + category % 5,
            spin_hz=0.1 + 0.8 * (category * 13 % 28) / 28,
        )

    def varied(self, rng: np.random.Generator, spread: float) -> "Recipe":
        """Return one event of the category; ``spread`` is the deviation in octaves, and a tenth of it in hue."""
        return Recipe(
            base_hz=self.base_hz * 2 ** rng.normal(0, spread),
            repeat_hz=self.repeat_hz * 2 ** rng.normal(0, spread),
            hiss=float(np.clip(self.hiss + rng.normal(0, spread / 2), 0, 1)),
            hue=(self.hue + rng.normal(0, spread / 10)) % 1.0,
            sides=max(3, self.sides + round(rng.normal(0, spread))),
            spin_hz=self.spin_hz * 2 ** rng.normal(0, spread),
        )


def record(
    spans: Sequence[Span], rng: np.random.Generator, *, cue_spread: float, snr_db: float, grain: float
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    """Return a video: frames uint8 (K, PX, PX, 3) and sound float32 (T,), with nothing but noise outside the events."""
    waveform_T = rng.normal(0, 0.25 * 10 ** (-snr_db / 20), RATE_HZ * DURATION_S)
    backdrop = rng.integers(40, 200, 3)
    frames_KHWC = np.tile(backdrop.astype(np.float32), (FPS * DURATION_S, PX, PX, 1))
    for span in spans:
        recipe = Recipe.of(span.category).varied(rng, cue_spread)
        sound_T = _sound(recipe, span.end_s - span.start_s, rng)
        waveform_T[span.start_s * RATE_HZ : span.end_s * RATE_HZ] += sound_T
        place = rng.uniform(0.35, 0.65, 2) * PX
        for position in range(span.start_s * FPS, span.end_s * FPS):
            _shape(frames_KHWC[position], recipe, place, position / FPS)
    noise_HWC = rng.normal(0, grain, (PX + 32, PX + 32, 3)).astype(np.float32)
    for frame_HWC in frames_KHWC:
        top, left = rng.integers(32, size=2)
        frame_HWC += noise_HWC[top : top + PX, left : left + PX]
    return np.clip(frames_KHWC, 0, 255).astype(np.uint8), np.clip(waveform_T, -1, 1).astype(np.float32)


def _sound(recipe: Recipe, duration_s: int, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    time_T = np.arange(duration_s * RATE_HZ) / RATE_HZ
    tone_T = np.zeros_like(time_T)
    for harmonic in range(1, 7):
        if harmonic * recipe.base_hz < RATE_HZ / 2:
            tone_T += np.sin(2 * np.pi * harmonic * recipe.base_hz * time_T) / harmonic
    low = min(recipe.base_hz, RATE_HZ / 4) / (RATE_HZ / 2)
    hiss_T = signal.sosfilt(
        signal.butter(2, [low, min(0.95, 3 * low)], "band", output="sos"), rng.normal(size=len(time_T))
    )
    strike_T = np.exp(-4.0 * ((time_T * recipe.repeat_hz) % 1.0))
    mixed_T = (1 - recipe.hiss) * tone_T / tone_T.std() + recipe.hiss * hiss_T / (hiss_T.std() + 1e-9)
    return np.asarray(0.15 * strike_T * mixed_T, np.float64)


def _shape(frame_HWC: npt.NDArray[np.float32], recipe: Recipe, place: npt.NDArray[np.float64], time_s: float) -> None:
    turns = np.arange(recipe.sides) / recipe.sides + recipe.spin_hz * time_s
    radius = PX * (0.26 + 0.05 * np.exp(-4.0 * ((time_s * recipe.repeat_hz) % 1.0)))
    corners = place + radius * np.stack([np.cos(2 * np.pi * turns), np.sin(2 * np.pi * turns)], 1)
    colour = tuple(255 * channel for channel in colorsys.hsv_to_rgb(recipe.hue, 0.8, 0.9))
    cv2.fillPoly(frame_HWC, [np.round(corners).astype(np.int32)], colour)
