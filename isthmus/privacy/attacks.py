"""The two attacks: decoders that reconstruct clips from an upload, and scores of whether a clip was among those sent.

Both attackers know everything that the cloud knows: student, teacher's head, public clips, and how uploads are made.

Axes: N clips, S shadow uploads, K rows sent, V values in a row, P coefficients, F T spectrogram, H W C picture.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt
import torch
from sklearn.decomposition import PCA
from torch import Tensor, nn

from isthmus.data.cache.read import ClipArrays
from isthmus.data.transforms import frame_positions
from isthmus.distill.recipes import TrainConfig
from isthmus.distill.training.loop import SeededDataset, fit
from isthmus.privacy.likeness import same_class_rate, squared_distances
from isthmus.privacy.uploads import Floats, Indices, Wide

MAX_SIDE = 80
"""Longest side of a reconstruction in pixels. Larger inputs are shrunk, because one core would need hours."""
COMPONENTS = 96
HIDDEN = 256
TRAINING = TrainConfig(
    epochs=20, batch_size=64, optimizer="adamw", learning_rate=1e-3, weight_decay=0.05, schedule="cosine"
)
RIDGES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
NETWORK = "network"
_LOG_FLOOR = 1e-4


@dataclass(frozen=True, eq=False)
class Scenes:
    """The decoder's targets: standardised spectrograms_NFT, and one picture per clip, frames_NHWC in 0..1."""

    spectrograms_NFT: Floats
    frames_NHWC: Floats

    def __len__(self) -> int:
        return len(self.frames_NHWC)

    def pick(self, rows: Sequence[int] | Indices) -> "Scenes":
        return Scenes(self.spectrograms_NFT[rows], self.frames_NHWC[rows])

    def flat(self) -> tuple[Floats, Floats]:
        """Return sound and picture as rows of pixels."""
        return self.spectrograms_NFT.reshape(len(self), -1), self.frames_NHWC.reshape(len(self), -1)


def scenes_of(clips: ClipArrays) -> Scenes:
    """Return each clip's spectrogram and its first evaluation frame, no side longer than MAX_SIDE."""
    position = frame_positions(clips.spec)[0]
    spectrograms = [_shrunk(np.asarray(clips.spectrograms_NFT[row], np.float32)) for row in range(len(clips))]
    frames = [
        _shrunk(np.asarray(clips.frames_NKHWC[row][position], np.float32) / np.float32(255), clips.spec.frame_px)
        for row in range(len(clips))
    ]
    return Scenes(np.stack(spectrograms), np.stack(frames))


def _shrunk(picture: Floats, most: int = MAX_SIDE) -> Floats:
    height, width = (min(side, most, MAX_SIDE) for side in picture.shape[:2])
    if (height, width) == picture.shape[:2]:
        return picture
    return np.asarray(cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA), np.float32)


class Basis:
    """Principal components of the public scenes, for sound and picture separately: a decoder can only draw their span.

    Coefficients are scaled so that the public clips of either modality have a total variance of 1.
    """

    def __init__(self, public: Scenes, components: int = COMPONENTS, seed: int = 0):
        self._shapes = public.spectrograms_NFT.shape[1:], public.frames_NHWC.shape[1:]
        self._parts: list[PCA] = []
        self._scales: list[float] = []
        for pixels_NP in public.flat():
            count = min(components, *pixels_NP.shape)
            self._parts.append(PCA(count, svd_solver="randomized", random_state=seed).fit(pixels_NP))
            self._scales.append(float(np.sqrt(pixels_NP.var(axis=0).sum())) or 1.0)

    @property
    def sound_width(self) -> int:
        """Number of coefficients for the sound; they come first."""
        return int(self._parts[0].n_components_)

    def coefficients(self, scenes: Scenes) -> Floats:
        """Return the coefficients (N, P), those of the sound first."""
        parts = zip(self._parts, self._scales, scenes.flat(), strict=True)
        return np.concatenate([part.transform(pixels) / scale for part, scale, pixels in parts], axis=1).astype(
            np.float32
        )

    def scenes(self, coefficients_NP: Floats) -> Scenes:
        halves = np.split(coefficients_NP, [self.sound_width], axis=1)
        sound, picture = (
            part.inverse_transform(half * scale).reshape(-1, *shape).astype(np.float32)
            for part, scale, half, shape in zip(self._parts, self._scales, halves, self._shapes, strict=True)
        )
        return Scenes(sound, np.clip(picture, 0, 1))


def attacker_view(rows_KV: Floats, *, in_features: bool) -> Floats:
    """Return rows as the decoder reads them: probabilities and their logarithms, because small values inform too."""
    if in_features:
        return rows_KV
    return np.concatenate([rows_KV, np.log(rows_KV + _LOG_FLOOR)], axis=1).astype(np.float32)


class Network(nn.Module):
    """Network from standardised rows to coefficients of a ``Basis``."""

    def __init__(self, inputs: int, outputs: int, hidden: int = HIDDEN):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(inputs, hidden),
            nn.ReLU(),
            nn.Dropout(0.2),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Dropout(0.2),
            nn.Linear(hidden, outputs),
        )

    def forward(self, rows_BV: Tensor) -> Tensor:
        drawn: Tensor = self.layers(rows_BV)
        return drawn


class _Pairs(SeededDataset[Sequence[Tensor]]):
    def __init__(self, rows_NV: Floats, targets_NP: Floats, seed: int):
        super().__init__(len(rows_NV), seed)
        self._rows, self._targets = torch.from_numpy(rows_NV), torch.from_numpy(targets_NP)

    def sample(self, index: int, rng: np.random.Generator) -> Sequence[Tensor]:
        return self._rows[index], self._targets[index]


Decode = Callable[[Floats], Floats]
"""A decoder from rows, as ``attacker_view`` returns them, to coefficients."""


def network_decoder(
    rows_NV: Floats, targets_NP: Floats, *, seed: int, device: torch.device, config: TrainConfig = TRAINING
) -> Decode:
    """Train by least squares on the coefficients: the mean squared pixel error within the span of the basis."""
    torch.manual_seed(seed)
    standard = _standardiser(rows_NV)
    network = Network(rows_NV.shape[1], targets_NP.shape[1])

    def loss(batch: Sequence[Tensor]) -> Tensor:
        rows_BV, targets_BP = batch
        error_BP: Tensor = network(rows_BV) - targets_BP
        return error_BP.square().sum(dim=1).mean()

    pairs = _Pairs(standard(rows_NV), targets_NP, seed)
    fit(network, pairs, loss, config, seed=seed, run="decoder", device=device)
    network.cpu().eval()

    @torch.inference_mode()
    def decode(rows_KV: Floats) -> Floats:
        drawn: Floats = network(torch.from_numpy(standard(rows_KV))).numpy()
        return drawn

    return decode


def ridge_decoders(rows_NV: Floats, targets_NP: Floats) -> dict[str, Decode]:
    """Fit linear least squares with each penalty of ``RIDGES`` times N. One eigendecomposition serves all."""
    standard = _standardiser(rows_NV)
    rows = standard(rows_NV).astype(np.float64)
    mean_P = targets_NP.mean(axis=0, dtype=np.float64)
    strengths_V, directions_VV = np.linalg.eigh(rows.T @ rows)
    turned_VP = directions_VV.T @ (rows.T @ (targets_NP - mean_P))

    def linear(penalty: float) -> Decode:
        weights_VP = directions_VV @ (turned_VP / (np.maximum(strengths_V, 0) + penalty)[:, np.newaxis])
        return lambda rows_KV: (standard(rows_KV) @ weights_VP + mean_P).astype(np.float32)

    return {f"linear, ridge {ridge:g}": linear(ridge * len(rows)) for ridge in RIDGES}


def _standardiser(rows_NV: Floats) -> Decode:
    mean_V, scale_V = rows_NV.mean(axis=0), rows_NV.std(axis=0) + np.float32(1e-3)
    return lambda rows_KV: ((rows_KV - mean_V) / scale_V).astype(np.float32)


@dataclass(frozen=True, eq=False)
class Decoder:
    """For sound and for picture: the attempt that identified held-out public clips best, and its name."""

    names: tuple[str, str]
    parts: tuple[Decode, Decode]
    sound_width: int

    def __call__(self, rows_KV: Floats) -> Floats:
        sound_KP, picture_KP = (part(rows_KV) for part in self.parts)
        return np.concatenate([sound_KP[:, : self.sound_width], picture_KP[:, self.sound_width :]], axis=1)


def train_decoder(
    rows_NV: Floats,
    targets_NP: Floats,
    groups_N: Indices,
    sound_width: int,
    *,
    seed: int,
    device: torch.device,
    config: TrainConfig = TRAINING,
) -> Decoder:
    """Try a network and linear maps, keep the one that identifies held-out clips best, and train it on all rows.

    ``groups_N``: the person of each row. A fifth of the persons is held out, or a fifth of the rows if there is one
    person. The first ``sound_width`` coefficients are the sound's.
    """
    held_N = _held_out(groups_N, seed)

    def attempts(train_N: npt.NDArray[np.bool_], names: set[str] | None = None) -> dict[str, Decode]:
        made = ridge_decoders(rows_NV[train_N], targets_NP[train_N])
        if names is None or NETWORK in names:
            made[NETWORK] = network_decoder(
                rows_NV[train_N], targets_NP[train_N], seed=seed, device=device, config=config
            )
        return made

    tried = {name: decode(rows_NV[held_N]) for name, decode in attempts(~held_N).items()}
    parts = (slice(None, sound_width), slice(sound_width, None))
    true_NP = targets_NP[held_N]
    best = []
    for part in parts:
        apart = {name: _told_apart(drawn_NP[:, part], true_NP[:, part]) for name, drawn_NP in tried.items()}
        best.append(max(apart, key=apart.__getitem__))
    final = attempts(np.ones(len(rows_NV), dtype=bool), set(best))
    return Decoder((best[0], best[1]), (final[best[0]], final[best[1]]), sound_width)


def _held_out(groups_N: Indices, seed: int) -> npt.NDArray[np.bool_]:
    rng = np.random.default_rng(seed)
    groups = np.unique(groups_N)
    if len(groups) < 2:
        groups_N, groups = np.arange(len(groups_N)), np.arange(len(groups_N))
    return np.isin(groups_N, rng.permutation(groups)[: max(1, len(groups) // 5)])


def _told_apart(drawn_NP: Floats, true_NP: Floats, most: int = 256) -> float:
    """Return how often a reconstruction is nearer to its own target than to another, for the first ``most`` rows."""
    drawn, true = drawn_NP[:most], true_NP[:most]
    return same_class_rate(squared_distances(drawn, true), np.zeros(len(drawn), np.int64))


def reconstruct(decoder: Decode, basis: Basis, rows_KV: Floats) -> Scenes:
    """Return one scene per row (rows as ``attacker_view`` returns them)."""
    return basis.scenes(decoder(rows_KV))


def closeness(uploads: Sequence[Floats], candidates_NV: Floats, unit: float) -> Wide:
    """Return minus the log distance from each candidate to the nearest row of each upload (K, V): (S, N).

    Distances are divided by ``unit``, a typical distance, and clipped below at 1e-4.
    """
    starts_S = np.cumsum([0, *(len(rows_KV) for rows_KV in uploads[:-1])])
    rows, candidates = np.concatenate(uploads).astype(np.float64), candidates_NV.astype(np.float64)
    squares_RN = rows @ candidates.T
    squares_RN *= -2
    squares_RN += np.square(rows).sum(axis=1)[:, np.newaxis]
    squares_RN += np.square(candidates).sum(axis=1)
    nearest_SN = np.sqrt(np.clip(np.minimum.reduceat(squares_RN, starts_S, axis=0), 0.0, None))
    result_SN: Wide = -np.log(nearest_SN / unit + 1e-4)
    return result_SN


@dataclass(frozen=True)
class LikelihoodRatio:
    """Distribution of closeness, minus that to strangers' uploads, over members and over the same person's other clips.

    After LiRA (Carlini et al., S&P 2022, section V) with its offline per-example mean: the score of a clip against
    uploads that cannot contain it. Where we differ: the target is an upload, not a trained model. The in-distribution
    and both variances are pooled over all public clips, because a candidate is never in a shadow upload of its own.
    """

    in_mean: float
    in_deviation: float
    out_mean: float
    out_deviation: float

    def score(self, closeness_N: Wide, stranger_mean_N: Wide) -> Wide:
        """Return the log-likelihood ratio that each clip was among those sent."""
        excess_N = closeness_N - stranger_mean_N
        inside_N = (excess_N - self.in_mean) / self.in_deviation
        outside_N = (excess_N - self.out_mean) / self.out_deviation
        ratio_N: Wide = 0.5 * (outside_N**2 - inside_N**2) + np.log(self.out_deviation / self.in_deviation)
        return ratio_N


def fit_likelihood_ratio(
    closeness_SN: Wide,
    member_SN: npt.NDArray[np.bool_],
    same_person_SN: npt.NDArray[np.bool_],
    stranger_SN: npt.NDArray[np.bool_],
) -> LikelihoodRatio:
    """Fit from shadow uploads: the score of each public clip against each upload, and its relation to that upload.

    ``same_person_SN`` marks the non-members of the same person, ``stranger_SN`` the pairs of strangers. Raises
    ValueError if a clip has no stranger, or there are no members or no others.
    """
    if (stranger_SN.sum(axis=0) == 0).any() or not member_SN.any() or not same_person_SN.any():
        raise ValueError("too few shadow uploads to learn to tell members from others")
    base_N = np.where(stranger_SN, closeness_SN, 0).sum(axis=0) / stranger_SN.sum(axis=0)
    excess_SN = closeness_SN - base_N
    inside, outside = excess_SN[member_SN], excess_SN[same_person_SN]
    least = 1e-2
    return LikelihoodRatio(
        float(inside.mean()), max(float(inside.std()), least), float(outside.mean()), max(float(outside.std()), least)
    )
