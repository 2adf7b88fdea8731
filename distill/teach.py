"""Training the teacher: each branch alone, then the head, then joint epochs if the recipe has any (Eq. 5.3)."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from rich.progress import Progress as Bars
from torch import Tensor, nn

from isthmus.data.stored import ClipArrays
from isthmus.distill.datasets import LabelledClips, LabelledFeatures, LabelledFrames, LabelledSpectrograms
from isthmus.distill.losses import classification_loss
from isthmus.distill.models.teacher import Teacher
from isthmus.distill.release import Release, save_weights
from isthmus.distill.teacher_cache import (
    TeacherOutputs,
    encode_clips,
    evaluation_mean,
    head_probabilities,
    save_outputs,
)
from isthmus.distill.train import EpochReport, SeededDataset, fit

Losses = dict[str, tuple[float, ...]]
Watch = Callable[[str, EpochReport], None]


def train_teacher(
    release: Release,
    *,
    seed: int,
    device: torch.device,
    weights: Path | None = None,
    workers: int = 0,
    watch: Watch = lambda _stage, _report: None,
    bars: Bars | None = None,
) -> Losses:
    """Trains, saves and runs the teacher over the public clips. Resumes from the stage and epoch it was stopped in.

    Returns each stage's loss per epoch. Raises TrainingDiverged, CheckpointError.
    """
    recipe, clips = release.recipe, release.public
    torch.manual_seed(seed)
    teacher = release.new_teacher(weights)
    run = recipe.hash(clips.content_hash, f"seed {seed}")
    folder = release.teacher_path.parent
    losses: Losses = {}

    def stage(
        name: str,
        module: nn.Module,
        data: SeededDataset[Sequence[Tensor]],
        loss: Callable[[Sequence[Tensor]], Tensor],
    ) -> None:
        config = getattr(recipe.teacher, name)
        done = fit(
            module,
            data,
            loss,
            config,
            seed=seed,
            run=f"{run} {name}",
            checkpoint=folder / f"{name}.checkpoint.safetensors",
            device=device,
            workers=workers,
            on_epoch=lambda report: watch(name, report),
        )
        losses[name] = done.losses

    audio = nn.ModuleList([teacher.encoders.audio_encoder, teacher.audio_classifier])
    visual = nn.ModuleList([teacher.encoders.visual_encoder, teacher.visual_classifier])

    def audio_loss(batch: Sequence[Tensor]) -> Tensor:
        spectrogram_BFT, labels_B = batch
        logits_BC = teacher.audio_classifier(teacher.encoders.audio(spectrogram_BFT))
        return classification_loss(logits_BC, labels_B, recipe.teacher.audio.label_smoothing)

    def visual_loss(batch: Sequence[Tensor]) -> Tensor:
        frames_BKCHW, labels_B = batch
        logits_BC = teacher.visual_classifier(teacher.encoders.visual(frames_BKCHW).mean(dim=1))
        return classification_loss(logits_BC, labels_B, recipe.teacher.visual.label_smoothing)

    def joint_loss(batch: Sequence[Tensor]) -> Tensor:
        spectrogram_BFT, frames_BKCHW, labels_B = batch
        return classification_loss(teacher(spectrogram_BFT, frames_BKCHW), labels_B)

    stage("audio", audio, LabelledSpectrograms(clips, seed, augment=recipe.teacher.audio.augment), audio_loss)
    looks = recipe.teacher.visual
    frames = LabelledFrames(clips, seed, augment=looks.augment, crop_scale=looks.crop_scale)
    stage("visual", visual, frames, visual_loss)
    teacher.head.start_from_branches(teacher.audio_classifier, teacher.visual_classifier)
    if recipe.teacher.head.epochs:
        audio_ND, visual_NKD = encode_clips(teacher.encoders, clips, device, bars, "features for the head")
        data = LabelledFeatures(audio_ND, visual_NKD, release.labels(), recipe.input.frames_used, seed)
        stage("head", teacher.head, data, head_loss(teacher, recipe.teacher.head.label_smoothing))
    if recipe.teacher.joint is not None:
        both = recipe.teacher.joint
        whole = LabelledClips(clips, seed, augment=both.augment, crop_scale=both.crop_scale)
        stage("joint", teacher, whole, joint_loss)
    save_weights(teacher, release.teacher_path)
    return losses


def head_loss(teacher: Teacher, label_smoothing: float) -> Callable[[Sequence[Tensor]], Tensor]:
    """Cross-entropy of the fusion head alone on (audio_BD, visual_BD, labels_B)."""

    def loss(batch: Sequence[Tensor]) -> Tensor:
        audio_BD, visual_BD, labels_B = batch
        return classification_loss(teacher.head(audio_BD, visual_BD), labels_B, label_smoothing)

    return loss


def cache_teacher_outputs(release: Release, device: torch.device, bars: Bars | None = None) -> TeacherOutputs:
    """Runs the teacher once over the public clips, unless its outputs are there already."""
    folder = release.root / "teacher_outputs" / release.outputs_key()
    if not folder.exists():
        teacher = release.teacher.to(device)
        audio_ND, visual_NKD = encode_clips(teacher.encoders, release.public, device, bars, "teacher on public clips")
        probabilities_NC = head_probabilities(teacher.head, audio_ND, evaluation_mean(visual_NKD, release.public))
        save_outputs(folder, TeacherOutputs(audio_ND, visual_NKD, probabilities_NC))
        teacher.to("cpu")
    return release.teacher_outputs


@dataclasses.dataclass(frozen=True)
class TeacherAccuracy:
    """Shares of clips told right, jointly and by each branch's own classifier."""

    joint: float
    audio: float
    visual: float
    clips: int


@torch.inference_mode()
def teacher_accuracy(teacher: Teacher, clips: ClipArrays, device: torch.device) -> TeacherAccuracy:
    """Accuracy on labelled clips (``ClipArrays``), frames as in evaluation. Raises ValueError where there are none."""
    if len(clips.names) == 0:
        raise ValueError("no clips to measure the teacher on")
    audio_ND, visual_NKD = encode_clips(teacher.encoders, clips, device)
    visual_ND = evaluation_mean(visual_NKD, clips)
    teacher.cpu().eval()
    labels_N = np.asarray(clips.labels_N)

    def share(logits_NC: Tensor) -> float:
        return float((logits_NC.argmax(dim=1).numpy() == labels_N).mean())

    audio, visual = torch.from_numpy(audio_ND), torch.from_numpy(visual_ND)
    return TeacherAccuracy(
        joint=share(teacher.head(audio, visual)),
        audio=share(teacher.audio_classifier(audio)),
        visual=share(teacher.visual_classifier(visual)),
        clips=len(labels_N),
    )
