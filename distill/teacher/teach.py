"""Train the teacher (Eq. 5.3): the branches, each alone or balanced, then the head that fuses them."""

import dataclasses
import json
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from rich.progress import Progress as Bars
from torch import Tensor, nn

from isthmus.data.cache.read import ClipArrays
from isthmus.data.files import write_atomically
from isthmus.distill.models.heads import FusionHead, RatioHead, present
from isthmus.distill.models.teacher import Teacher
from isthmus.distill.release import Release, save_weights
from isthmus.distill.teacher.balance import OgmGe
from isthmus.distill.teacher.held_out import CrossFit, Held, cross_fit, fit_weights, held_out_clips, temperature
from isthmus.distill.teacher.on_trunks import fit_on_trunks
from isthmus.distill.training.datasets import LabelledClips, LabelledFeatures, LabelledFrames, LabelledSpectrograms
from isthmus.distill.training.loop import EpochReport, OnGradients, SeededDataset, fit
from isthmus.distill.training.losses import classification_loss, masked_loss
from isthmus.distill.training.teacher_cache import (
    TeacherOutputs,
    encode_clips,
    evaluation_mean,
    head_probabilities,
    save_outputs,
)
from isthmus.proto.messages import Captured

log = logging.getLogger(__name__)

Float32s = npt.NDArray[np.float32]
Losses = dict[str, tuple[float, ...]]
Watch = Callable[[str, EpochReport], None]


def train_teacher(
    release: Release,
    *,
    seed: int,
    device: torch.device,
    weights: Path | None = None,
    workers: int = 0,
    trunks: tuple[Path, Path] | None = None,
    watch: Watch = lambda _stage, _report: None,
    bars: Bars | None = None,
) -> Losses:
    """Train and save the teacher, and run it over the public clips. Resume from the stage and epoch it was stopped in.

    ``trunks`` are the files of a recipe's pretrained trunks, sound and picture; such a teacher is fitted without stages
    (distill/teacher/on_trunks.py). Returns each stage's loss per epoch. Raises TrainingDiverged, CheckpointError,
    DiskFull.

    >>> split = choose_split(listing, private_actors=["1003"])
    >>> begun = begin_release(folder / "release", listing, recipe, split, progress=False)
    >>> sorted(train_teacher(begun, seed=0, device=CPU))
    ['audio', 'visual']
    """
    recipe = release.recipe
    torch.manual_seed(seed)
    teacher = release.new_teacher(weights)
    if recipe.pretrained_trunks is not None:
        fit_on_trunks(release, teacher, trunks, seed=seed, device=device, bars=bars)
        save_weights(teacher, release.teacher_path)
        return {}
    clips, held_out = teaching_clips(release, seed)
    run = recipe.hash(release.public.content_hash, f"seed {seed}")
    folder = release.teacher_path.parent
    losses: Losses = {}

    def stage(
        name: str,
        module: nn.Module,
        data: SeededDataset[Sequence[Tensor]],
        loss: Callable[[Sequence[Tensor]], Tensor],
        on_gradients: OnGradients | None = None,
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
            on_gradients=on_gradients,
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

    if recipe.teacher.balance == "ogm-ge":
        both = recipe.teacher.joint
        balance = OgmGe(teacher, recipe.teacher.alpha, both.label_smoothing, seed)
        whole = LabelledClips(clips, seed, augment=both.augment, crop_scale=both.crop_scale)
        stage("joint", teacher, whole, balance.loss, balance.on_gradients)
        teacher.branches_from_head()
    elif recipe.teacher.balance == "joint":
        both = recipe.teacher.joint
        whole = LabelledClips(clips, seed, augment=both.augment, crop_scale=both.crop_scale)
        stage("joint", teacher, whole, joint_loss(teacher, both.label_smoothing))
        if teacher.head.linear() is not None:
            teacher.branches_from_head()
    else:
        stage("audio", audio, LabelledSpectrograms(clips, seed, augment=recipe.teacher.audio.augment), audio_loss)
        looks = recipe.teacher.visual
        frames = LabelledFrames(clips, seed, augment=looks.augment, crop_scale=looks.crop_scale)
        stage("visual", visual, frames, visual_loss)
        teacher.head.start_from_branches(teacher.audio_classifier, teacher.visual_classifier)
    fusion, dropout = teacher.head, recipe.modality_dropout
    if held_out is not None:
        unseen = encode_clips(teacher.encoders, held_out, device, bars, "features of held-out clips")
    if recipe.teacher.balance == "joint":  # the head is trained already
        if held_out is not None:
            calibrate(fusion, unseen[0], evaluation_mean(unseen[1], held_out), held_out.labels_N)
    elif held_out is not None and fusion.linear() is not None:
        crossed = fit_on_held_out(fusion, unseen[0], evaluation_mean(unseen[1], held_out), held_out, dropout, seed)
        facts = {"clips": len(held_out), "actors": sorted({*held_out.actors} - {""}), **dataclasses.asdict(crossed)}
        write_atomically(folder / "held_out.json", json.dumps(facts, indent=1))
    elif recipe.teacher.head.epochs:
        audio_ND, visual_NKD = encode_clips(teacher.encoders, clips, device, bars, "features for the head")
        data = LabelledFeatures(audio_ND, visual_NKD, clips.labels_N, recipe.input.frames_used, seed)
        stage("head", fusion, data, head_loss(fusion, dropout, recipe.teacher.head.label_smoothing))
        if held_out is not None:
            calibrate(fusion, unseen[0], evaluation_mean(unseen[1], held_out), held_out.labels_N)
    save_weights(teacher, release.teacher_path)
    return losses


def teaching_clips(release: Release, seed: int) -> tuple[ClipArrays, ClipArrays | None]:
    """Return the public clips for the branches, and those held out (None if the recipe holds out none)."""
    public = release.public
    held = held_out_clips(public.actors, public.labels_N, release.recipe.teacher.held_out, seed)
    if held.size == 0:
        return public, None
    return public.subset(np.setdiff1d(np.arange(len(public)), held)), public.subset(held)


def fit_on_held_out(
    head: FusionHead, audio_ND: Float32s, visual_ND: Float32s, clips: ClipArrays, dropout: float, seed: int
) -> CrossFit:
    """Fit a linear head, from its present weights, on features of clips that the branches have not seen, and calibrate
    it.

    Raises ValueError for a fusion that is not linear.
    """
    head.cpu().eval()
    weights = head.linear()
    if weights is None:
        raise ValueError(f"fusion {head.fusion!r} is not linear: it is trained by its stage instead")
    audio_CD, visual_CD, bias_C = (each.detach().double().numpy() for each in weights)
    persons_N = np.unique(np.asarray(clips.actors), return_inverse=True)[1]
    held = Held(np.stack([audio_ND, visual_ND], axis=1).astype(np.float64), np.asarray(clips.labels_N), persons_N)
    start_MCD = np.stack([audio_CD, visual_CD])
    crossed = cross_fit(held, start_MCD, bias_C, dropout, seed)
    fitted_MCD = torch.from_numpy(fit_weights(held, start_MCD, bias_C, dropout)).float()
    head.set_weights(fitted_MCD[0], fitted_MCD[1], crossed.temperature)
    both, sound, picture = crossed.accuracy_3
    log.info(
        f"head fitted on {len(clips)} held-out clips (cross-fitted: {both:.0%} right, {sound:.0%} by sound alone, "
        f"{picture:.0%} by picture alone), temperature {crossed.temperature:.2f}"
    )
    return crossed


@torch.no_grad()
def calibrate(head: FusionHead, audio_ND: Float32s, visual_ND: Float32s, labels_N: npt.NDArray[np.int64]) -> None:
    """Set the temperature of a head that was fitted on other clips than these."""
    head.cpu().eval()
    logits_NC = head(torch.from_numpy(audio_ND), torch.from_numpy(visual_ND)).double().numpy()
    head.temperature.fill_(temperature(logits_NC, np.asarray(labels_N)))


def joint_loss(teacher: Teacher, label_smoothing: float) -> Callable[[Sequence[Tensor]], Tensor]:
    """Return Eq. 5.3: cross-entropy of the whole teacher on (spectrogram_BFT, frames_BKCHW, labels_B)."""

    def loss(batch: Sequence[Tensor]) -> Tensor:
        spectrogram_BFT, frames_BKCHW, labels_B = batch
        return classification_loss(teacher(spectrogram_BFT, frames_BKCHW), labels_B, label_smoothing)

    return loss


def head_loss(
    head: FusionHead | RatioHead, dropout: float, label_smoothing: float
) -> Callable[[Sequence[Tensor]], Tensor]:
    """Return the loss of a head alone: cross-entropy on (audio_BD, visual_BD, labels_B), expected under modality
    dropout.
    """

    def loss(batch: Sequence[Tensor]) -> Tensor:
        audio_BD, visual_BD, labels_B = batch
        return masked_loss(partial(head, audio_BD, visual_BD), labels_B, dropout, label_smoothing)

    return loss


def cache_teacher_outputs(release: Release, device: torch.device, bars: Bars | None = None) -> TeacherOutputs:
    """Run the teacher once over the public clips, unless its outputs are already there.

    >>> cache_teacher_outputs(release, CPU).probabilities_NC.shape
    (24, 3)
    """
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
    """Accuracy of the head with both modalities and with one of them absent (``no_visual``, ``no_audio``), and of each
    branch's own classifier (``audio``, ``visual``).
    """

    joint: float
    audio: float
    visual: float
    no_visual: float
    no_audio: float
    clips: int


@torch.inference_mode()
def teacher_accuracy(teacher: Teacher, clips: ClipArrays, device: torch.device) -> TeacherAccuracy:
    """Measure the teacher on labelled clips, frames as in evaluation. Raises ValueError if there are none."""
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
        no_visual=share(teacher.head(audio, visual, present(Captured.SOUND, len(audio)))),
        no_audio=share(teacher.head(audio, visual, present(Captured.PICTURE, len(audio)))),
        audio=share(teacher.audio_classifier(audio)),
        visual=share(teacher.visual_classifier(visual)),
        clips=len(labels_N),
    )
