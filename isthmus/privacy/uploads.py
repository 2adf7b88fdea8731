"""PURE: what a device could send of its clips, by mode, as plain arrays: the rows an attacker would have.

Axes: N clips, K rows sent, V values in a row, D feature width, C classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from isthmus.distill.student.evaluate import StudentOutputs
from isthmus.edge.own_clips.prototypes import assign_clusters, each_clip, noisy
from isthmus.proto.codec import pack_frame
from isthmus.proto.convert import prototypes_to_pb
from isthmus.proto.messages import FeatureFrame, Features, NumberType, Prototypes, UploadMode
from isthmus.proto.v1 import isthmus_pb2

Floats = npt.NDArray[np.float32]
Wide = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]
Kind = Literal["features", "probabilities", "feature-centroids", "prototypes", "stranger"]


@dataclass(frozen=True)
class Mode:
    """One way of uploading.

    ``features`` and ``probabilities`` send one row per clip. ``prototypes`` and ``feature-centroids`` send one mean per
    cluster of at least ``floor`` clips. ``stranger`` is the control: prototypes of another person's clips.
    """

    kind: Kind
    floor: int = 1
    epsilon: float | None = None

    @property
    def name(self) -> str:
        if self.kind in ("features", "probabilities"):
            return f"{self.kind} of every clip"
        text = {"feature-centroids": "feature centroids", "stranger": "control: a stranger's prototypes"}.get(
            self.kind, self.kind
        )
        noise = "" if self.epsilon is None else f", epsilon {self.epsilon:g}"
        return f"{text}, floor {self.floor}{noise}"

    @property
    def slug(self) -> str:
        noise = "" if self.epsilon is None else f"-epsilon-{self.epsilon:g}"
        return f"{self.kind}{f'-floor-{self.floor}' if self.floor > 1 else ''}{noise}"

    @property
    def in_features(self) -> bool:
        """Whether a row is the two feature vectors side by side (2 D values) or class probabilities (C)."""
        return self.kind in ("features", "feature-centroids")


@dataclass(frozen=True)
class Upload:
    """What was sent. ``labels_N``, the row of each clip, stays on the device; it is here only for measuring."""

    rows_KV: Floats
    sizes_K: Indices
    labels_N: Indices
    message_bytes: int


def all_modes(floors: Sequence[int], epsilons: Sequence[float]) -> tuple[Mode, ...]:
    """Return the modes, least private first. Raises ValueError for a floor under 2 or an epsilon not above 0."""
    if not floors or min(floors) < 2:
        raise ValueError("floors are at least 2: a floor of 1 is the mode that sends every clip")
    if any(not epsilon > 0 for epsilon in epsilons):
        raise ValueError("an epsilon is a number above 0")
    ordered = sorted(set(floors))
    prototypes = [
        Mode("prototypes", floor, epsilon)
        for floor in ordered
        for epsilon in (None, *sorted(set(epsilons), reverse=True))
    ]
    centroids = Mode("feature-centroids", ordered[0])
    return (Mode("features"), Mode("probabilities"), centroids, *prototypes, Mode("stranger", ordered[0]))


def make_upload(
    mode: Mode, outputs: StudentOutputs, *, seed: int, noise_seed: int, clip_per_cluster: int, labels_N: Indices | None
) -> Upload:
    """Return what a device with these outputs would send.

    ``labels_N``: the result of ``clusters``, if the caller already has it. Prototypes are those of
    ``isthmus.make_prototypes``. Raises BadPrototypes for fewer clips than the mode's floor.
    """
    rows_NV = mode_rows(mode, outputs)
    if mode.floor == 1:
        each_N = np.arange(len(rows_NV), dtype=np.int64)
        sizes_K = np.ones(len(rows_NV), np.int64)
        return Upload(rows_NV, sizes_K, each_N, _message_bytes(mode, rows_NV, sizes_K))
    if labels_N is None:
        labels_N = clusters(mode, outputs, seed=seed, clip_per_cluster=clip_per_cluster)
    means_KV, sizes_K = means_by_cluster(rows_NV, labels_N)
    if mode.epsilon is not None:
        means_KV = noisy(means_KV, sizes_K, epsilon=mode.epsilon, rng=np.random.default_rng(noise_seed))
    if not mode.in_features:
        means_KV = means_KV / means_KV.sum(axis=1, keepdims=True)
    rows_KV = means_KV.astype(np.float32)
    return Upload(rows_KV, sizes_K, labels_N, _message_bytes(mode, rows_KV, sizes_K))


def clusters(mode: Mode, outputs: StudentOutputs, *, seed: int, clip_per_cluster: int) -> Indices:
    """Return the row of each clip. Noise does not change it; feature centroids use the same clusters."""
    return assign_clusters(
        outputs.probabilities_NC, seed=seed, min_cluster=mode.floor, clip_per_cluster=clip_per_cluster
    )


def mode_rows(mode: Mode, outputs: StudentOutputs) -> Floats:
    """Return each clip as a row of the mode's values, (N, V)."""
    if mode.in_features:
        return np.concatenate([outputs.audio_ND, outputs.visual_ND], axis=1)
    return outputs.probabilities_NC


def means_by_cluster(rows_NV: Floats, labels_N: Indices) -> tuple[Wide, Indices]:
    """Return the mean row and the size of every cluster. Labels count from 0 without gaps."""
    sizes_K = np.bincount(labels_N).astype(np.int64)
    sums_KV = np.zeros((len(sizes_K), rows_NV.shape[1]))
    np.add.at(sums_KV, labels_N, rows_NV.astype(np.float64))
    return sums_KV / sizes_K[:, np.newaxis], sizes_K


def _message_bytes(mode: Mode, rows_KV: Floats, sizes_K: Indices) -> int:
    """Return the bytes sent. Prototypes and probabilities: the exact message. Features: one inference message per clip,
    float32, ratio 1.

    For feature centroids only the values are counted, as float32, and one byte per size.
    """
    if mode.kind == "feature-centroids":
        return int(rows_KV.size * 4 + len(sizes_K))
    if mode.kind == "features":
        halves = np.split(rows_KV, 2, axis=1)
        return sum(
            isthmus_pb2.InferRequest(
                sequence=number, frame=pack_frame(FeatureFrame(Features(audio_D, visual_D), 1.0, NumberType.FP32))
            ).ByteSize()
            for number, (audio_D, visual_D) in enumerate(zip(*halves, strict=True))
        )
    if mode.kind == "probabilities":
        return prototypes_to_pb(each_clip(rows_KV)).ByteSize()
    sent = Prototypes(rows_KV, sizes_K.astype(np.int32), UploadMode.PROTOTYPES, mode.floor, mode.epsilon)
    return prototypes_to_pb(sent).ByteSize()
