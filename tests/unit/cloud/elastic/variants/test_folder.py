"""A folder of model variants: what is measured, and what is refused before anything is written."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from isthmus.cloud.elastic.model.weights import ModelError, load_vit
from isthmus.cloud.elastic.policies.infaas import Infaas
from isthmus.cloud.elastic.scheduling.engine import Engine
from isthmus.cloud.elastic.variants.adding import add_task
from isthmus.cloud.elastic.variants.folder import FILE, BadVariants, Variants
from isthmus.data.images import STATISTICS, PixelSpec
from tests.rigs.elastic.variants import SIDE, TASKS, WIDTHS, made, pictures, saved


def test_a_folder_says_what_its_models_take_and_is_read_as_it_was_written(tmp_path: Path) -> None:
    variants = made(tmp_path)
    assert Variants.read(tmp_path / "variants") == variants
    assert variants.profile.gammas == (-1, 0, 1) and set(variants.tasks) == {"ten", "pair"}
    for size in variants.sizes:
        vit = load_vit(variants.file("ten", size.level))
        held = sum(tensor.nbytes for tensor in (*vit.parameters(), *vit.buffers()))
        assert size.memory_bytes == held and vit.embed_dim == WIDTHS[size.level] and size.load_s > 0
    assert variants.size(0).cost == 1 and variants.spec("pair").classes == ("low", "high")
    recipe = json.loads((tmp_path / "variants" / "pair.recipe.json").read_text(encoding="utf-8"))
    assert recipe["class_of_label"] == list(TASKS["pair"].class_of_label)
    Engine(variants.profile, Infaas(variants.sizes))  # the policy takes it as it is


def test_the_accuracy_is_that_of_each_models_own_head(tmp_path: Path) -> None:
    variants = made(tmp_path, ["ten"], [0, 1])
    labelled = pictures(PixelSpec(SIDE, *STATISTICS["cifar10"]))
    images_BCHW = torch.from_numpy(PixelSpec(SIDE, *STATISTICS["cifar10"]).standardise(labelled.pictures_NHWC))
    for level in (0, 1):
        with torch.no_grad():
            answers_B = load_vit(variants.file("ten", level))(images_BCHW).argmax(dim=1).numpy()
        assert variants.profile.accuracy["ten"][level] == pytest.approx((answers_B == labelled.labels_N).mean())


def test_a_task_is_replaced_by_its_name(tmp_path: Path) -> None:
    before = made(tmp_path)
    after = made(tmp_path, ["pair"])
    assert after.tasks == before.tasks and after.sizes == before.sizes, "times are measured with the first task alone"


def test_a_size_takes_what_its_largest_model_takes(tmp_path: Path) -> None:
    few = made(tmp_path, ["pair"], (0, 1))
    both = made(tmp_path, ["ten"], (0, 1))
    for level in (0, 1):
        head = 4 * (WIDTHS[level] + 1)  # bytes per class
        assert both.size(level).memory_bytes == few.size(level).memory_bytes + 8 * head
        assert both.size(level).load_s == few.size(level).load_s


def add(folder: Path, task: str, sources: dict[int, str], **changes: Any) -> Variants:
    options: dict[str, Any] = {"pixels": "cifar10", "device": "cpu", "number_type": "float32", "repeats": 1}
    options |= {"batches": (1, 8), **changes}
    return add_task(folder / "variants", TASKS[task], sources, pictures, **options)


def test_models_that_do_not_belong_together_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    ten = {level: saved(tmp_path, "ten", level) for level in (-1, 0, 1)}
    pair = {level: saved(tmp_path, "pair", level) for level in (-1, 0, 1)}
    cases: list[tuple[str, dict[int, str], dict[str, Any], str]] = [
        ("ten", {-1: ten[-1], 1: ten[1]}, {}, "a base model is needed"),
        ("ten", {0: ten[0], 1: pair[1]}, {}, "the large model has a head of 2 classes, and task 'ten' has 10"),
        ("ten", {0: ten[0], 1: saved(tmp_path, "ten", 1, side=24)}, {}, "reads pictures in another way"),
        ("ten", {0: ten[0], 1: "vit_tiny_patch16_224"}, {}, "name a safetensors file"),
        ("ten", {0: ten[0], 1: str(tmp_path / "none.safetensors")}, {}, "there is no file"),
        ("ten", {0: ten[0], 1: ten[1]}, {"number_type": "int8"}, "float32 or bfloat16"),
    ]
    for task, sources, changes, message in cases:
        with pytest.raises((BadVariants, ModelError, ValueError), match=message):
            add(tmp_path, task, sources, **changes)
        assert not (tmp_path / "variants").exists()
    made(tmp_path, ["ten"])
    kept = (tmp_path / "variants" / FILE).read_bytes()
    cases = [
        ("pair", {0: pair[0], 1: pair[1]}, {}, "must have the sizes small, base, large"),
        ("pair", {**pair, 1: saved(tmp_path, "pair", 0)}, {}, "the large model has another shape"),
        ("pair", pair, {"number_type": "bfloat16"}, "was measured with number_type 'float32'"),
    ]
    for task, sources, changes, message in cases:
        with pytest.raises(BadVariants, match=message):
            add(tmp_path, task, sources, **changes)
        assert (tmp_path / "variants" / FILE).read_bytes() == kept
        assert not (tmp_path / "variants" / "pair").exists()


def test_damaged_descriptions_say_the_way_out(tmp_path: Path) -> None:
    variants = made(tmp_path, ["ten"])
    path = tmp_path / "variants" / FILE
    raw = json.loads(path.read_text(encoding="utf-8"))

    def changed(change: Callable[[dict[str, Any]], object]) -> str:
        copy = json.loads(json.dumps(raw))
        change(copy)
        return json.dumps(copy)

    for text in (
        "",
        "[]",
        "{}",
        changed(lambda it: it.update(format=9)),
        changed(lambda it: it["sizes"].pop()),
        changed(lambda it: it["sizes"][0].update(memory_bytes=0)),
        changed(lambda it: it["sizes"][0].update(level=7)),
        changed(lambda it: it["tasks"].update({"../up": it["tasks"]["ten"]})),
        changed(lambda it: it["tasks"]["ten"]["hashes"].pop("1")),
        changed(lambda it: it["tasks"].clear()),
    ):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(BadVariants):
            Variants.read(tmp_path / "variants")
    with pytest.raises(BadVariants, match="make the folder with 'isthmus elastic variants'"):
        Variants.read(tmp_path / "nowhere")
    with pytest.raises(BadVariants, match="with base among them"):
        replace(variants, sizes=variants.sizes[:1])
