"""`isthmus elastic`: a task learned, schedules searched and a profile measured on a small set; errors in one line."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import safetensors.numpy
import torch
from PIL import Image
from pyarrow import parquet
from typer.testing import CliRunner

from isthmus.cloud.commands.elastic import app
from isthmus.cloud.elastic.model.timm_import import create_model
from isthmus.cloud.elastic.scheduling.profile import Profile
from isthmus.cloud.elastic.tasks.files import load_tasks, order_of_task
from isthmus.cloud.elastic.tasks.task import ModelShape
from tests.rigs.elastic.vit import save_vit

CLASSES = {"name": "bright-dark", "classes": ["dark", "bright"], "class_of_label": [0, 1]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model.safetensors (17 tokens, 2 layers), pictures.parquet (40 of two labels) and bright-dark.json."""
    folder = tmp_path_factory.mktemp("elastic")
    torch.manual_seed(0)
    vit = create_model("vit_tiny_patch16_224", pretrained=False, img_size=16, patch_size=4, depth=2, num_classes=2)
    save_vit(vit, folder / "model.safetensors")
    rng, rows = np.random.default_rng(0), []
    for label in [0, 1] * 20:
        out = io.BytesIO()
        Image.fromarray(rng.integers(0, 100, (16, 16, 3), np.uint8) + np.uint8(150 * label)).save(out, "PNG")
        rows.append({"image": {"bytes": out.getvalue(), "path": None}, "label": label})
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "pictures.parquet")
    (folder / "bright-dark.json").write_text(json.dumps(CLASSES), encoding="utf-8")
    return folder


def run(folder: Path, command: str, **options: object) -> tuple[int, str]:
    common = {"model": folder / "model.safetensors", "pixels": "half", "threads": 1, "device": "cpu"}
    args = [f"--{name.replace('_', '-')}={value}" for name, value in {**common, **options}.items()]
    done = CliRunner().invoke(app, [command, *args])
    return done.exit_code, done.output


def learn(folder: Path, out: Path, **more: object) -> None:
    options: dict[str, object] = {"gammas": "1", "measured": "0", "epochs": 1, **more}
    told = run(
        folder, "prompts", data=folder / "pictures.parquet", task=folder / "bright-dark.json", out=out, **options
    )
    assert told[0] == 0, told[1]


def test_from_pictures_to_a_profile(folder: Path) -> None:
    data, tasks = folder / "pictures.parquet", folder / "tasks"
    told = run(
        folder,
        "prompts",
        data=data,
        task=folder / "bright-dark.json",
        out=tasks,
        gammas="1,2",
        measured="-4,0",
        epochs=1,
    )
    assert told[0] == 0, told[1]
    assert order_of_task(tasks, "bright-dark") == "published"
    (task,) = load_tasks(tasks, ModelShape(2, 192, 16))
    assert task.spec.classes == ("dark", "bright")
    assert set(task.spec.accuracy) == {-4, 0, 1, 2} and task.spec.accuracy[0] == 1.0
    assert set(task.weights.prompts_LGD) == {1, 2}

    schedules = folder / "schedules.json"
    for _ in range(2):  # the second time nothing is left to be evaluated
        told = run(folder, "schedules", data=data, tasks=tasks, out=schedules, gammas="-4", evaluations=4)
        assert told[0] == 0, told[1]
    found = json.loads(schedules.read_text(encoding="utf-8"))
    assert len(found["tried"]["-4"]) <= 4 and len(found["schedules"]["-4"]) == 2
    assert found["key"][2] == "published"

    out = folder / "profile.json"
    told = run(
        folder, "profile", data=data, tasks=tasks, out=out, gammas="-4,0,2", sizes="1,3", repeats=1, schedules=schedules
    )
    assert told[0] == 0, told[1]
    assert "number type" in told[1]
    profile = Profile.from_json(out.read_text(encoding="utf-8"))
    assert profile.gammas == (-4, 0, 2) and profile.sizes == (1, 3)
    assert profile.accuracy["bright-dark"][0] == 1.0
    assert profile.schedules == {-4: tuple(found["schedules"]["-4"])}
    assert profile.merge_order == "published"
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_what_was_begun_before_merging_had_an_order_goes_on_in_the_order_of_then(folder: Path, tmp_path: Path) -> None:
    data, tasks = folder / "pictures.parquet", tmp_path / "tasks"
    learn(folder, tasks)
    weights = tasks / "bright-dark.safetensors"
    with safetensors.safe_open(weights, framework="np") as file:
        metadata = {name: value for name, value in file.metadata().items() if name != "merge_order"}
    weights.write_bytes(safetensors.numpy.save(safetensors.numpy.load(weights.read_bytes()), metadata))
    learn(folder, tasks)
    assert order_of_task(tasks, "bright-dark") == "receiving-first"
    learn(folder, tasks, merge_order="published")  # accuracies are measured again, so this may change
    assert order_of_task(tasks, "bright-dark") == "published"

    out = tmp_path / "schedules.json"
    searching: dict[str, object] = {"data": data, "tasks": tasks, "out": out, "gammas": "-4"}
    code, said = run(folder, "schedules", evaluations=1, merge_order="receiving-first", **searching)
    assert code == 0, said
    before = json.loads(out.read_text(encoding="utf-8"))
    assert len(before["key"]) == 2, "as files of then, which named no order"
    code, said = run(folder, "schedules", evaluations=2, **searching)
    assert code == 0, said
    after = json.loads(out.read_text(encoding="utf-8"))
    assert after["key"] == before["key"] and after["tried"]["-4"][:1] == before["tried"]["-4"]
    code, said = run(folder, "schedules", evaluations=2, merge_order="published", **searching)
    said = " ".join(said.split())
    assert code == 1 and "--merge-order published: schedules.json was made with the order receiving-first" in said
    assert json.loads(out.read_text(encoding="utf-8")) == after

    profile = tmp_path / "profile.json"
    measuring: dict[str, object] = {"out": profile, "gammas": "-4,0", "sizes": "1", "repeats": 1, "schedules": out}
    measuring["number_type"] = "float32"
    code, said = run(folder, "profile", **measuring)
    assert code == 0, said
    assert Profile.from_json(profile.read_text(encoding="utf-8")).merge_order == "receiving-first"
    code, said = run(folder, "profile", merge_order="published", **measuring)
    assert code == 1 and "the file of --schedules was made with the order" in " ".join(said.split()), said


def test_a_users_distilled_deit_learns_a_task_and_its_accuracy_is_measured(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    deit = create_model("deit_tiny_distilled_patch16_224", img_size=16, patch_size=4, depth=2, num_classes=2)
    save_vit(deit, tmp_path / "deit.safetensors")
    own: dict[str, object] = {"model": tmp_path / "deit.safetensors", "data": folder / "pictures.parquet"}
    learning: dict[str, object] = {"task": folder / "bright-dark.json", "gammas": "1", "measured": "-4,0", "epochs": 1}
    code, said = run(folder, "prompts", out=tmp_path / "tasks", **own, **learning)
    assert code == 0, said
    out = tmp_path / "profile.json"
    measuring: dict[str, object] = {"gammas": "-4,0,1", "sizes": "1,3", "repeats": 1, "number_type": "float32"}
    code, said = run(folder, "profile", tasks=tmp_path / "tasks", out=out, **own, **measuring)
    assert code == 0, said
    profile = Profile.from_json(out.read_text(encoding="utf-8"))
    assert profile.gammas == (-4, 0, 1) and profile.accuracy["bright-dark"][0] == 1.0


def test_errors_are_one_line(folder: Path, tmp_path: Path) -> None:
    data, out = folder / "pictures.parquet", tmp_path / "out.json"
    (tmp_path / "empty").mkdir()
    (tmp_path / "foreign.json").write_text("{}", encoding="utf-8")
    cases: list[tuple[str, dict[str, object], str]] = [
        ("prompts", {"data": tmp_path / "missing.parquet", "out": tmp_path, "measured": "0"}, "there is no file"),
        (
            "prompts",
            {"data": data, "out": tmp_path, "measured": "0", "task": "no-such-task"},
            "neither a file nor one of",
        ),
        ("prompts", {"data": data, "out": tmp_path, "mode": "insert"}, "'append', 'replace'"),
        ("prompts", {"data": data, "out": tmp_path, "gammas": "2,x"}, "'x' is not a whole number"),
        ("prompts", {"data": data, "out": tmp_path, "measured": "-18,0"}, "this model runs from -17"),
        ("prompts", {"data": data, "out": tmp_path, "pixels": "svhn"}, "known are"),
        ("schedules", {"data": data, "tasks": tmp_path / "empty", "out": out, "gammas": "-4"}, "holds no tasks"),
        ("profile", {"out": out, "schedules": tmp_path / "foreign.json"}, "is not a file of schedules"),
        ("profile", {"out": out, "number_type": "int4"}, "'auto', 'float32', 'bfloat16', 'int8'"),
        ("profile", {"out": out, "data": data}, "go together"),
        ("profile", {"out": out, "model": tmp_path / "none.safetensors"}, "there is no file"),
    ]
    for command, options, why in cases:
        code, said = run(folder, command, **options)
        assert code == (2 if "Invalid value" in said else 1) and why in said, (options, said)
        assert len(said.splitlines()) == 1


def test_a_schedule_file_of_another_search_is_refused(folder: Path, tmp_path: Path) -> None:
    data, tasks = folder / "pictures.parquet", tmp_path / "tasks"
    learn(folder, tasks)
    out = tmp_path / "schedules.json"
    assert run(folder, "schedules", data=data, tasks=tasks, out=out, gammas="-4", evaluations=1)[0] == 0
    code, said = run(folder, "schedules", data=data, tasks=tasks, out=out, gammas="-4", evaluations=1, seed=5)
    assert code == 1 and "to another search" in said


def test_a_task_that_does_not_fit_is_named(folder: Path, tmp_path: Path) -> None:
    learn(folder, tmp_path)
    with pytest.raises(ValueError, match=r"task 'bright-dark'.*prompts.+ is 2 x 1 x 192"):
        load_tasks(tmp_path, ModelShape(12, 192, 16))
    (tmp_path / "bright-dark.safetensors").unlink()
    with pytest.raises(ValueError, match="task 'bright-dark'"):
        load_tasks(tmp_path, ModelShape(2, 192, 16))
