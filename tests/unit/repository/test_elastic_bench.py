"""The measurements of the elastic ViT and of warm-up run on a model too small to measure anything."""

from pathlib import Path

import torch

from isthmus.cloud.elastic.model.timm_import import create_model
from tests.rigs.elastic.vit import save_vit
from tests.rigs.project.bench import measured


def test_elastic_vit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vit = create_model("vit_tiny_patch16_224", pretrained=False, img_size=16, patch_size=4, depth=2, num_classes=2)
    save_vit(vit, tmp_path / "model.safetensors")
    options = [
        "--model",
        tmp_path / "model.safetensors",
        "--batches",
        "1,2",
        "--gammas=-4,0,2",
        "--repeats",
        "1",
        "--number-types",
        "float32,bfloat16",
    ]
    rows = measured(tmp_path, "elastic.vit", *options, "--rivals", "timm eager,ONNX Runtime")["rows"]
    ours = {(f"ours, {name}", gamma) for name in ("float32", "bfloat16") for gamma in (-4, 0, 2)}
    expected = ours | {("timm eager", ""), ("ONNX Runtime", "")}
    assert [(row["engine"], row["gamma"]) for row in rows if row["batch"] == 1] == [
        (row["engine"], row["gamma"]) for row in rows if row["batch"] == 2
    ]
    assert {(row["engine"], row["gamma"]) for row in rows} == expected
    assert all(row["cpu_s"]["median"] > 0 and row["times_floor"] > 0 for row in rows)
    assert all(row["of_promised"] == 1 for row in rows if row["gamma"] == 0)


def test_warmup(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vit = create_model("vit_tiny_patch16_224", pretrained=False, img_size=16, patch_size=4, depth=2, num_classes=2)
    save_vit(vit, tmp_path / "model.safetensors")
    model = tmp_path / "model.safetensors"
    options = ["--model", model, "--averaged", model, "--numbers", "8", "--batch", "2", "--members", "2"]
    rows = measured(tmp_path, "elastic.warmup", *options, "--switches", "4", "--repeats", "1")["rows"]
    assert [row["what"].split()[0] for row in rows] == ["tuning", "tuning", "average", "average", "4", "10"]
    assert rows[0]["of_promised"] == 1 and rows[1]["promised"] > 1
    assert rows[2]["times_floor"] > 0 and rows[4]["each_ms"] > 0


def test_executors_served(tmp_path: Path) -> None:
    options = ("--executors", "2", "--seconds", "6", "--kill-s", "1", "--repeats", "1")
    rows = measured(tmp_path, "elastic.executors_served", *options)["rows"]
    assert [(row["kind"], row["executors"]) for row in rows] == [("thread", 2), ("process", 2)]
    for row in rows:
        assert row["sent"] == row["answered"] > 0 and row["refused"] == row["unanswered"] == 0
    assert rows[1]["back_after_s"] > 0


def test_elastic_experts(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vit = create_model("vit_tiny_patch16_224", pretrained=False, img_size=16, patch_size=4, depth=2, num_classes=2)
    save_vit(vit, tmp_path / "model.safetensors")
    options = ["--model", tmp_path / "model.safetensors", "--batches", "1,2", "--token-batches", "2", "--repeats", "1"]
    rows = measured(tmp_path, "elastic.experts", *options)["rows"]
    kinds = ["dense", *["experts, one task"] * 4, "experts, one task, window", "experts, mixed"]
    assert [row["engine"] for row in rows] == [*kinds, *kinds, "experts, token by token"]
    assert [row["k"] for row in rows if row["batch"] == 1] == [0, 1, 2, 3, 4, 4, 4]
    assert all(row["cpu_s"]["median"] > 0 and row["times_floor"] > 0 and row["over_dense"] > 0 for row in rows)


def test_patience(tmp_path: Path) -> None:
    few = ("--policies", "priced", "--loads", "1.5", "--shares", "0.5", "--latencies-s", "60", "--seeds", "300")
    (row,) = measured(tmp_path, "elastic.patience", *few, "--duration-s", "2")["rows"]
    assert row["utility"][0] > 0.99 and row["late"] == [0]
    assert row["others_evicted"][0] <= row["others_evicted_alone"][0] + 0.01
    few = ("--policies", "priced", "--loads", "0.5", "--bursts", "300", "--latencies-s", "1.5", "--seeds", "300")
    (row,) = measured(tmp_path, "elastic.patience", *few, "--duration-s", "2")["rows"]
    assert row["in_time"][0] > 0.9 and row["late"] == [0] and 0 < row["utility"][0] <= 1


def test_scaling(tmp_path: Path) -> None:
    few = ("--seconds", "330", "--seeds", "1", "--slower", "100", "--scenarios", "step x 4,day")
    step, day = measured(tmp_path, "elastic.scaling", *few)["rows"]
    assert 0 < step["asked_after_s"] <= 10 and day["asked_after_s"] is None
    assert all(row["most_turns_in_10_min"] <= 1 for row in (step, day))
    few = ("--seconds", "1200", "--seeds", "2", "--scenarios", "step x 4", "--count-alone")
    (row,) = measured(tmp_path, "elastic.scaling", *few)["rows"]
    assert (row["runs"], row["runs_with_two_turns_in_10_min"]) == (2, 0)


def test_infaas_with_wrong_beliefs(tmp_path: Path) -> None:
    few = ("--seconds", "6", "--seeds", "1", "--small", "2", "--worlds", "as believed,twice the time")
    right, wrong = measured(tmp_path, "elastic.beliefs", *few, "--policies", "infaas,infaas:1.04")["rows"]
    for row in (right, wrong):
        assert 0 < row["infaas:1.04"]["mean"] <= row["infaas"]["mean"] <= 1, "models that must be loaded cost time"


def test_infaas_live_on_two_executors(tmp_path: Path) -> None:
    options = ("--loads", "0.5", "--depth", "1", "--duration-s", "1", "--executors", "2", "--repeats", "1")
    rows = measured(tmp_path, "elastic.infaas_live", *options, "--policies", "priced")["rows"]
    assert [row["policy"] for row in rows] == ["infaas", "priced"]
    assert all(row["queries"] > 0 and row["simulated"] > 0 for row in rows)
