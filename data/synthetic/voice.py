"""Synthetic speech: glottal pulses through the formants of vowels, with prosody that expresses an emotion.

It is not a recording. Source and filter after Fant (1960): pulses of Rosenberg's shape (1971), resonances in cascade,
and breath noise. T samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from scipy import signal

RATE_HZ: Final = 16_000

CUES: Final = ("pitch", "range", "slope", "rate", "brightness", "roughness")
"""The features that express an emotion, each around -1..1, and 0 for a neutral voice."""

FORMANTS_HZ: Final = {
    "a": (730, 1090, 2440),
    "e": (530, 1840, 2480),
    "i": (270, 2290, 3010),
    "o": (570, 840, 2410),
    "u": (300, 870, 2240),
    "A": (660, 1720, 2410),
}
_HIGHER_HZ: Final = (3500, 4500, 5500)
"""Resonances that all vowels share; without them there would be no sound above the third formant."""
_BANDWIDTHS_HZ: Final = (70.0, 100.0, 150.0, 220.0, 300.0, 400.0)


@dataclass(frozen=True)
class Voice:
    """The properties of an actor's voice that are the same in every utterance."""

    pitch_hz: float
    tract: float
    """Factor on all formants: above 1 for a short vocal tract."""
    breath: float

    @staticmethod
    def draw(rng: np.random.Generator) -> "Voice":
        return Voice(
            float(95 * 2 ** rng.uniform(0, 1.2)), float(rng.uniform(0.86, 1.18)), float(rng.uniform(0.01, 0.06))
        )

    def spread(self, factor: float) -> "Voice":
        """Return this voice moved away from the average one, or towards it: its difference (for pitch and tract in
        octaves) times ``factor``.
        """
        if factor == 1:
            return self
        return Voice(
            _AVERAGE.pitch_hz * (self.pitch_hz / _AVERAGE.pitch_hz) ** factor,
            _AVERAGE.tract * (self.tract / _AVERAGE.tract) ** factor,
            max(0.0, _AVERAGE.breath + factor * (self.breath - _AVERAGE.breath)),
        )


_AVERAGE: Final = Voice(pitch_hz=95 * 2**0.6, tract=1.02, breath=0.035)
"""The middle of every range that ``Voice.draw`` draws from."""


def speak(
    voice: Voice, cues_V: npt.NDArray[np.float64], vowels: Sequence[str], rng: np.random.Generator, *, snr_db: float
) -> npt.NDArray[np.float32]:
    """Return an utterance, a syllable per vowel, over background noise ``snr_db`` below it: float32 (T,) in [-1, 1]."""
    pitch, spread, slope, rate, brightness, roughness = np.clip(cues_V, -1.6, 1.6)
    syllable_s = 2 ** (-0.7 * rate) / 4.2 * rng.uniform(0.92, 1.08, len(vowels))
    edges_T = np.concatenate([[0.0], np.cumsum(syllable_s)])
    count = round(edges_T[-1] * RATE_HZ)
    time_T = np.arange(count) / RATE_HZ

    accents = rng.normal(0.0, 1.0, len(vowels))
    centres = (edges_T[:-1] + edges_T[1:]) / 2
    octaves_T = 0.6 * pitch + 0.13 * 2 ** (1.3 * spread) * np.interp(time_T, centres, accents)
    octaves_T += 0.5 * slope * (time_T / edges_T[-1] - 0.5)
    shake = 0.05 * max(0.0, roughness)
    octaves_T += shake * np.sin(2 * np.pi * rng.uniform(6.0, 8.0) * time_T)
    steps_s = np.linspace(0, edges_T[-1], int(edges_T[-1] * 100) + 2)
    octaves_T += shake * np.interp(time_T, steps_s, rng.normal(size=len(steps_s)))
    pitch_T = np.clip(voice.pitch_hz * 2**octaves_T, 55.0, 700.0)

    source_T = _glottal(pitch_T, open_share=0.6 - 0.2 * brightness)
    pole = float(np.clip(0.45 - 0.5 * brightness, -0.4, 0.95))
    source_T = signal.lfilter([1 - pole], [1, -pole], source_T)
    source_T /= source_T.std() + 1e-9
    source_T += (voice.breath + 0.3 * max(0.0, roughness)) * rng.normal(size=count)

    speech_T = np.zeros(count)
    for vowel, start, end in zip(vowels, edges_T[:-1], edges_T[1:], strict=True):
        reach = 0.15 * (end - start)
        first, last = max(0, round((start - reach) * RATE_HZ)), min(count, round((end + reach) * RATE_HZ))
        envelope = signal.windows.tukey(last - first, 0.6) * rng.uniform(0.7, 1.0)
        speech_T[first:last] += envelope * signal.sosfilt(_formants(vowel, voice.tract), source_T[first:last])
    speech_T /= np.abs(speech_T).max() + 1e-9

    silence = [np.zeros(round(rng.uniform(0.08, 0.2) * RATE_HZ)) for _ in range(2)]
    whole_T = np.concatenate([silence[0], speech_T, silence[1]])
    noise_T = signal.lfilter([1.0], [1, -0.7], rng.normal(size=len(whole_T)))
    noise_T *= speech_T.std() / (noise_T.std() + 1e-9) * 10 ** (-snr_db / 20)
    whole_T = rng.uniform(0.3, 0.8) * (whole_T + noise_T)
    return np.asarray(np.clip(whole_T, -1.0, 1.0), np.float32)


def _glottal(pitch_T: npt.NDArray[np.float64], open_share: float) -> npt.NDArray[np.float64]:
    """Return the derivative of the air flow through the vocal folds, which open for two thirds of ``open_share`` of a
    period.
    """
    phase_T = np.cumsum(pitch_T / RATE_HZ) % 1.0
    opening, closing = open_share * 2 / 3, open_share / 3
    flow_T = np.where(
        phase_T < opening,
        0.5 * (1 - np.cos(np.pi * phase_T / opening)),
        np.where(phase_T < open_share, np.cos(np.pi / 2 * (phase_T - opening) / closing), 0.0),
    )
    return np.diff(flow_T, prepend=0.0)


def _formants(vowel: str, tract: float) -> npt.NDArray[Any]:
    """Return second-order sections of the vowel's resonances, each of gain one at zero frequency."""
    sections = []
    for formant_hz, bandwidth_hz in zip((*FORMANTS_HZ[vowel], *_HIGHER_HZ), _BANDWIDTHS_HZ, strict=True):
        radius = np.exp(-np.pi * bandwidth_hz / RATE_HZ)
        a1 = -2 * radius * np.cos(2 * np.pi * min(formant_hz * tract, 0.45 * RATE_HZ) / RATE_HZ)
        sections.append([1 + a1 + radius**2, 0.0, 0.0, 1.0, a1, radius**2])
    return np.array(sections)
