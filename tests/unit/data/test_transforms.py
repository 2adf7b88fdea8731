"""Spectrogram and frames against plain numpy, and their exact shapes."""

import json
from dataclasses import asdict, replace

import numpy as np
import numpy.typing as npt
import pytest

from isthmus.data.transforms import (
    IMAGENET_DEVIATION,
    IMAGENET_MEAN,
    LOG_FLOOR,
    MEL_LOUDNESS,
    InputSpec,
    all_frames,
    evaluation_frames,
    evenly_spread,
    frame_positions,
    mel_bands,
    spectrogram,
    stored_frame,
    training_frames,
    tukey,
)

CREMA_D = InputSpec()
AVE = InputSpec(duration_s=10.0, spectrogram_columns=1004)
SMALL = InputSpec(stored_px=24, frame_px=16)


def _noise(samples: int, seed: int = 0) -> npt.NDArray[np.float32]:
    return np.asarray(0.2 * np.random.default_rng(seed).normal(size=samples), np.float32)


def _reference_power(waveform_T: npt.NDArray[np.float32], spec: InputSpec) -> npt.NDArray[np.float64]:
    """One-sided power spectral density, window by window, in float64 and without scipy."""
    taper = int(0.25 * (spec.window - 1) / 2)
    ramp = 0.5 * (1 - np.cos(np.pi * np.arange(taper + 1) / (0.25 * spec.window / 2)))
    window = np.ones(spec.window)
    window[: taper + 1] = ramp
    periodic = np.arange(spec.window) > spec.window * (1 - 0.125)
    window[periodic] = 0.5 * (
        1 - np.cos(np.pi * (spec.window - np.arange(spec.window)[periodic]) / (0.25 * spec.window / 2))
    )
    cut = np.tile(waveform_T, -(-spec.samples // len(waveform_T)))[: spec.samples].clip(-1, 1).astype(np.float64)
    columns = []
    for start in range(0, spec.samples - spec.window + 1, spec.hop):
        piece = cut[start : start + spec.window]
        power = np.abs(np.fft.rfft((piece - piece.mean()) * window)) ** 2 / (spec.sample_rate_hz * (window**2).sum())
        power[1:-1] *= 2
        columns.append(power)
    return np.stack(columns, axis=1)


def _standardised(power_FT: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    log_FT = np.log(power_FT + 1e-7)
    return np.asarray((log_FT - log_FT.mean()) / log_FT.std(), np.float64)


@pytest.mark.parametrize(("spec", "shape"), [(CREMA_D, (257, 299)), (AVE, (257, 1004))])
def test_spectrogram_has_exactly_the_published_shape(spec: InputSpec, shape: tuple[int, int]) -> None:
    made = spectrogram(_noise(30_000), spec)
    assert made.shape == shape == spec.native_shape
    assert made.dtype == np.float32
    assert abs(float(made.mean())) < 1e-4
    assert float(made.std()) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("samples", [1_000, 48_000, 70_000])
def test_spectrogram_equals_plain_numpy(samples: int) -> None:
    waveform_T = 8 * _noise(samples)  # loud enough to be clipped
    made = spectrogram(waveform_T, CREMA_D)
    np.testing.assert_allclose(made, _standardised(_reference_power(waveform_T, CREMA_D)), atol=2e-3)


def test_smaller_spectrogram_is_the_area_mean_of_the_power() -> None:
    spec = replace(CREMA_D, window=510, hop=160, spectrogram_bins=64, spectrogram_columns=99)
    assert spec.native_shape == (256, 297)
    power_FT = _reference_power(_noise(48_000), spec).reshape(64, 4, 99, 3).mean(axis=(1, 3))
    np.testing.assert_allclose(spectrogram(_noise(48_000), spec), _standardised(power_FT), atol=2e-3)


def test_silence_gives_zeros_and_short_sound_is_tiled() -> None:
    assert not spectrogram(np.zeros(7, np.float32), CREMA_D).any()
    short = _noise(16_000)
    np.testing.assert_array_equal(spectrogram(short, CREMA_D), spectrogram(np.tile(short, 3), CREMA_D))


@pytest.mark.parametrize(
    "waveform", [np.zeros(0, np.float32), np.zeros((2, 8), np.float32), np.array([0, np.nan], np.float32)]
)
def test_unusable_waveforms_are_refused(waveform: npt.NDArray[np.float32]) -> None:
    with pytest.raises(ValueError, match="waveform"):
        spectrogram(waveform, CREMA_D)


@pytest.mark.parametrize(
    "change",
    [
        {"spectrogram_columns": 300},
        {"spectrogram_bins": 258},
        {"frames_used": 11},
        {"hop": 513},
        {"window": 512.0},
        {"stored_px": True},
        {"duration_s": 1e9},
        {"window": 65_536},
        {"sample_rate_hz": 0},
        {"unknown": 1},
    ],
)
def test_specs_that_make_no_sense_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="input spec"):
        InputSpec.from_json(json.dumps({**asdict(CREMA_D), **change}))


def test_spec_survives_json() -> None:
    assert InputSpec.from_json(AVE.to_json()) == AVE


def test_stored_frame_is_the_centre_square() -> None:
    picture_HWC = np.zeros((40, 80, 3), np.uint8)
    picture_HWC[:, 20:60] = 200
    stored_HWC = stored_frame(picture_HWC, SMALL)
    assert stored_HWC.shape == (24, 24, 3)
    assert (stored_HWC == 200).all()


def test_evaluation_takes_fixed_evenly_spaced_frames() -> None:
    assert frame_positions(CREMA_D).tolist() == [2, 7]
    assert evenly_spread(4, 3).tolist() == [0, 1, 1, 2]
    frames_KHWC = np.stack([np.full((24, 24, 3), 20 * k, np.uint8) for k in range(10)])
    made = evaluation_frames(frames_KHWC, SMALL)
    expected = (np.array([40, 140])[:, None] / 255 - IMAGENET_MEAN) / IMAGENET_DEVIATION
    assert made.shape == (2, 3, 16, 16)
    assert made.dtype == np.float32
    np.testing.assert_allclose(made, np.broadcast_to(expected[:, :, None, None], made.shape), atol=1e-5)
    np.testing.assert_array_equal(made, all_frames(frames_KHWC, SMALL)[[2, 7]])


def test_training_frames_are_distinct_in_time_order_and_drawn_by_the_generator() -> None:
    frames_KHWC = np.stack([np.full((24, 24, 3), 20 * k, np.uint8) for k in range(10)])
    seen = set()
    for seed in range(40):
        made = training_frames(frames_KHWC, SMALL, np.random.default_rng(seed))
        assert made.shape == (2, 3, 16, 16)
        levels = np.round((made[:, 0, 0, 0] * IMAGENET_DEVIATION[0] + IMAGENET_MEAN[0]) * 255 / 20).astype(int)
        assert levels[0] < levels[1]
        seen.update(levels.tolist())
        np.testing.assert_array_equal(made, training_frames(frames_KHWC, SMALL, np.random.default_rng(seed)))
    assert seen == set(range(10))


def test_training_crops_and_flips() -> None:
    ramp_HWC = np.broadcast_to(np.arange(24, dtype=np.uint8)[None, :, None] * 10, (24, 24, 3))
    frames_KHWC = np.stack([ramp_HWC] * 10)
    slopes = [
        float(np.diff(training_frames(frames_KHWC, SMALL, np.random.default_rng(seed))[0, 0, 0]).mean())
        for seed in range(40)
    ]
    assert any(slope > 0 for slope in slopes)
    assert any(slope < 0 for slope in slopes)
    assert len(set(slopes)) > 20


@pytest.mark.parametrize("shape", [(9, 24, 24, 3), (10, 24, 20, 3), (10, 24, 24, 1)])
def test_frames_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="square RGB frames"):
        evaluation_frames(np.zeros(shape, np.uint8), SMALL)


def _mel_spec(**changes: int) -> InputSpec:
    return replace(InputSpec(window=400, hop=160, spectrogram_bins=40, spectrogram_columns=298, mel=True), **changes)


def test_mel_bands_are_slaneys() -> None:
    """Against librosa's filters, which the published speech trunk was trained on."""
    librosa = pytest.importorskip("librosa")
    expected = librosa.filters.mel(sr=16_000, n_fft=400, n_mels=40)
    np.testing.assert_allclose(mel_bands(40, 400, 16_000), expected, rtol=1e-5, atol=1e-8)


def test_mel_energies_are_librosas() -> None:
    librosa = pytest.importorskip("librosa")
    spec, waveform = _mel_spec(), _noise(48_000)
    level = waveform * np.float32(MEL_LOUDNESS / np.sqrt(np.mean(np.square(waveform, dtype=np.float64))))
    expected = librosa.feature.melspectrogram(
        y=level, sr=16_000, n_fft=400, hop_length=160, center=False, n_mels=40, power=2.0
    )
    np.testing.assert_allclose(spectrogram(waveform, spec), expected, rtol=1e-3, atol=1e-9)


def test_the_spectrogram_is_librosas_of_windows_without_their_mean() -> None:
    """librosa keeps a window's mean and scales otherwise, so it gets windows without one, side by side."""
    librosa = pytest.importorskip("librosa")
    spec, waveform = InputSpec(), _noise(48_000) + np.float32(0.1)
    windows_TW = librosa.util.frame(waveform, frame_length=spec.window, hop_length=spec.hop, axis=0)
    centred = (windows_TW - windows_TW.mean(axis=1, keepdims=True)).ravel()
    taper_W = tukey(spec.window)
    spectra_FT = librosa.stft(centred, n_fft=spec.window, hop_length=spec.window, center=False, window=taper_W)
    power_FT = np.abs(spectra_FT) ** 2 / (spec.sample_rate_hz * np.square(taper_W).sum())
    power_FT[1:-1] *= 2
    log_FT = np.log(power_FT + LOG_FLOOR)
    expected_FT = (log_FT - log_FT.mean()) / log_FT.std()
    found_FT = spectrogram(waveform, spec)
    assert found_FT.shape == expected_FT.shape == (257, 299)
    # The logarithm magnifies rounding where there is next to no energy: in the bins beside zero.
    assert np.abs(found_FT - expected_FT).mean() < 5e-4
    assert np.quantile(np.abs(found_FT - expected_FT), 0.99) < 0.005


def test_mel_energies_do_not_depend_on_loudness() -> None:
    spec, noise = _mel_spec(), _noise(20_000)
    quiet, loud = spectrogram(0.1 * noise, spec), spectrogram(noise, spec)
    assert quiet.shape == (40, 298) and (quiet >= 0).all()
    np.testing.assert_allclose(quiet, loud, rtol=1e-3, atol=1e-9)
    assert not spectrogram(np.zeros(400, np.float32), spec).any()


def test_a_default_spec_is_the_text_that_earlier_devices_read() -> None:
    assert "mel" not in json.loads(InputSpec().to_json())
    assert InputSpec.from_json(_mel_spec().to_json()) == _mel_spec()
    with pytest.raises(ValueError, match="mel is 1"):
        InputSpec.from_json(json.dumps({**asdict(InputSpec()), "mel": 1}))
    with pytest.raises(ValueError, match="298"):
        spectrogram(_noise(400), _mel_spec(spectrogram_columns=100))
