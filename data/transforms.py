"""From waveform and frames to the encoders' input: the one definition that device and training share.

It uses numpy and OpenCV only, because the device installs this file.

Axes: T samples or spectrogram columns, F frequency bins, K frames of a clip, H W pixels, C channels.

Sound (the preparation of OGM-GE, Peng et al., CVPR 2022): mono, tiled or cut to the duration, clipped to [-1, 1],
one-sided power spectral density over Tukey(0.25) windows with their mean removed, log(S + 1e-7), then standardised clip
by clip.

Sound of a spec with ``mel`` (the preparation of speaker encoders, Wan et al., ICASSP 2018): the same waveform at one
loudness, Hann windows, energies of mel bands, without logarithm or standardisation. Pretrained trunks read this.

Picture: centre square, ImageNet mean and deviation; random-resized-crop and flip in training.
"""

import functools
import json
import math
from dataclasses import asdict, dataclass
from typing import Final

import cv2
import numpy as np
import numpy.typing as npt

LOG_FLOOR: Final = 1e-7
TUKEY_TAPER: Final = 0.25
IMAGENET_MEAN: Final = np.array([0.485, 0.456, 0.406], np.float32)
IMAGENET_DEVIATION: Final = np.array([0.229, 0.224, 0.225], np.float32)

MEL_LOUDNESS: Final = 10 ** (-30 / 20)
"""Root mean square of a waveform before mel energies are taken: -30 dB of full scale."""

CROP_SCALE: Final = (0.08, 1.0)
"""Share of the picture's area that a training crop keeps."""
CROP_ASPECT: Final = (3 / 4, 4 / 3)

_BOUNDS: Final = {
    "sample_rate_hz": 192_000,
    "duration_s": 600,
    "window": 65_536,
    "hop": 65_536,
    "spectrogram_bins": 32_769,
    "spectrogram_columns": 100_000,
    "frame_px": 2_048,
    "stored_px": 2_048,
    "frames_stored": 256,
    "frames_used": 256,
}


@dataclass(frozen=True)
class InputSpec:
    """How a clip is prepared. It is sent to the device as JSON, and is part of every cache key.

    The defaults are the paper's for CREMA-D: 3 s at 16 kHz, window 512, hop 159, so a spectrogram of 257 x 299. A
    preset may resize the spectrogram (area interpolation, before log and standardisation) and the frames.

    >>> InputSpec(frame_px=64, stored_px=72).spectrogram_bins
    257
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
    mel: bool = False
    """Energies of ``spectrogram_bins`` mel bands instead of the log spectrogram."""

    @property
    def samples(self) -> int:
        """Length of the prepared waveform, in samples."""
        return round(self.sample_rate_hz * self.duration_s)

    @property
    def native_shape(self) -> tuple[int, int]:
        """Bins and columns of the spectrogram before it is resized."""
        return self.window // 2 + 1, (self.samples - self.window) // self.hop + 1

    def to_json(self) -> str:
        """Return the spec as JSON. ``mel`` is left out if it is off, so that earlier devices read the text."""
        fields = {name: value for name, value in asdict(self).items() if name != "mel" or value}
        return json.dumps(fields, sort_keys=True, separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> "InputSpec":
        """Read a spec. Raises ValueError for text that is not exactly a spec's fields within their bounds."""
        raw = json.loads(text)
        if not isinstance(raw, dict):
            raise ValueError("input spec: not a JSON object")
        try:
            spec = InputSpec(**raw)
        except TypeError as error:
            raise ValueError(f"input spec: {error}") from error
        if type(spec.mel) is not bool:
            raise ValueError(f"input spec: mel is {spec.mel!r}")
        for name, value in asdict(spec).items():
            if name == "mel":
                continue
            kinds = (int, float) if name == "duration_s" else (int,)
            if type(value) not in kinds or not 0 < value <= _BOUNDS[name]:
                raise ValueError(f"input spec: {name} is {value!r}")
        _check(spec)
        return spec


def _check(spec: InputSpec) -> None:
    bins, columns = spec.native_shape
    if not spec.hop <= spec.window:
        raise ValueError(f"input spec: a hop of {spec.hop} skips samples between windows of {spec.window}")
    if spec.window > spec.samples:
        raise ValueError(f"input spec: a window of {spec.window} in a clip of {spec.samples} samples")
    if spec.spectrogram_bins > bins or spec.spectrogram_columns > columns:
        raise ValueError(
            f"input spec: a spectrogram of {spec.spectrogram_bins} x {spec.spectrogram_columns} asked of "
            f"{bins} x {columns} (a window of {spec.window} with hop {spec.hop} over {spec.duration_s:g} s)"
        )
    if spec.mel and spec.spectrogram_columns != columns:
        raise ValueError(f"input spec: {spec.spectrogram_columns} columns of mel energies; there are {columns}")
    if spec.frames_used > spec.frames_stored:
        raise ValueError(f"input spec: {spec.frames_used} frames used of {spec.frames_stored} stored")


def fitted(waveform_T: npt.NDArray[np.float32], spec: InputSpec) -> npt.NDArray[np.float32]:
    """Return the waveform tiled or cut to spec.samples and clipped to [-1, 1], float32 (spec.samples,).

    Raises ValueError if the waveform is empty, not one-dimensional or not finite.
    """
    waveform_T = np.asarray(waveform_T, np.float32)
    if waveform_T.ndim != 1 or waveform_T.size == 0:
        raise ValueError(f"a waveform of shape {waveform_T.shape}: one axis and at least one sample are needed")
    cut_T = np.resize(waveform_T, spec.samples)  # np.resize tiles a waveform that is too short
    if not np.isfinite(cut_T).all():
        raise ValueError("a waveform with samples that are not finite numbers")
    return np.clip(cut_T, -1.0, 1.0)


def spectrogram(waveform_T: npt.NDArray[np.float32], spec: InputSpec) -> npt.NDArray[np.float32]:
    """Return the standardised log power spectrogram, float32 (spec.spectrogram_bins, spec.spectrogram_columns).

    For a spec with ``mel`` these are mel energies. ``waveform_T`` is mono at spec.sample_rate_hz, of any length above
    zero. Silence gives zeros. Raises ValueError for
    a waveform that is empty, not one-dimensional or not finite, and for a spec that asks for more bins or columns than
    its window and hop give.
    """
    _check(spec)
    cut_T = fitted(waveform_T, spec)
    if spec.mel:
        return _mel_energies(cut_T, spec)
    power_FT = _power_density(cut_T, spec)
    if power_FT.shape != (spec.spectrogram_bins, spec.spectrogram_columns):
        size = (spec.spectrogram_columns, spec.spectrogram_bins)
        power_FT = np.asarray(cv2.resize(power_FT, size, interpolation=cv2.INTER_AREA), np.float32)
    log_FT = np.log(power_FT + np.float32(LOG_FLOOR))
    log_FT -= log_FT.mean(dtype=np.float64)
    log_FT /= log_FT.std(dtype=np.float64) + 1e-9
    return np.ascontiguousarray(log_FT, np.float32)


def _power_density(cut_T: npt.NDArray[np.float32], spec: InputSpec) -> npt.NDArray[np.float32]:
    """Return the one-sided power spectral density (window // 2 + 1, windows), as ``scipy.signal.spectrogram`` does.

    scipy is not used: its signal package takes 60 MB of a device's memory.
    """
    windows_TW = np.lib.stride_tricks.sliding_window_view(cut_T, spec.window)[:: spec.hop]
    tukey_W = tukey(spec.window)
    centred_TW = (windows_TW - windows_TW.mean(axis=1, keepdims=True)) * tukey_W
    spectra_TF = np.fft.rfft(centred_TW, axis=1)
    power_TF = np.square(spectra_TF.real) + np.square(spectra_TF.imag)
    power_TF *= np.float32(1.0 / (spec.sample_rate_hz * float(np.square(tukey_W, dtype=np.float64).sum())))
    # A frequency stands for its negative, too, except for zero and half the rate.
    power_TF[:, 1 : -1 if spec.window % 2 == 0 else None] *= 2
    return np.ascontiguousarray(power_TF.T, np.float32)


@functools.lru_cache(maxsize=4)
def tukey(window: int) -> npt.NDArray[np.float32]:
    """Return the periodic Tukey window with a taper of TUKEY_TAPER: cosine flanks, and 1 in between."""
    place_W = np.arange(window) / (window / 2) - 1  # from -1 to just below 1
    flank_W = np.clip((np.abs(place_W) - 1 + TUKEY_TAPER) / TUKEY_TAPER, 0, 1)
    return (0.5 * (1 + np.cos(np.pi * flank_W))).astype(np.float32)


def _mel_energies(cut_T: npt.NDArray[np.float32], spec: InputSpec) -> npt.NDArray[np.float32]:
    loudness = float(np.sqrt(np.mean(np.square(cut_T, dtype=np.float64))))
    level_T = cut_T * np.float32(MEL_LOUDNESS / max(loudness, 1e-6))
    windows_TW = np.lib.stride_tricks.sliding_window_view(level_T, spec.window)[:: spec.hop]
    hann_W = np.float32(0.5) - np.float32(0.5) * np.cos(2 * np.pi * np.arange(spec.window) / spec.window)
    power_TF = np.square(np.abs(np.fft.rfft(windows_TW * hann_W.astype(np.float32), axis=1)))
    energies_FT = mel_bands(spec.spectrogram_bins, spec.window, spec.sample_rate_hz) @ power_TF.T
    return np.ascontiguousarray(energies_FT, np.float32)


@functools.lru_cache(maxsize=4)
def mel_bands(bands: int, window: int, sample_rate_hz: int) -> npt.NDArray[np.float64]:
    """Return the weights of triangular bands (bands, window // 2 + 1), evenly spaced on Slaney's mel scale up to half
    the rate, each divided by its width in hertz (Slaney, Auditory Toolbox, 1998).

    The scale is linear below 1 kHz, 200/3 Hz per mel, and logarithmic above it, 27 mel per factor of 6.4.
    """
    knee_hz, hz_per_mel, log_step = 1000.0, 200 / 3, math.log(6.4) / 27
    top_hz = sample_rate_hz / 2
    knee, top = knee_hz / hz_per_mel, top_hz / hz_per_mel
    if top_hz > knee_hz:
        top = knee + math.log(top_hz / knee_hz) / log_step
    mel_B = np.linspace(0, top, bands + 2)
    edge_B = np.where(mel_B < knee, mel_B * hz_per_mel, knee_hz * np.exp(log_step * (mel_B - knee)))
    hz_F = np.arange(window // 2 + 1) * sample_rate_hz / window
    low_B, mid_B, high_B = (edge_B[start : start + bands, np.newaxis] for start in range(3))
    rising_BF, falling_BF = (hz_F - low_B) / (mid_B - low_B), (high_B - hz_F) / (high_B - mid_B)
    weights_BF: npt.NDArray[np.float64] = np.maximum(0, np.minimum(rising_BF, falling_BF)) * 2 / (high_B - low_B)
    return weights_BF


def stored_frame(picture_HWC: npt.NDArray[np.uint8], spec: InputSpec) -> npt.NDArray[np.uint8]:
    """Return the centre square of an RGB picture, resized to uint8 (spec.stored_px, spec.stored_px, 3), as it is
    cached.
    """
    height, width = picture_HWC.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return _resize(picture_HWC[top : top + side, left : left + side], spec.stored_px)


def evenly_spread(count: int, of: int) -> npt.NDArray[np.int64]:
    """Return the middle positions of ``count`` equal parts of range(of), in order; they repeat if count exceeds it."""
    return ((2 * np.arange(count, dtype=np.int64) + 1) * of) // (2 * count)


def frame_positions(spec: InputSpec) -> npt.NDArray[np.int64]:
    """Return which stored frames evaluation uses: spec.frames_used of them, evenly spaced, in time order."""
    return evenly_spread(spec.frames_used, spec.frames_stored)


def evaluation_frames(frames_KHWC: npt.NDArray[np.uint8], spec: InputSpec) -> npt.NDArray[np.float32]:
    """Return the fixed frames of a stored clip, whole and normalised: float32 (spec.frames_used, 3, frame_px,
    frame_px).

    Raises ValueError if the clip does not hold spec.frames_stored square frames.
    """
    _check_frames(frames_KHWC, spec)
    return all_frames(frames_KHWC[frame_positions(spec)], spec)


def all_frames(frames_KHWC: npt.NDArray[np.uint8], spec: InputSpec) -> npt.NDArray[np.float32]:
    """Return every given frame prepared as in evaluation: float32 (K, 3, frame_px, frame_px)."""
    return _normalise([_resize(frame_HWC, spec.frame_px) for frame_HWC in frames_KHWC])


def training_frames(
    frames_KHWC: npt.NDArray[np.uint8],
    spec: InputSpec,
    rng: np.random.Generator,
    *,
    crop_scale: tuple[float, float] = CROP_SCALE,
) -> npt.NDArray[np.float32]:
    """Return random distinct frames in time order, each cropped, resized and randomly flipped, and normalised.

    Returns float32 (spec.frames_used, 3, frame_px, frame_px). ``crop_scale`` bounds the share of the area that a crop
    keeps. Each frame draws its own crop and flip, as in the published training code. Raises ValueError if the clip does
    not hold spec.frames_stored square frames.
    """
    _check_frames(frames_KHWC, spec)
    chosen = np.sort(rng.choice(spec.frames_stored, spec.frames_used, replace=False))
    pictures: list[npt.NDArray[np.uint8]] = []
    for position in chosen:
        top, left, height, width = _random_crop(frames_KHWC.shape[1], rng, crop_scale)
        picture_HWC = _resize(frames_KHWC[position, top : top + height, left : left + width], spec.frame_px)
        pictures.append(picture_HWC[:, ::-1] if rng.random() < 0.5 else picture_HWC)
    return _normalise(pictures)


def _random_crop(side: int, rng: np.random.Generator, scale: tuple[float, float]) -> tuple[int, int, int, int]:
    """Return top, left, height and width of a crop of a square, area and log aspect uniform (Szegedy et al. 2015)."""
    for _ in range(10):
        area = side * side * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(CROP_ASPECT[0]), math.log(CROP_ASPECT[1])))
        width, height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < width <= side and 0 < height <= side:
            return int(rng.integers(side - height + 1)), int(rng.integers(side - width + 1)), height, width
    return 0, 0, side, side


def _resize(picture_HWC: npt.NDArray[np.uint8], px: int) -> npt.NDArray[np.uint8]:
    if picture_HWC.shape[:2] == (px, px):
        return picture_HWC
    shrinks = min(picture_HWC.shape[:2]) >= px
    resized = cv2.resize(picture_HWC, (px, px), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    return np.asarray(resized, np.uint8)


def _normalise(pictures: list[npt.NDArray[np.uint8]]) -> npt.NDArray[np.float32]:
    scale_C = 1.0 / (255.0 * IMAGENET_DEVIATION)
    offset_C = IMAGENET_MEAN / IMAGENET_DEVIATION
    frames_KHWC = np.stack(pictures).astype(np.float32) * scale_C - offset_C
    return np.ascontiguousarray(frames_KHWC.transpose(0, 3, 1, 2), np.float32)


def _check_frames(frames_KHWC: npt.NDArray[np.uint8], spec: InputSpec) -> None:
    count, height, width, channels = frames_KHWC.shape
    if (count, channels) != (spec.frames_stored, 3) or height != width:
        raise ValueError(f"frames of shape {frames_KHWC.shape}: {spec.frames_stored} square RGB frames are needed")
