"""The papers' tables and figures, on models and pictures too small to show a difference."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from isthmus.cloud.elastic.model.runner import ElasticRunner
from isthmus.cloud.elastic.model.timm_import import create_model
from isthmus.cloud.elastic.model.vit import ElasticViT
from isthmus.cloud.elastic.prepare.profiler import key_similarity
from isthmus.cloud.elastic.scheduling.profile import MachineKey, Profile
from isthmus.data.images import LabelledImages, PixelSpec, write_images
from isthmus.data.made_by import code
from isthmus.experiments.cli import app as experiment
from isthmus.experiments.elastic.averages import markdown as averages_markdown
from isthmus.experiments.elastic.kept import ORDER_FILE, merge_order_in
from isthmus.experiments.elastic.prodigy import SYSTEMS, between, walk
from isthmus.experiments.elastic.prompts import halves, unlearned, variants
from isthmus.experiments.elastic.schedules import PERCENTS, similarity
from tests.rigs.elastic.vit import save_vit

CLASSES = 10


@pytest.fixture
def given(tmp_path: Path) -> dict[str, Any]:
    """A ViT of 17 tokens and three layers, and pictures of ten classes."""
    torch.manual_seed(0)
    vit = create_model("vit_tiny_patch16_224", pretrained=False, img_size=16, patch_size=4, depth=3, num_classes=10)
    save_vit(vit, tmp_path / "vit.safetensors")
    pictures = np.random.default_rng(0).integers(0, 256, (80, 16, 16, 3), np.uint8)
    write_images(tmp_path / "pictures.parquet", LabelledImages(pictures, np.arange(80) % CLASSES))
    data = tmp_path / "pictures.parquet"
    return {"model": tmp_path / "vit.safetensors", "pixels": "half", "data": data, "out": tmp_path / "out"}


def ran(command: str, given: dict[str, Any]) -> Result:
    return CliRunner().invoke(experiment, [command, *(f"--{name}={value}" for name, value in given.items())])


def done(command: str, given: dict[str, Any]) -> str:
    result = ran(command, given)
    assert result.exit_code == 0, result.output
    return result.output


SMALL = {"backbone-pictures": 20, "backbone-epochs": 2, "pictures": 20, "tested": 16, "epochs": 1, "merged": "4"}


def test_prompts_for_classes_that_the_backbone_has_not_seen(given: dict[str, Any]) -> None:
    asked = {**given, **SMALL, "test": given["data"], "seeds": "0,1", "backbone-merges": 4}
    said = done("prompts", asked)
    out = given["out"]
    result = json.loads((out / "result.json").read_text())
    names = [variant.name for variant in variants((2, 4, 8), 1)]
    for cell in result["cells"]:
        assert not set(cell["known"]) & set(cell["unseen"]) and len(cell["known"]) == 5
        assert list(cell["variants"]) == names
        assert len(cell["variants"]["2, from scratch"]["curve"]) == 2, "before learning, and after each epoch"
        assert len(cell["variants"]["4, from scratch, twice as long"]["curve"]) == 3
        assert set(cell["head"]) == {"-4", "0"} == set(cell["backbone"])
    assert result["cells"][0]["unseen"] != result["cells"][1]["unseen"]
    assert "8, from 4, less 8, from scratch" in said and (out / "learning.png").stat().st_size > 1_000
    assert not list(out.glob("*.learning.*")), "the finished backbone needs no checkpoint"
    assert "seed 0" not in done("prompts", asked).partition("accuracy")[0], "finished cells are kept"
    other = ran("prompts", {**asked, "epochs": 2})
    assert other.exit_code == 1 and "other options: name another folder with --out" in other.output

    learned = {**given, "model": out / "backbone-0.safetensors", "tasks": out / "tasks-0", "out": out / "schedules"}
    said = done("schedules", {**learned, "merges": "4", "choosing": 20, "tested": 20, "seeds": "0,1", "repeats": 1})
    assert "chosen on other pictures" in said and "images/s" in said


def test_an_experiment_of_before_merging_had_an_order_goes_on_in_the_order_of_then(given: dict[str, Any]) -> None:
    asked = {**given, "merges": "3", "choosing": 20, "tested": 20, "seeds": "0"}
    done("schedules", asked)
    note = given["out"] / "merge-order.json"
    assert json.loads((given["out"] / "cifar10.json").read_text())["merge_order"] == "published"
    assert json.loads(note.read_text()) == {"merge_order": "published"}
    note.unlink()  # as a folder of then
    assert "seed 0" in done("schedules", {**asked, "seeds": "0,1"})
    assert json.loads((given["out"] / "cifar10.json").read_text())["merge_order"] == "receiving-first"
    other = ran("schedules", {**asked, "merge-order": "published"})
    assert other.exit_code == 1 and "was made with the order receiving-first" in " ".join(other.output.split())


@pytest.mark.parametrize("left", ["cells", "backbone-0.learning.safetensors", "tuning-0"])
def test_only_what_an_experiment_makes_has_an_order_of_merging(left: str, tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text("of whoever begins it")
    (tmp_path / "vanilla.safetensors").write_text("learned with all tokens")
    assert merge_order_in(tmp_path, None) == "published"
    (tmp_path / ORDER_FILE).unlink()
    (tmp_path / left).mkdir()
    assert merge_order_in(tmp_path, None) == "receiving-first"
    assert merge_order_in(tmp_path, "receiving-first") == "receiving-first"
    with pytest.raises(ValueError, match="was made with the order receiving-first"):
        merge_order_in(tmp_path, "published")


def test_a_run_that_failed_before_it_made_anything_decides_no_order_of_merging(given: dict[str, Any]) -> None:
    asked = {**given, "merges": "3", "choosing": 20, "tested": 20, "seeds": "0"}
    mistaken = ran("schedules", {**asked, "model": given["out"].with_name("vti.safetensors")})
    assert mistaken.exit_code == 1, mistaken.output
    (given["out"] / "log.txt").write_text("of whoever began it")
    done("schedules", {**asked, "merge-order": "receiving-first"})
    assert json.loads((given["out"] / "cifar10.json").read_text())["merge_order"] == "receiving-first"
    other = ran("schedules", {**asked, "merge-order": "published"})
    assert other.exit_code == 1 and "was made with the order receiving-first" in " ".join(other.output.split())


def test_prompts_for_details_leave_the_model_as_it_is(given: dict[str, Any]) -> None:
    done("prompts", {**given, **SMALL, "test": given["data"], "task": "details", "seeds": "0", "gammas": "1,2"})
    (cell,) = json.loads((given["out"] / "result.json").read_text())["cells"]
    assert "backbone" not in cell and not list(given["out"].glob("backbone*"))
    assert set(cell["variants"]) == {variant.name for variant in variants((1, 2), 1)}


def test_iterative_prompts_begin_at_the_iterative_ones_for_fewer() -> None:
    starts = {variant.name: variant.start for variant in variants((2, 4, 8, 16), 3)}
    assert starts["4, from 2"] == "2, from scratch"
    assert starts["8, from 4"] == "4, from 2"
    assert starts["16, from 8"] == "8, from 4"
    assert all(start is None for name, start in starts.items() if "scratch" in name)


def test_an_unlearned_backbone_shares_no_weight_with_the_given_one(given: dict[str, Any]) -> None:
    torch.manual_seed(0)
    vit = create_model("vit_tiny_patch16_224", pretrained=False, img_size=16, patch_size=4, depth=3, num_classes=10)
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(torch.randn_like(parameter))
    before = {name: tensor.clone() for name, tensor in vit.state_dict().items()}
    fresh = unlearned(ElasticViT(vit), 5, 0)
    for name, tensor in fresh.vit.state_dict().items():
        assert tensor.shape != before[name].shape or not torch.equal(tensor, before[name]), name
        assert torch.equal(vit.state_dict()[name], before[name]), "the given model stays"
    assert unlearned(ElasticViT(vit), 5, 0, patch_px=8).tokens == 5
    with pytest.raises(ValueError, match="do not fill"):
        unlearned(ElasticViT(vit), 5, 0, patch_px=5)
    assert fresh.classes == 5 and all(parameter.requires_grad for parameter in fresh.vit.parameters())


def test_halves_share_no_label_and_leave_none_out() -> None:
    for seed in range(5):
        known, unseen = halves(seed, 4)
        assert len(known.classes) == 4 and len(unseen.classes) == 6
        pairs = zip(known.class_of_label, unseen.class_of_label, strict=True)
        assert all((one < 0) != (other < 0) for one, other in pairs)


def test_schedules_are_compared_on_pictures_that_did_not_choose_them(given: dict[str, Any]) -> None:
    asked = {**given, "merges": "2,4", "choosing": 30, "tested": 40, "seeds": "0,1"}
    said = done("schedules", asked)
    result = json.loads((given["out"] / "cifar10.json").read_text())
    assert "images/s" not in said and result["times"] is None
    uniform = "-4: 4 4 4"
    assert uniform in result["operations"] and len(result["cells"]) == 2
    assert all(set(of) == {"choosing", "test"} for of in result["cells"][0]["schedules"].values())
    assert len(result["similarity"]) == 3
    assert "images/s" in done("schedules", {**asked, "repeats": 2}), "times are added to finished cells"
    assert "images/s" in done("schedules", asked), "and kept"


def test_what_schedules_refuses(given: dict[str, Any]) -> None:
    few = ran("schedules", {**given, "merges": "2", "choosing": 50, "tested": 40})
    assert few.exit_code == 1 and "has 80 pictures" in few.output
    task = ran("schedules", {**given, "merges": "2", "task": "animals"})
    assert task.exit_code == 1 and "give --tasks with the task's files" in " ".join(task.output.split())
    many = ran("schedules", {**given, "merges": "99"})
    assert many.exit_code == 1 and "this model runs from" in many.output


def test_similarity_is_the_mean_cosine_of_all_pairs(given: dict[str, Any]) -> None:
    torch.manual_seed(0)
    vit = create_model("vit_tiny_patch16_224", pretrained=False, img_size=16, patch_size=4, depth=3, num_classes=10)
    runner = ElasticRunner(ElasticViT(vit), PixelSpec(16, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)))
    pictures = np.random.default_rng(1).integers(0, 256, (4, 16, 16, 3), np.uint8)
    labelled = LabelledImages(pictures, np.zeros(4, np.int64))
    found = similarity(runner, labelled)
    assert np.allclose([layer["mean"] for layer in found], key_similarity(runner, labelled), atol=1e-5)
    for layer in found:
        assert len(layer["percentiles"]) == len(PERCENTS)
        assert layer["percentiles"] == sorted(layer["percentiles"])


def test_averages_end_at_the_two_tuned_models(given: dict[str, Any]) -> None:
    asked = {**given, "test": given["data"], "numbers": "2,4", "at": "0,4", "epochs": 1, "seeds": "0,1", "held": 0.5}
    asked["vanilla-epochs"] = 1
    said = done("averages", {**asked, "threads": 1, "device": "cpu"})
    result = json.loads((given["out"] / "result.json").read_text())
    assert result["tuned"] == [2, 4] and result["numbers"] == [0, 4] and result["code"] == [code()]
    for cell in result["cells"]:
        assert list(cell["accuracy"]) == ["vanilla", "0", *(f"{tenth / 10:g}" for tenth in range(1, 10)), "1"]
    assert "best mixture in hindsight" in said
    one = ran("averages", {**asked, "numbers": "4", "out": given["out"] / "other"})
    assert one.exit_code == 1 and "two different ones" in one.output


def test_a_mixture_is_set_against_the_better_end() -> None:
    cells = [
        {"seed": seed, "accuracy": {"vanilla": {"8": 0.5}, "0": {"8": 0.6}, "0.5": {"8": 0.75}, "1": {"8": last}}}
        for seed, last in ((0, 0.7), (1, 0.72))
    ]
    page = averages_markdown({"cells": cells, "numbers": [8], "shares": [0.0, 0.5, 1.0], "tuned": [4, 8]})
    assert "| 0.5, over the better end, points | +4.00 ± 1.00 |" in page


def profile() -> Profile:
    gammas = (-8, -4, 0)
    return Profile(
        key=MachineKey("any", "cpu", 1, "float32", "any"),
        gammas=gammas,
        sizes=(1, 32),
        accuracy={},
        latency_s={
            gamma: (0.004, 0.004 + 31 * each_s) for gamma, each_s in zip(gammas, (0.001, 0.002, 0.004), strict=True)
        },
    )


def test_prodigy_is_simulated_on_both_loads(tmp_path: Path) -> None:
    (tmp_path / "profile.json").write_text(profile().to_json())
    shares = {"otas": (0.9, 0.6, 0.3), "clipper": (0.9,) * 3, "maxprune": (0.7, 0.7, 0.7)}
    shares |= dict.fromkeys(("exhaustive", "prodigy+soups"), (0.9, 0.85, 0.8))
    seeds = [{"accuracy": {name: dict(zip("048", of, strict=True)) for name, of in shares.items()}}]
    (tmp_path / "warmed.json").write_text(json.dumps({"task": "details", "seeds": seeds}))
    rows = [
        f"2023-11-16 18:{second // 60:02}:{second % 60:02}.0000000,1,1"
        for second in range(240)
        for _ in range(1 + second % 5)
    ]
    (tmp_path / "trace.csv").write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]))
    out = tmp_path / "out"
    given = {"profile": tmp_path / "profile.json", "warmed": tmp_path / "warmed.json", "trace": tmp_path / "trace.csv"}
    said = done("prodigy", {**given, "out": out, "seeds": "100,101", "seconds": 6, "window-s": 17})
    result = json.loads((out / "result.json").read_text())
    assert {row["system"] for row in result["rows"]} == set(SYSTEMS) and len(result["rows"]) == 2 * 2 * len(SYSTEMS)
    for row in result["rows"]:
        assert sum(row["right_per_s"]) == row["right"] <= row["queries"] == sum(row["arriving_per_s"])
    right = {
        name: sum(row["right"] for row in result["rows"] if row["system"] == name) for name in ("OTAS", "Exhaustive")
    }
    assert right["Exhaustive"] > right["OTAS"]
    assert "over OTAS" in said
    assert {path.name for path in out.glob("*.png")} == {
        f"{what}-{load}.png" for what in ("throughput", "latency") for load in ("poisson", "recorded")
    }


def test_rates_stay_between_their_limits() -> None:
    rates_T = walk(np.random.default_rng(3), 1, 700, 2_000)
    assert 1 <= rates_T.min() < 50 and 650 < rates_T.max() <= 700
    with pytest.raises(ValueError, match="same rate in every second"):
        between(np.ones(4), 100, 300)
