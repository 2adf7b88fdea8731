"""The teacher on pretrained trunks: the neck, and a release from first to last with random trunks."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from isthmus.data.cache.read import ClipArrays
from isthmus.distill.models.trunk import PretrainedEncoder
from isthmus.distill.recipes import Recipe, on_trunks
from isthmus.distill.release import Release
from isthmus.distill.selection import Selection
from isthmus.distill.student.export import export_student
from isthmus.distill.student.int8 import quantise_student
from isthmus.distill.student.personalise import all_distill
from isthmus.distill.teacher.on_trunks import principal_neck
from isthmus.distill.teacher.teach import cache_teacher_outputs, train_teacher
from tests.rigs.distill.release import tiny_recipe
from tests.rigs.distill.trunks import random_trunks

CPU = torch.device("cpu")


def _short(recipe: Recipe) -> Recipe:
    """Return the recipe for clips of two small frames and a tenth of a second."""
    return dataclasses.replace(
        recipe,
        input=dataclasses.replace(
            recipe.input,
            duration_s=0.1,
            spectrogram_columns=8,
            frame_px=64,
            stored_px=64,
            frames_stored=2,
            frames_used=2,
        ),
    )


def _noise(recipe: Recipe, clips: int) -> ClipArrays:
    """Return random clips of three classes and people of six clips each."""
    rng = np.random.default_rng(0)
    return ClipArrays(
        names=tuple(f"clip{n}" for n in range(clips)),
        labels_N=np.arange(clips) % 3,
        actors=tuple(f"person{n // 6}" for n in range(clips)),
        keys=tuple(map(str, range(clips))),
        spectrograms_NFT=rng.uniform(size=(clips, 40, 8)).astype(np.float32),
        frames_NKHWC=rng.integers(256, size=(clips, 2, 64, 64, 3), dtype=np.uint8),
        spec=recipe.input,
        classes=recipe.classes,
        skipped=(),
        source=None,
    )


def test_the_neck_keeps_distances_and_spreads_them_evenly() -> None:
    rng = np.random.default_rng(0)
    rows_NW = (rng.normal(size=(60, 8)) @ rng.normal(size=(8, 30)) + 5).astype(np.float32)
    weight_DW, bias_D = principal_neck(rows_NW, 8, seed=0)
    features_ND = rows_NW @ weight_DW.T + bias_D
    np.testing.assert_allclose(features_ND.mean(axis=0), 0, atol=1e-4)
    assert np.square(features_ND).mean() == pytest.approx(1, rel=1e-3)
    standard_NW = (rows_NW - rows_NW.mean(axis=0)) / rows_NW.std(axis=0)
    ratio = np.linalg.norm(features_ND[1:] - features_ND[0], axis=1) / np.linalg.norm(
        standard_NW[1:] - standard_NW[0], axis=1
    )
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-3)


def test_the_neck_of_few_clips_is_padded() -> None:
    weight_DW, _ = principal_neck(np.random.default_rng(0).normal(size=(5, 12)).astype(np.float32), 9, seed=0)
    assert weight_DW.shape == (9, 12) and np.isfinite(weight_DW).all()


def test_a_release_on_trunks(tmp_path: Path) -> None:
    trunks, files = random_trunks(tmp_path)
    recipe = _short(on_trunks(tiny_recipe(), *trunks))
    assert Recipe.from_json(recipe.to_json()) == recipe
    release = Release(tmp_path / "release", recipe)
    vars(release)["public"] = _noise(recipe, 18)
    with pytest.raises(ValueError, match="give --sound-trunk and --picture-trunk"):
        train_teacher(release, seed=0, device=CPU)
    assert train_teacher(release, seed=0, device=CPU, trunks=files) == {}
    student = all_distill(release, seed=0)
    assert isinstance(student.audio_encoder, PretrainedEncoder)
    sound = torch.rand(2, 40, 8)
    torch.testing.assert_close(student.audio(sound), release.teacher.encoders.audio(sound))
    written = export_student(release, student, None, tmp_path / "student")
    assert [path.name for path in written] == ["audio_encoder.onnx", "teacher_head.onnx", "visual_encoder.onnx"]
    # An LSTM has no int8 form; the rest of the encoders is smaller, or the student stays as it was.
    made, _ = quantise_student(release, tmp_path / "student", None, Selection.whole(18))
    assert made.int8_bytes < made.fp32_bytes
    sizes = sum(path.stat().st_size for path in written if path.name != "teacher_head.onnx")
    assert sizes == (made.int8_bytes if made.used else made.fp32_bytes)


def test_a_student_of_its_own_has_features_of_both_signs(tmp_path: Path) -> None:
    trunks, files = random_trunks(tmp_path)
    recipe = on_trunks(tiny_recipe(), *trunks, student_trunk="resnet18-quarter")
    assert Recipe.from_json(recipe.to_json()) == recipe and not recipe.shares_encoders
    release = Release(tmp_path / "release", _short(recipe))
    vars(release)["public"] = _noise(release.recipe, 12)
    train_teacher(release, seed=0, device=CPU, trunks=files)
    cache_teacher_outputs(release, CPU)
    student = all_distill(release, seed=0)
    features_BD = student.audio(torch.rand(4, 40, 8))
    assert features_BD.shape == (4, recipe.feature_width)
    assert (features_BD < 0).any() and (features_BD > 0).any()
