"""The student on ONNX Runtime: shapes, refusals, and a runtime that crashes."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isthmus.edge.student.encoder import RuntimeUnusable, StudentEncoder, probe_runtime
from isthmus.proto.errors import Corrupt
from isthmus.proto.messages import Captured, Features


@pytest.fixture
def folder(students: Any, tmp_path: Path) -> Path:
    for name, data in students.files("final", 0).items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


def test_from_a_clip_to_probabilities(folder: Path) -> None:
    encoder = StudentEncoder(folder)
    rng = np.random.default_rng(0)
    features = [
        encoder.features(rng.random((16, 16), np.float32), rng.random((2, 3, 16, 16), np.float32)) for _ in range(3)
    ]
    assert features[0].audio_D.shape == features[0].visual_D.shape == (12,)
    probabilities_NC = encoder.teacher_probabilities(features)
    assert probabilities_NC.shape == (3, 3)
    np.testing.assert_allclose(probabilities_NC.sum(axis=1), 1, atol=1e-5)
    assert encoder.local_probabilities(features[0]).shape == (3,)
    assert encoder.compress(features[0], 1.5).visual_D.shape == (8,)


def test_one_modality_is_answered_without_the_other(folder: Path) -> None:
    encoder = StudentEncoder(folder)
    rng = np.random.default_rng(0)
    spectrogram_FT, frames_KCHW = rng.random((16, 16), np.float32), rng.random((2, 3, 16, 16), np.float32)
    whole = encoder.features(spectrogram_FT, frames_KCHW)
    sound, picture = encoder.features(spectrogram_FT, None), encoder.features(None, frames_KCHW)
    assert (sound.captured, picture.captured) == (Captured.SOUND, Captured.PICTURE)
    np.testing.assert_array_equal(sound.audio_D, whole.audio_D)
    np.testing.assert_array_equal(picture.visual_D, whole.visual_D)
    answers_NC = encoder.teacher_probabilities([whole, sound, picture])
    assert len({row.tobytes() for row in answers_NC}) == 3
    # A batch of mixed clips gives the same answers as each clip alone.
    np.testing.assert_allclose(answers_NC[1], encoder.teacher_probabilities([sound])[0], rtol=1e-5)
    for part in (sound, picture):
        assert encoder.local_probabilities(part).sum() == pytest.approx(1, abs=1e-5)
        assert encoder.compress(part, 1.5).captured is part.captured
    with pytest.raises(ValueError, match="no features"):
        encoder.features(None, None)


def test_what_is_absent_or_broken_is_named(folder: Path) -> None:
    (folder / "local_head.onnx").write_bytes(b"\x00\x01")
    (folder / "visual_encoder.onnx").unlink()
    encoder = StudentEncoder(folder)
    blank = np.zeros((16, 16), np.float32), np.zeros((2, 3, 16, 16), np.float32)
    with pytest.raises(Corrupt, match=r"no visual_encoder\.onnx"):
        encoder.features(*blank)
    with pytest.raises(Corrupt, match=r"audio_encoder\.onnx does not run"):
        encoder.features(np.zeros((5, 5), np.float32), blank[1])
    features = Features(np.zeros(12, np.float32), np.zeros(12, np.float32))
    with pytest.raises(Corrupt, match=r"local_head\.onnx does not load"):
        encoder.local_probabilities(features)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("kill -ILL $$", "illegal instruction on this processor"),
        ("echo 'ModuleNotFoundError: no onnxruntime' >&2; exit 1", "no onnxruntime.*pip install 'isthmus"),
    ],
)
def test_a_runtime_that_crashes_is_reported_with_the_way_out(tmp_path: Path, script: str, message: str) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o700)
    with pytest.raises(RuntimeUnusable, match=message):
        probe_runtime(str(python))


def test_the_device_imports_no_torch() -> None:
    module = "isthmus.edge.commands.edge"
    program = f"import sys, {module}; print(sorted({{'torch', 'isthmus.distill', 'isthmus.cloud'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=600)
    assert done.stdout.strip() == "[]"
