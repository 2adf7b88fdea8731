"""The teacher's outputs on public clips: computed once, memory-mapped, keyed by teacher and data."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from rich.progress import Progress
from torch import Tensor

from isthmus.data.cache.read import ClipArrays
from isthmus.data.transforms import InputSpec, all_frames, frame_positions
from isthmus.distill.models.heads import FusionHead, present
from isthmus.distill.models.trunk import EncoderPair
from isthmus.proto.messages import Captured

BATCH_CLIPS = 16

PROBABILITIES_FILE = "probabilities_NC.npy"
"""The file of ``TeacherOutputs.probabilities_NC`` in the folder that ``save_outputs`` writes."""

Encoded = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]
"""What ``encode_clips`` returns: audio_ND and visual_NKD."""


@dataclass(frozen=True)
class TeacherOutputs:
    """The teacher's outputs. Axes: N clips in the order of the set, K stored frames, D feature width, C classes."""

    audio_features_ND: npt.NDArray[np.float32]
    visual_features_NKD: npt.NDArray[np.float32]
    probabilities_NC: npt.NDArray[np.float32]


@torch.inference_mode()
def encode_clips(
    encoders: EncoderPair,
    clips: ClipArrays,
    device: torch.device,
    progress: Progress | None = None,
    what: str = "encode",
) -> Encoded:
    """Return the features of every clip, prepared as in evaluation: audio_ND, and visual_NKD for every stored frame.

    A thread reads and normalises the next batch while the encoders work on this one.
    """
    encoders.to(device).eval()
    task = progress.add_task(what, total=len(clips.names), note="") if progress is not None else None
    audio: list[npt.NDArray[np.float32]] = []
    visual: list[npt.NDArray[np.float32]] = []
    batches = [range(first, min(first + BATCH_CLIPS, len(clips))) for first in range(0, len(clips), BATCH_CLIPS)]
    with ThreadPoolExecutor(1, thread_name_prefix="prepare") as pool:
        ahead = pool.submit(prepared_batch, clips, batches[0]) if batches else None
        for rows, following in zip(batches, [*batches[1:], None], strict=True):
            assert ahead is not None
            spectrograms, frames = ahead.result()
            ahead = None if following is None else pool.submit(prepared_batch, clips, following)
            audio.append(encoders.audio(spectrograms.to(device)).float().cpu().numpy())
            visual.append(encoders.visual(frames.to(device)).float().cpu().numpy())
            if progress is not None and task is not None:
                progress.advance(task, len(rows))
    return np.concatenate(audio), np.concatenate(visual)


def prepared_batch(clips: ClipArrays, rows: range) -> tuple[Tensor, Tensor]:
    """Return spectrograms_BFT and frames_BKCHW of some rows, prepared as in evaluation."""
    frames = torch.from_numpy(np.stack([all_frames(clips.frames_NKHWC[row], clips.spec) for row in rows]))
    return torch.from_numpy(np.array(clips.spectrograms_NFT[rows.start : rows.stop], dtype=np.float32)), frames


@torch.inference_mode()
def head_probabilities(
    head: FusionHead,
    audio_ND: npt.NDArray[np.float32],
    visual_ND: npt.NDArray[np.float32],
    captured: Captured = Captured.BOTH,
) -> npt.NDArray[np.float32]:
    """Return the softmax of the teacher head: beta_p on teacher features, beta_c on a student's, as if each clip had
    only ``captured``.
    """
    device = next(head.parameters()).device
    audio, visual = torch.from_numpy(audio_ND).to(device), torch.from_numpy(visual_ND).to(device)
    logits_NC = head.eval()(audio, visual, present(captured, len(audio_ND)).to(device))
    probabilities: npt.NDArray[np.float32] = torch.softmax(logits_NC, dim=1).cpu().numpy()
    return probabilities


def evaluation_mean(visual_NKD: npt.NDArray[np.float32], clips: ClipArrays) -> npt.NDArray[np.float32]:
    """Return each clip's visual feature (N, D) as in evaluation: the mean over the fixed, evenly spaced frames."""
    mean_ND: npt.NDArray[np.float32] = visual_NKD[:, list(frame_positions(clips.spec))].mean(axis=1)
    return mean_ND


@dataclass(frozen=True)
class TeacherFeatures:
    """Both modalities' features of each public clip as one row (E = 2 D): audio, then visual as in evaluation.

    Rows are read when they are indexed, by a slice or by indices.
    """

    outputs: TeacherOutputs
    spec: InputSpec

    @property
    def shape(self) -> tuple[int, int]:
        clips, width = self.outputs.audio_features_ND.shape
        return clips, 2 * width

    def __getitem__(self, rows: slice | npt.NDArray[np.int64], /) -> npt.NDArray[np.float32]:
        visual_RKD = np.asarray(self.outputs.visual_features_NKD[rows])
        visual_RD = visual_RKD[:, list(frame_positions(self.spec))].mean(axis=1)
        return np.concatenate([self.outputs.audio_features_ND[rows], visual_RD], axis=1)


def save_outputs(folder: Path, outputs: TeacherOutputs) -> None:
    """Write the three arrays; the folder appears whole or not at all."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for name in ("audio_features_ND", "visual_features_NKD", "probabilities_NC"):
        np.save(part / f"{name}.npy", getattr(outputs, name), allow_pickle=False)
    (part / "shapes.json").write_text(json.dumps({"clips": len(outputs.probabilities_NC)}))
    shutil.rmtree(folder, ignore_errors=True)
    part.replace(folder)


def open_outputs(folder: Path) -> TeacherOutputs:
    """Memory-map the arrays that ``save_outputs`` wrote. Raises FileNotFoundError."""
    return TeacherOutputs(
        *(
            np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            for name in ("audio_features_ND", "visual_features_NKD", "probabilities_NC")
        )
    )
