"""Experts compared with dense models, on a model and pictures too small to show a difference."""

import json
from pathlib import Path

import numpy as np
import torch
from typer.testing import CliRunner

from isthmus.cloud.elastic.model.timm_import import create_model
from isthmus.data.images import LabelledImages, write_images
from isthmus.experiments.cli import app as experiment
from isthmus.experiments.elastic.experts import EVERY, VARIANTS
from tests.rigs.elastic.vit import save_vit


def test_every_variant_is_learned_kept_and_reported(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vit = create_model("vit_tiny_patch16_224", pretrained=False, img_size=16, patch_size=4, depth=2, num_classes=10)
    save_vit(vit, tmp_path / "dense.safetensors")
    pictures = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), np.uint8)
    write_images(tmp_path / "pictures.parquet", LabelledImages(pictures, np.arange(40) % 10))
    out, data = tmp_path / "out", tmp_path / "pictures.parquet"
    given = {"model": tmp_path / "dense.safetensors", "pixels": "half", "data": data, "test": data, "out": out}
    given |= {"seeds": "0,1", "learned": 40, "tested": 30, "pictures": 8, "epochs": 1, "batch_size": 16}
    args = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    done = CliRunner().invoke(experiment, ["experts", *args])
    assert done.exit_code == 0, done.output
    result = json.loads((out / "result.json").read_text())
    assert [cell["variant"] for cell in result["cells"]] == [*EVERY, *EVERY]
    for cell in result["cells"]:
        assert set(cell["accuracy"]) == {"cifar10", "animals-vehicles", "animals", "details"}
        if cell["variant"] in VARIANTS:
            assert set(cell["accuracy"]["cifar10"]) == {"0", "-10000", "-20000", "-30000"}
            assert cell["use"]["of"] == 16
            assert cell["memory"]["tasks"]["1"]["bytes"] < cell["memory"]["tasks"]["4"]["bytes"]
    windows = result["cells"][-1]
    assert windows["memory"]["switch_bytes"] > 0
    assert windows["use"]["overlap"]["cifar10, details"] == 0, "windows do not overlap"
    page = (out / "result.md").read_text()
    assert "less one dense model" in page and "variation of load" in page
    before = {path: path.stat().st_mtime_ns for path in (out / "cells").iterdir()}
    again = CliRunner().invoke(experiment, ["experts", *args])
    assert again.exit_code == 0 and "seed 0" not in again.output
    assert before == {path: path.stat().st_mtime_ns for path in (out / "cells").iterdir()}
    other = CliRunner().invoke(experiment, ["experts", *args, "--epochs=2"])
    assert other.exit_code == 1 and "other options: name another folder with --out" in other.output
