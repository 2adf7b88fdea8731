"""The ONNX graphs of clips' preparation compute what ``transforms`` computes."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx", reason="the graphs need the package onnx")

import onnxruntime
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.data.transforms import InputSpec, evaluation_frames, fitted, spectrogram, stored_frame
from isthmus.page import graphs

SPECS = {
    "paper": InputSpec(),
    "small": InputSpec(spectrogram_bins=128, spectrogram_columns=128, frame_px=64, stored_px=72),
    "odd window": InputSpec(window=401, hop=160, spectrogram_bins=100, spectrogram_columns=90),
    "mel": InputSpec(window=400, hop=160, spectrogram_bins=40, spectrogram_columns=298, mel=True),
    "short": InputSpec(8_000, 0.5, 256, 128, 65, 28, frame_px=48, stored_px=48, frames_stored=4),
}
MOST_OFF = 1e-3
"""Of a standardised spectrogram; mel energies are compared relative to their largest."""


def run(model: bytes, value: Any) -> Any:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: value})[0]


def waveforms(spec: InputSpec) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    time_T = np.arange(spec.samples) / spec.sample_rate_hz
    return {
        "noise": rng.normal(0, 0.1, spec.samples).astype(np.float32),
        "tone": (0.3 * np.sin(2 * np.pi * 440 * time_T) + rng.normal(0, 1e-4, spec.samples)).astype(np.float32),
        "too loud": rng.normal(0, 2, spec.samples).astype(np.float32),
        # Far below this, at -80 dB, hardly more than the rounding of the logarithm is left, which differs by a bit.
        "quiet": rng.normal(0, 0.01, spec.samples).astype(np.float32),
    }


@pytest.mark.parametrize("name", SPECS)
def test_the_spectrogram_is_the_same(name: str) -> None:
    spec = SPECS[name]
    model = graphs.spectrogram_graph(spec)
    for what, waveform_T in waveforms(spec).items():
        expected_FT = spectrogram(waveform_T, spec)
        (made_FT,) = run(model, fitted(waveform_T, spec))
        assert made_FT.shape == expected_FT.shape and made_FT.dtype == np.float32
        scale = float(np.abs(expected_FT).max()) if spec.mel else 1.0
        assert float(np.abs(made_FT - expected_FT).max()) <= MOST_OFF * scale, what


@pytest.mark.parametrize("name", SPECS)
def test_silence_is_the_same(name: str) -> None:
    spec = SPECS[name]
    (made_FT,) = run(graphs.spectrogram_graph(spec), np.zeros(spec.samples, np.float32))
    assert np.array_equal(made_FT, spectrogram(np.zeros(spec.samples, np.float32), spec))


@settings(max_examples=30, deadline=None)
@given(side=st.integers(20, 500), stored=st.integers(16, 160), frame=st.integers(16, 160), seed=st.integers(0, 99))
def test_a_picture_is_the_same_but_for_one_level(side: int, stored: int, frame: int, seed: int) -> None:
    spec = replace(InputSpec(), stored_px=stored, frame_px=frame, frames_stored=1, frames_used=1)
    picture_SS3 = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    (expected_CHW,) = evaluation_frames(stored_frame(picture_SS3, spec)[np.newaxis], spec)
    made_CHW = run(graphs.picture_graph(spec), picture_SS3)
    one_level = 1 / (255 * 0.224)
    off_CHW = np.abs(made_CHW - expected_CHW)
    assert made_CHW.shape == expected_CHW.shape
    assert off_CHW.max() <= 2.1 * one_level, "each of two resizes may round to the neighbouring level"
    assert off_CHW.mean() <= 0.3 * one_level


def test_the_paper_pictures_are_the_same() -> None:
    spec = SPECS["paper"]
    rng = np.random.default_rng(3)
    picture_SS3 = rng.integers(0, 256, (480, 480, 3), dtype=np.uint8)
    (expected_CHW, *_) = evaluation_frames(np.stack([stored_frame(picture_SS3, spec)] * spec.frames_stored), spec)
    off_CHW = np.abs(run(graphs.picture_graph(spec), picture_SS3) - expected_CHW)
    assert off_CHW.mean() <= 1e-3
