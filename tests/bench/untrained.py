"""Releases of untrained networks in real size and speed, made in seconds."""

import dataclasses
import json
from pathlib import Path

import torch
from torch import nn

from isthmus.data.transforms import InputSpec
from isthmus.distill.models.heads import HeadBank
from isthmus.distill.models.trunk import EncoderPair
from isthmus.distill.recipes import PRESETS
from isthmus.distill.release import Release, save_weights
from isthmus.distill.student.export import export_student
from tests.rigs.data.random_cache import write_clips

CLASSES = ("NEU", "HAP", "SAD", "FEA", "DIS", "ANG")
CLIPS = 6


def encoders_release(root: Path, preset: str) -> Release:
    """Return recipe, teacher and student of a preset. The teacher's trunk is small, since only its head is exported."""
    recipe = dataclasses.replace(PRESETS[preset]("crema-d", CLASSES), teacher_trunk="resnet18")
    release = Release.create(root, recipe)
    torch.manual_seed(0)
    save_weights(release.new_teacher(), release.teacher_path)
    student = release.new_student()
    awaken(student)
    save_weights(student, release.student_path(0))
    return release


def export_base(release: Release) -> Path:
    """Write the student's files with its heads, as ``isthmus distill student`` does."""
    heads = HeadBank(release.recipe.feature_width, len(CLASSES), release.recipe.ratios)
    export_student(release, release.student(0), heads, release.base_dir)
    return release.base_dir


def served_release(root: Path, ratios: tuple[float, ...]) -> Release:
    """Write a release for a cloud: small inputs and random clips; features and heads have their real width."""
    spec = InputSpec(
        spectrogram_bins=32, spectrogram_columns=32, frame_px=32, stored_px=36, frames_stored=2, frames_used=1
    )
    recipe = dataclasses.replace(
        PRESETS["smoke"]("crema-d", CLASSES), name="bench", input=spec, ratios=ratios, teacher_trunk="resnet18"
    )
    release = Release.create(root, recipe)
    write_clips(release.public_dir / "clips", spec, CLASSES, CLIPS)
    (root / "public.json").write_text(json.dumps({"folder": "clips"}))
    torch.manual_seed(0)
    save_weights(release.new_teacher(), release.teacher_path)
    save_weights(release.new_student(), release.student_path(0))
    release.base_dir.mkdir()
    for name in ("audio_encoder.onnx", "visual_encoder.onnx", "teacher_head.onnx"):
        (release.base_dir / name).write_bytes(b"never fetched here")
    HeadBank(recipe.feature_width, len(CLASSES), ratios).save(release.base_dir / "heads.safetensors")
    return release


@torch.no_grad()
def awaken(encoders: EncoderPair) -> None:
    """Fill the untrained residual branches, which end in zeros, with values like those of trained ones."""
    for module in encoders.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.uniform_(0.5, 1.0)
            module.bias.uniform_(-0.1, 0.1)
