"""A teacher on pretrained trunks: necks and head are fitted on features in closed form or convexly, without epochs.

The trunks have seen none of the labels, so all public clips serve for the head; no clips need to be held out for it.
Axes: N clips, K frames, W width of a trunk, D feature width, M modalities, C classes.
"""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from rich.progress import Progress as Bars
from torch import nn

from isthmus.data.files import write_atomically
from isthmus.distill.models import pretrained
from isthmus.distill.models.teacher import Teacher
from isthmus.distill.models.trunk import PretrainedEncoder
from isthmus.distill.release import Release
from isthmus.distill.teacher.held_out import Held, cross_fit, fit_weights
from isthmus.distill.training.teacher_cache import encode_clips, evaluation_mean

log = logging.getLogger(__name__)

Float32s = npt.NDArray[np.float32]
Float64s = npt.NDArray[np.float64]

DECAY: Final = 0.03
"""Of the head's weights, relative to the cross-entropy; chosen on RavFace among 0.03 and 0.1."""

_LEAST_DEVIATION: Final = 1e-6


def fit_on_trunks(
    release: Release,
    teacher: Teacher,
    files: tuple[Path, Path] | None,
    *,
    seed: int,
    device: torch.device,
    bars: Bars | None = None,
) -> None:
    """Load the trunks, run them over all public clips, and fit necks and head.

    Raises ValueError if no files are given, or if they are not those of the recipe.
    """
    recipe, clips = release.recipe, release.public
    trunks = recipe.pretrained_trunks
    if files is None or trunks is None:
        raise ValueError("this release has pretrained trunks: give --sound-trunk and --picture-trunk")
    encoders = (teacher.encoders.audio_encoder, teacher.encoders.visual_encoder)
    necks = []
    for encoder, trunk, path in zip(encoders, trunks, files, strict=True):
        assert isinstance(encoder, PretrainedEncoder)
        pretrained.load(encoder.trunk, trunk, path)
        necks.append(encoder.neck)
        encoder.neck = nn.Identity()  # type: ignore[assignment]
    audio_NW, visual_NKW = encode_clips(teacher.encoders, clips, device, bars, "features of the trunks")
    teacher.cpu()
    for encoder, neck in zip(encoders, necks, strict=True):
        encoder.neck = neck
    fit_necks_and_head(release, teacher, (audio_NW, evaluation_mean(visual_NKW, clips)), seed)


def fit_necks_and_head(release: Release, teacher: Teacher, rows_MNW: tuple[Float32s, Float32s], seed: int) -> None:
    """Fit both necks and the head on the trunks' features of all public clips (sound, picture), and calibrate it.

    Folds that leave people out give the head's temperature, and its accuracy on strangers for the log.
    """
    recipe, clips = release.recipe, release.public
    features = []
    encoders = (teacher.encoders.audio_encoder, teacher.encoders.visual_encoder)
    for encoder, rows_NW in zip(encoders, rows_MNW, strict=True):
        weight_DW, bias_D = principal_neck(rows_NW, recipe.feature_width, seed)
        neck = encoder.neck
        assert isinstance(neck, nn.Linear)
        with torch.no_grad():
            neck.weight.copy_(torch.from_numpy(weight_DW))
            neck.bias.copy_(torch.from_numpy(bias_D))
        features.append(rows_NW @ weight_DW.T + bias_D)
    labels_N = np.asarray(clips.labels_N)
    persons_N = np.unique(np.asarray(clips.actors), return_inverse=True)[1]
    held = Held(np.stack(features, axis=1).astype(np.float64), labels_N, persons_N)
    counts_C = np.bincount(labels_N, minlength=len(recipe.classes)) + 1
    bias_C = np.log(counts_C / counts_C.sum())  # features are 0 on average, so the bias is that of the class shares
    nothing_MCD = np.zeros((2, len(recipe.classes), recipe.feature_width))
    crossed = cross_fit(held, nothing_MCD, bias_C, recipe.modality_dropout, seed, DECAY)
    fitted_MCD = torch.from_numpy(fit_weights(held, nothing_MCD, bias_C, recipe.modality_dropout, DECAY)).float()
    with torch.no_grad():
        classifier = teacher.head.classifier
        classifier.bias.copy_(torch.from_numpy(bias_C))
    teacher.head.set_weights(fitted_MCD[0], fitted_MCD[1], crossed.temperature)
    teacher.branches_from_head()
    facts = {"clips": len(clips), "actors": sorted({*clips.actors} - {""}), **dataclasses.asdict(crossed)}
    write_atomically(release.teacher_path.parent / "held_out.json", json.dumps(facts, indent=1))
    both, sound, picture = crossed.accuracy_3
    log.info(
        f"head fitted on {len(clips)} clips (on people left out: {both:.0%} right, {sound:.0%} by sound alone, "
        f"{picture:.0%} by picture alone), temperature {crossed.temperature:.2f}"
    )


def principal_neck(rows_NW: Float32s, width: int, seed: int) -> tuple[Float32s, Float32s]:
    """Return weight (D, W) and bias (D,) of a linear neck: the leading principal directions of standardised features,
    rotated at random, with mean 0 and mean square 1 over these clips.

    The rotation gives all D features about the same variance. Code that standardises features later (heads, 8-bit
    numbers) would otherwise blow up the directions in which clips hardly differ: it cost 7 points on RavFace. If there
    are fewer clips or trunk features than D, the remaining directions are empty.
    """
    mean_W, deviation_W = rows_NW.mean(axis=0), np.maximum(rows_NW.std(axis=0), _LEAST_DEVIATION)
    standard_NW = ((rows_NW - mean_W) / deviation_W).astype(np.float64)
    _, _, directions_RW = np.linalg.svd(standard_NW, full_matrices=False)
    kept_RW = directions_RW[:width]
    rotation_DD, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(width, width)))
    weight_DW: Float64s = rotation_DD[:, : len(kept_RW)] @ kept_RW
    scale = np.sqrt(np.square(standard_NW @ weight_DW.T).mean()) or 1.0
    weight_DW = weight_DW / scale / deviation_W
    return weight_DW.astype(np.float32), (-weight_DW @ mean_W).astype(np.float32)
