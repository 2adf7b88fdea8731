"""What one training sample is, for each thing that is trained. Axes as in data/transforms.py."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from isthmus.data.cache.read import ClipArrays
from isthmus.data.transforms import CROP_SCALE, all_frames, evaluation_frames, training_frames
from isthmus.distill.selection import Selection
from isthmus.distill.training.loop import SeededDataset
from isthmus.distill.training.teacher_cache import TeacherOutputs


def masked_spectrogram(spectrogram_FT: npt.NDArray[np.float32], rng: np.random.Generator) -> npt.NDArray[np.float32]:
    """SpecAugment (Park et al. 2019) without warping: a circular shift in time, then one band of frequencies and one
    stretch of time set to the mean, each up to a fifth of its axis."""
    bins, columns = spectrogram_FT.shape
    out = np.roll(spectrogram_FT, int(rng.integers(columns)), axis=1)
    for axis, length in ((0, bins), (1, columns)):
        width = int(rng.integers(length // 5 + 1))
        start = int(rng.integers(length - width + 1))
        if axis == 0:
            out[start : start + width, :] = 0.0
        else:
            out[:, start : start + width] = 0.0
    return out


class LabelledSpectrograms(SeededDataset[Sequence[Tensor]]):
    """(spectrogram_FT, label)."""

    def __init__(self, clips: ClipArrays, seed: int, *, augment: bool):
        super().__init__(len(clips.names), seed)
        self._clips = clips
        self._augment = augment

    def sample(self, index: int, rng: np.random.Generator) -> Sequence[Tensor]:
        spectrogram_FT = np.array(self._clips.spectrograms_NFT[index], dtype=np.float32)
        if self._augment:
            spectrogram_FT = masked_spectrogram(spectrogram_FT, rng)
        return torch.from_numpy(spectrogram_FT), torch.tensor(self._clips.labels_N[index])


class LabelledFrames(SeededDataset[Sequence[Tensor]]):
    """(frames_KCHW, label); the K = frames_used frames are drawn at random."""

    def __init__(self, clips: ClipArrays, seed: int, *, augment: bool, crop_scale: tuple[float, float] = CROP_SCALE):
        super().__init__(len(clips.names), seed)
        self._clips = clips
        self._augment = augment
        self._crop_scale = crop_scale

    def sample(self, index: int, rng: np.random.Generator) -> Sequence[Tensor]:
        frames_KHWC = self._clips.frames_NKHWC[index]
        spec = self._clips.spec
        if self._augment:
            frames_KCHW = training_frames(frames_KHWC, spec, rng, crop_scale=self._crop_scale)
        else:
            frames_KCHW = evaluation_frames(frames_KHWC, spec)
        return torch.from_numpy(frames_KCHW), torch.tensor(self._clips.labels_N[index])


class LabelledClips(SeededDataset[Sequence[Tensor]]):
    """(spectrogram_FT, frames_KCHW, label), for joint epochs."""

    def __init__(self, clips: ClipArrays, seed: int, *, augment: bool, crop_scale: tuple[float, float] = CROP_SCALE):
        super().__init__(len(clips.names), seed)
        self._spectrograms = LabelledSpectrograms(clips, seed, augment=augment)
        self._frames = LabelledFrames(clips, seed, augment=augment, crop_scale=crop_scale)

    def sample(self, index: int, rng: np.random.Generator) -> Sequence[Tensor]:
        spectrogram_FT, label = self._spectrograms.sample(index, rng)
        frames_KCHW, _ = self._frames.sample(index, rng)
        return spectrogram_FT, frames_KCHW, label


class DistillationClips(SeededDataset[Sequence[Tensor]]):
    """(spectrogram_FT, frames_KCHW, teacher audio_D, teacher visual_D) of chosen public clips; also the clip's weight
    if they do not all count alike. ``frames`` of a clip are drawn; None: as many as in evaluation.

    Frames are drawn at random but prepared as in evaluation. The mean of the cached teacher features of exactly the
    frames drawn is therefore the exact target of Eq. 5.4.
    """

    def __init__(
        self, clips: ClipArrays, teacher: TeacherOutputs, selection: Selection, seed: int, frames: int | None = None
    ):
        super().__init__(len(selection), seed)
        self._frames = frames or clips.spec.frames_used
        self._clips = clips
        self._teacher = teacher
        self._indices_S = selection.indices_S
        self._weights_S = selection.weights_S if selection.weighted else None

    def sample(self, index: int, rng: np.random.Generator) -> Sequence[Tensor]:
        clip = int(self._indices_S[index])
        spec = self._clips.spec
        drawn = np.sort(rng.choice(spec.frames_stored, size=self._frames, replace=False))
        frames_KCHW = all_frames(self._clips.frames_NKHWC[clip][drawn], spec)
        visual_D = np.asarray(self._teacher.visual_features_NKD[clip])[drawn].mean(axis=0)
        return (
            torch.from_numpy(np.array(self._clips.spectrograms_NFT[clip], dtype=np.float32)),
            torch.from_numpy(frames_KCHW),
            torch.from_numpy(np.array(self._teacher.audio_features_ND[clip])),
            torch.from_numpy(visual_D),
            *(() if self._weights_S is None else (torch.tensor(self._weights_S[index]),)),
        )


class LabelledFeatures(SeededDataset[Sequence[Tensor]]):
    """(audio_D, visual_D, label) from features computed once; the visual feature is the mean of ``frames_used`` drawn
    frames.

    With ``weights_N`` also the sample's weight.
    """

    def __init__(
        self,
        audio_ND: npt.NDArray[np.float32],
        visual_NKD: npt.NDArray[np.float32],
        labels_N: npt.NDArray[np.int64],
        frames_used: int,
        seed: int,
        weights_N: npt.NDArray[np.float32] | None = None,
    ):
        super().__init__(len(labels_N), seed)
        self._weights_N = weights_N
        self._audio_ND = audio_ND
        self._visual_NKD = visual_NKD
        self._labels_N = labels_N
        self._frames_used = frames_used

    def sample(self, index: int, rng: np.random.Generator) -> Sequence[Tensor]:
        frames = rng.choice(self._visual_NKD.shape[1], size=self._frames_used, replace=False)
        return (
            torch.from_numpy(np.array(self._audio_ND[index])),
            torch.from_numpy(np.asarray(self._visual_NKD[index])[frames].mean(axis=0)),
            torch.tensor(self._labels_N[index]),
            *(() if self._weights_N is None else (torch.tensor(self._weights_N[index]),)),
        )
