"""This version opens a model with experts that an earlier version wrote, and serves its task with the same answers.

``formats/<version>/experts`` was made by ``formats/make_experts.py`` and must not be edited. Tests use a copy.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isthmus.cloud.elastic.experts import files
from isthmus.cloud.elastic.model.runner import ElasticRunner
from isthmus.cloud.elastic.model.vit import ElasticViT
from isthmus.cloud.elastic.model.weights import load_vit, pixel_spec
from isthmus.cloud.elastic.scheduling.levels import level_of
from isthmus.cloud.elastic.scheduling.profile import Profile
from isthmus.cloud.elastic.tasks.files import load_tasks
from isthmus.cloud.elastic.tasks.router import ExpertsShape
from isthmus.data.images import decode_image
from tests.rigs.project import commands

FORMATS = Path(__file__).parent / "formats"
VERSIONS = sorted(path.parent.parent.name for path in FORMATS.glob("*/experts/expected.json"))
TOLERANCE = 1e-3


@pytest.fixture(params=VERSIONS)
def old(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return Path(shutil.copytree(FORMATS / request.param / "experts", tmp_path / "experts"))


def expected(old: Path) -> dict[str, Any]:
    known: dict[str, Any] = json.loads((old / "expected.json").read_text())
    return known


def test_there_is_a_version_to_open() -> None:
    assert VERSIONS


def test_the_folder_is_whole_and_every_expert_is_read(old: Path) -> None:
    found = files.read(old / "model")
    assert found.blocks == (1,) and found.shape == ExpertsShape(1, 4, 2)
    assert (found.width, found.hidden, found.units) == (64, 16, 32)
    assert found.missing() == []
    for expert in range(4):
        assert found.load(0, expert).fc1.weight.shape == (16, 64)
    assert Profile.from_json((old / "profile.json").read_text()).key.model_hash == found.identity


def test_the_task_gets_the_answers_of_that_version(old: Path) -> None:
    vit = load_vit(old / "model")
    model = ElasticViT(vit)
    (task,) = load_tasks(old / "tasks", model.shape)
    assert task.spec.classes == ("dark", "bright")
    assert set(task.spec.accuracy) == {-4, 0, -10_004, -10_000}
    runner = ElasticRunner(model, pixel_spec(vit, old / "model"))
    served = runner.prepare(task.weights)
    for name, known in expected(old).items():
        picture = decode_image((old / f"{name}.png").read_bytes(), model.image_px)
        level = level_of(known["gamma"], model.experts.k - known["experts"])
        (logits_C,) = runner.answer(picture[None], level, [served])
        assert task.spec.classes[int(logits_C.argmax())] == known["class"] == name
        assert np.allclose(logits_C, known["logits"], atol=TOLERANCE)


def test_its_profile_serves_and_measures_nothing_again(old: Path) -> None:
    replay = ("elastic", "replay", "synthetic", "--profile", old / "profile.json", "--duration-s", 1, "--load", 1)
    code, said = commands.ended(replay)
    assert code == 0, said


def test_a_newer_folder_and_a_changed_expert_are_refused_by_name(old: Path) -> None:
    manifest = old / "model" / files.MANIFEST
    written = manifest.read_text()
    manifest.write_text(json.dumps({**json.loads(written), "format": files.FORMAT + 1}))
    with pytest.raises(files.ExpertsError, match=f"reads format {files.FORMAT}"):
        files.read(old / "model")
    manifest.write_text(written)
    expert = old / "model" / "experts" / "1-2.safetensors"
    expert.write_bytes(expert.read_bytes()[:-1] + b"\0")
    with pytest.raises(files.ExpertsError, match=r"1-2\.safetensors is not the file"):
        files.read(old / "model").load(0, 2)
