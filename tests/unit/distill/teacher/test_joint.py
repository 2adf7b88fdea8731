"""The teacher trained by plain joint cross-entropy (Eq. 5.3)."""

import dataclasses
from pathlib import Path

import numpy as np
import torch

from isthmus.data.cache.read import ClipArrays
from isthmus.distill.release import Release
from isthmus.distill.teacher.teach import joint_loss, train_teacher
from tests.rigs.distill.release import tiny_recipe

CPU = torch.device("cpu")


def test_branches_and_head_are_trained_at_once(tmp_path: Path) -> None:
    base = tiny_recipe()
    joint = dataclasses.replace(base.teacher.joint, epochs=2, batch_size=6, warmup_epochs=0)
    recipe = dataclasses.replace(base, teacher=dataclasses.replace(base.teacher, balance="joint", joint=joint))
    clips, spec = 18, recipe.input
    rng = np.random.default_rng(0)
    release = Release(tmp_path / "release", recipe)
    vars(release)["public"] = ClipArrays(
        names=tuple(f"clip{n}" for n in range(clips)),
        labels_N=np.arange(clips) % 3,
        actors=tuple(f"person{n // 6}" for n in range(clips)),
        keys=tuple(map(str, range(clips))),
        spectrograms_NFT=rng.normal(size=(clips, spec.spectrogram_bins, spec.spectrogram_columns)).astype(np.float32),
        frames_NKHWC=rng.integers(256, size=(clips, 2, spec.stored_px, spec.stored_px, 3), dtype=np.uint8),
        spec=spec,
        classes=recipe.classes,
        skipped=(),
        source=None,
    )
    losses = train_teacher(release, seed=0, device=CPU)
    assert list(losses) == ["joint"] and len(losses["joint"]) == 2
    teacher = release.teacher
    assert float(teacher.head.temperature) != 1  # calibrated on the person held out
    torch.manual_seed(0)
    start = release.new_teacher()
    for part in ("encoders.audio_encoder", "encoders.visual_encoder", "head.classifier"):
        before, after = start.get_submodule(part), teacher.get_submodule(part)
        assert any(not torch.equal(one, two) for one, two in zip(before.parameters(), after.parameters(), strict=True))


def test_the_loss_is_the_cross_entropy_of_the_fused_logits(tmp_path: Path) -> None:
    recipe = tiny_recipe()
    teacher = Release(tmp_path, recipe).new_teacher().eval()
    batch = (torch.randn(2, 32, 32), torch.randn(2, 1, 3, 32, 32), torch.tensor([0, 2]))
    with torch.inference_mode():
        expected = torch.nn.functional.cross_entropy(teacher(*batch[:2]), batch[2])
        torch.testing.assert_close(joint_loss(teacher, 0.0)(batch), expected)
