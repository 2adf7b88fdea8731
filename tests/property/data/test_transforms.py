"""For any sound and spec: the promised shape, finite and standardised; positions are sorted and in range."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.data.transforms import InputSpec, evenly_spread, spectrogram


@settings(max_examples=40)
@given(
    samples=st.integers(1, 20_000),
    loudness=st.floats(1e-6, 100),
    bins=st.integers(1, 129),
    columns=st.integers(1, 98),
    seed=st.integers(0, 1000),
)
def test_spectrogram(samples: int, loudness: float, bins: int, columns: int, seed: int) -> None:
    spec = InputSpec(duration_s=1.0, window=256, hop=160, spectrogram_bins=bins, spectrogram_columns=columns)
    waveform_T = (loudness * np.random.default_rng(seed).normal(size=samples)).astype(np.float32)
    made = spectrogram(waveform_T, spec)
    assert made.shape == (bins, columns)
    assert np.isfinite(made).all()
    assert abs(float(made.mean(dtype=np.float64))) < 1e-3
    assert float(made.std(dtype=np.float64)) < 1.001


@given(count=st.integers(1, 50), of=st.integers(1, 5_000))
def test_evenly_spread(count: int, of: int) -> None:
    positions = evenly_spread(count, of)
    steps = np.diff(positions)
    assert len(positions) == count
    assert positions[0] >= 0
    assert positions[-1] < of
    assert (steps >= (1 if count <= of else 0)).all()
    assert count == 1 or steps.max() - steps.min() <= 1
