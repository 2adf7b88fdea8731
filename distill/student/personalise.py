"""AllDistill (Alg. 6), selective distillation in rounds (Alg. 7) and compression training (Alg. 8), as plain functions.

The cloud's worker, the command line and the experiments call these same functions. A student made over the wire
therefore equals one made offline from the same seed.
"""

import copy
import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from isthmus.distill.models.heads import HeadBank
from isthmus.distill.models.trunk import EncoderPair
from isthmus.distill.recipes import Recipe, TrainConfig
from isthmus.distill.release import Release
from isthmus.distill.selection import (
    STRATEGIES,
    Public,
    Selection,
    Shards,
    Strategy,
    Wanted,
    cosine,
    select_cosine_in_shards,
)
from isthmus.distill.training.checkpoint import state_hash
from isthmus.distill.training.datasets import DistillationClips, LabelledFeatures
from isthmus.distill.training.loop import OnEpoch, ignore_epochs, pick_device
from isthmus.distill.training.loop import fit as fit_module
from isthmus.distill.training.losses import feature_distillation_loss, masked_loss
from isthmus.distill.training.teacher_cache import Encoded, TeacherFeatures, encode_clips

Float32s = npt.NDArray[np.float32]
StudentEncoders = EncoderPair


def distil(
    release: Release,
    student: EncoderPair,
    selection: Selection,
    config: TrainConfig,
    *,
    seed: int,
    run: str,
    checkpoint: Path | None = None,
    from_epoch: int = 0,
    until_epoch: int | None = None,
    device: torch.device | None = None,
    on_epoch: OnEpoch = ignore_epochs,
) -> tuple[float, ...]:
    """Train ``student`` in place by Eq. 5.4 on the chosen public clips, and return the loss of each epoch.

    Both modalities are trained at once; they share no weights. Clips count by their weight in the loss, but not in
    batch normalisation, whose statistics are not weighted. Arguments as in ``loop.fit``.
    """

    def loss(batch: Sequence[Tensor]) -> Tensor:
        spectrogram_BFT, frames_BKCHW, audio_BD, visual_BD, *weighted = batch
        weights_B = weighted[0] if weighted else None
        return feature_distillation_loss(
            student.audio(spectrogram_BFT), audio_BD, weights_B
        ) + feature_distillation_loss(student.visual(frames_BKCHW).mean(dim=1), visual_BD, weights_B)

    progress = fit_module(
        student,
        DistillationClips(release.public, release.teacher_outputs, selection, seed, release.recipe.frames_distilled),
        loss,
        config,
        seed=seed,
        run=run,
        checkpoint=checkpoint,
        from_epoch=from_epoch,
        until_epoch=until_epoch,
        device=device,
        on_epoch=on_epoch,
    )
    return progress.losses


def all_distill(
    release: Release,
    *,
    seed: int,
    checkpoint: Path | None = None,
    weights: Path | None = None,
    device: torch.device | None = None,
    on_epoch: OnEpoch = ignore_epochs,
) -> EncoderPair:
    """Train the student that every device begins with: distilled on the whole public set (Alg. 6).

    A student that shares the teacher's encoders is a copy of them: there is nothing to distil.
    """
    if release.recipe.shares_encoders:
        return copy.deepcopy(release.teacher.encoders)
    torch.manual_seed(seed)
    student = release.new_student(weights)
    everything = Selection.whole(len(release.public.names))
    run = release.recipe.hash(release.outputs_key(), f"all-distill seed {seed}")
    distil(
        release,
        student,
        everything,
        release.recipe.all_distill,
        seed=seed,
        run=run,
        checkpoint=checkpoint,
        device=device,
        on_epoch=on_epoch,
    )
    return student


def select_round(
    release: Release,
    wanted: Wanted,
    *,
    round: int,
    seed: int,
    strategy: str | Strategy | None = None,
    samples_per_row: int | None = None,
    shards: Shards | None = None,
) -> Selection:
    """Run SelectData of one round with the recipe's strategy or another: a name, or for experiments a function.

    ``shards``: the same public set in shards, to be searched instead (see ``runs_in_shards``). Raises ValueError for an
    unknown name, for what the strategy refuses, and for shards of another size than the public set, or of a strategy
    that cannot use them.

    >>> prototypes = make_prototypes(np.full((6, 3), 1 / 3, np.float32), seed=0)
    >>> wanted = Wanted(prototypes.values_KC, prototypes.sizes_K)
    >>> len(select_round(release, wanted, round=0, seed=0, samples_per_row=4))
    4
    """
    config = release.recipe.personalise
    strategy = strategy or config.strategy
    if isinstance(strategy, str):
        if strategy not in STRATEGIES:
            raise ValueError(f"unknown strategy {strategy!r}; known: {', '.join(STRATEGIES)}")
        strategy = STRATEGIES[strategy]
    samples_per_row = samples_per_row or config.samples_per_row
    if shards is not None:
        if strategy is not cosine or sum(shards.sizes) != len(release.public):
            raise ValueError("shards are for the paper's strategy, and hold the samples of the public set")
        return Selection.of(select_cosine_in_shards(wanted.prototypes_KC, shards, samples_per_row))
    outputs = release.teacher_outputs
    public = Public(outputs.probabilities_NC, release.labels(), TeacherFeatures(outputs, release.public.spec))
    return strategy(wanted, public, samples_per_row, np.random.default_rng((seed, round)))


def runs_in_shards(recipe: Recipe) -> bool:
    """Return whether the recipe's selection can search a public set in shards: the paper's strategy can."""
    return STRATEGIES[recipe.personalise.strategy] is cosine


def distil_round(
    release: Release,
    selection: Selection,
    *,
    round: int,
    rounds: int,
    seed: int,
    checkpoint: Path,
    on_epoch: OnEpoch = ignore_epochs,
    start: EncoderPair | None = None,
    device: torch.device | None = None,
) -> EncoderPair:
    """Run one round of Alg. 7: round ``round`` (from 0) of ``rounds`` trains its share of the recipe's epochs.

    The checkpoint carries student and optimiser from one round to the next and, within a round, from epoch to epoch, so
    a killed job resumes. ``start`` defaults to the release's base student. The selection affects the draw of batches
    only by its length and order. Raises TrainingDiverged, CheckpointError, DiskFull.

    >>> picked = Selection.of(np.arange(12))
    >>> student = distil_round(
    ...     release, picked, round=0, rounds=1, seed=0, checkpoint=folder / "job.safetensors", device=CPU
    ... )
    >>> type(student).__name__
    'EncoderPair'
    """
    config = release.recipe.personalise.train
    began = start if start is not None else release.student(0)
    student = copy.deepcopy(began)
    run = release.recipe.hash(release.outputs_key(), state_hash([student]), f"personalise {rounds} seed {seed}")
    distil(
        release,
        student,
        selection,
        config,
        seed=seed + 1,  # not the draws that made the base student
        run=run,
        checkpoint=checkpoint,
        until_epoch=config.epochs * (round + 1) // rounds,
        device=device,
        on_epoch=on_epoch,
    )
    return averaged(began, student, release.recipe.personalise.keep) if round + 1 == rounds else student


@torch.no_grad()
def averaged(began: EncoderPair, student: EncoderPair, keep: float) -> EncoderPair:
    """Return ``student`` with each weight moved by the share ``keep`` towards ``began``, the student it started as.

    A student distilled on a few clips forgets the others. A student between it and its start has learned about as much
    and forgotten less (WiSE-FT: Wortsman et al., CVPR 2022; not in the paper). Statistics of batch normalisation are
    averaged too. ``keep`` 0 changes nothing.
    """
    if keep:
        before = began.state_dict()
        for name, value in student.state_dict().items():
            if value.is_floating_point():
                value.lerp_(before[name].to(value.device), keep)
    return student


def clips_of_heads(release: Release, selection: Selection) -> Selection:
    """Return the clips that heads are trained on if the student was distilled on ``selection``, by the recipe's
    ``heads_on``.
    """
    every = release.recipe.personalise.heads_on == "all"
    return Selection.whole(len(release.public.names)) if every else selection


def train_heads(
    release: Release,
    student: EncoderPair,
    selection: Selection,
    *,
    seed: int,
    on_epoch: OnEpoch = ignore_epochs,
    device: torch.device | None = None,
    encoded: Encoded | None = None,
) -> HeadBank:
    """Run Alg. 8 (Eq. 5.9): per ratio a compressor and a head, cross-entropy on the selected clips, student frozen.

    With the recipe's ``heads_on`` "all", all public clips are used instead, with equal weights. Features of the clips
    are computed once, and each clip counts by its weight. ``encoded`` are the features of all public clips, if they are
    known. If the teacher's fusion is linear, a ratio's compressor starts as the leading principal directions of those
    features, and its head as the teacher's head on the compressed features. Training then begins at the uncompressed
    student's own accuracy instead of at chance (beyond the paper).

    >>> heads = train_heads(release, release.student(), Selection.whole(24), seed=0, device=CPU)
    >>> heads.ratios
    (1.0, 2.0)
    """
    recipe = release.recipe
    device = device or pick_device()
    selection = clips_of_heads(release, selection)
    order_S = np.argsort(selection.indices_S, kind="stable")
    clips = release.public.subset(selection.indices_S[order_S])
    weights_S = selection.weights_S[order_S] if selection.weighted else None
    if encoded is None:
        audio_SD, visual_SKD = encode_clips(student, clips, device)
    else:
        audio_SD, visual_SKD = (part[selection.indices_S[order_S]] for part in encoded)
    data = LabelledFeatures(audio_SD, visual_SKD, np.asarray(clips.labels_N), recipe.input.frames_used, seed, weights_S)
    torch.manual_seed(seed)
    bank = HeadBank(recipe.feature_width, len(recipe.classes), recipe.ratios)
    _start_from_teacher(bank, release, audio_SD, visual_SKD.reshape(-1, visual_SKD.shape[2]))

    def loss(batch: Sequence[Tensor]) -> Tensor:
        audio_BD, visual_BD, labels_B, *weighted = batch
        weights_B = weighted[0] if weighted else None
        losses = [
            masked_loss(
                partial(bank[ratio], audio_BD, visual_BD),
                labels_B,
                recipe.modality_dropout,
                recipe.heads.label_smoothing,
                weights_B,
            )
            for ratio in bank.ratios
        ]
        return torch.stack(losses).sum()  # the ratios share no weights, so the sum trains each on its own

    config = dataclasses.replace(recipe.heads, batch_size=min(recipe.heads.batch_size, max(2, len(clips.names))))
    fit_module(bank, data, loss, config, seed=seed, run="heads", device=device, on_epoch=on_epoch)
    return bank.cpu().eval()


@torch.no_grad()
def _start_from_teacher(bank: HeadBank, release: Release, audio_SD: Float32s, visual_SD: Float32s) -> None:
    linear = release.teacher_head.linear()
    if linear is None:
        return
    audio_CD, visual_CD, bias_C = linear
    for ratio in bank.ratios:
        head = bank[ratio]
        bias = bias_C.clone()
        weights = []
        for features_SD, weight_CD, compressor in (
            (audio_SD, audio_CD, head.compress_audio),
            (visual_SD, visual_CD, head.compress_visual),
        ):
            width = compressor.out_features
            mean_D = torch.from_numpy(features_SD.mean(axis=0))
            directions_WD = _leading_directions(features_SD, width)
            compressor.weight.copy_(directions_WD)
            compressor.bias.copy_(-directions_WD @ mean_D)
            weights.append(weight_CD @ directions_WD.T)
            bias += weight_CD @ mean_D
        head.classifier.weight.copy_(torch.cat(weights, dim=1))
        head.classifier.bias.copy_(bias)


def _leading_directions(features_SD: Float32s, width: int) -> Tensor:
    """Return (W, D) orthonormal rows: principal directions first, completed to W if there are fewer samples."""
    if width >= features_SD.shape[1]:
        return torch.eye(features_SD.shape[1])[:width]
    centred = torch.from_numpy(features_SD - features_SD.mean(axis=0)).double()
    covariance_DD = centred.T @ centred
    _, vectors_DD = torch.linalg.eigh(covariance_DD)
    directions_WD: Tensor = vectors_DD.flip(1)[:, :width].T.float().contiguous()
    return directions_WD
