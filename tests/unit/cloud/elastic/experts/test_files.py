"""A model with experts as files, and experts on a shelf: whole or refused, and never more in memory than allowed."""

import gc
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from isthmus.cloud.elastic.experts.files import ExpertsError, read
from isthmus.cloud.elastic.experts.shelf import Shelf
from isthmus.cloud.elastic.model.runner import ElasticRunner
from isthmus.cloud.elastic.model.vit import ElasticViT
from isthmus.cloud.elastic.model.weights import ModelError, load_vit, pixel_spec
from isthmus.cloud.elastic.prepare.own_head import own_head
from tests.rigs.elastic.experts import PIXELS, folder_of, model, pictures, weights


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(tmp_path_factory.mktemp("experts"))


@pytest.fixture
def folder(kept: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(kept, tmp_path / "model"))


def shelf_of(elastic: ElasticViT) -> Shelf:
    found = elastic.expert_layers[0].experts
    assert isinstance(found, Shelf)
    return found


def test_a_model_is_the_same_after_writing_and_reading(kept: Path) -> None:
    again = ElasticViT(load_vit(kept))
    wanted, found = (dict(each.vit.named_parameters()) for each in (model(), again))
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    assert again.experts == model().experts
    assert pixel_spec(load_vit(kept), kept) == PIXELS
    assert again.identity is not None


@pytest.mark.parametrize("limit", [None, 2, 5])
def test_a_shelf_gives_the_answers_of_experts_in_memory(kept: Path, limit: int | None) -> None:
    size = read(kept).expert_bytes
    on_shelf = ElasticViT(load_vit(kept, on_shelf=True, expert_bytes=None if limit is None else limit * size))
    runner, plain = ElasticRunner(on_shelf, PIXELS), ElasticRunner(model(), PIXELS)
    tasks = [runner.prepare(weights(seed, window=window)) for seed, window in ((1, None), (2, (0, 4)))]
    others = [plain.prepare(weights(seed, window=window)) for seed, window in ((1, None), (2, (0, 4)))]
    for level in (0, -4, -10_000):
        found = runner.answer(pictures(4), level, [*tasks, *tasks])
        np.testing.assert_allclose(found, plain.answer(pictures(4), level, [*others, *others]), atol=1e-4, rtol=1e-4)
    shelf = shelf_of(on_shelf)
    assert shelf.peak_bytes <= (16 if limit is None else limit) * size
    assert shelf.bytes == len(shelf.held()) * size
    if limit is None:
        assert shelf.loads == 16, "each expert is read once"
    else:
        assert shelf.loads > 16


def test_experts_of_no_task_stay_on_disk_and_leave_with_the_last_task(kept: Path) -> None:
    on_shelf = ElasticViT(load_vit(kept, on_shelf=True))
    runner, shelf = ElasticRunner(on_shelf, PIXELS), shelf_of(on_shelf)
    assert shelf.held() == ()
    narrow = runner.prepare(weights(1, window=(0, 3)))
    wide = runner.prepare(weights(2, window=(2, 4)))
    shelf.wait()
    assert sorted(shelf.held()) == [(layer, expert) for layer in range(2) for expert in range(6)]
    loads = shelf.loads
    runner.answer(pictures(2), 0, [narrow, wide])
    assert (shelf.loads, shelf.waits) == (loads, 0), "a switch between tasks reads nothing"
    del wide
    gc.collect()
    assert sorted(shelf.held()) == [(layer, expert) for layer in range(2) for expert in range(3)]


def test_a_limit_below_two_experts_is_refused_with_the_least_one(kept: Path) -> None:
    size = read(kept).expert_bytes
    with pytest.raises(ModelError, match=f"give at least {2 * size}"):
        load_vit(kept, on_shelf=True, expert_bytes=2 * size - 1)


def test_a_copy_of_a_model_has_a_shelf_of_its_own(kept: Path) -> None:
    import copy

    first = ElasticViT(load_vit(kept, on_shelf=True))
    second = copy.deepcopy(first)
    assert shelf_of(first) is not shelf_of(second)
    half = ElasticRunner(second, PIXELS, number_type="bfloat16")
    assert np.isfinite(half.answer(pictures(2), 0, [half.prepare(weights())] * 2)).all()
    assert shelf_of(second).bytes == len(shelf_of(second).held()) * read(kept).expert_bytes // 2


def _without(folder: Path) -> None:
    (folder / "experts" / "3-5.safetensors").unlink()


def _cut(folder: Path) -> None:
    path = folder / "experts" / "1-0.safetensors"
    path.write_bytes(path.read_bytes()[:-4])


def _turned(folder: Path) -> None:
    path = folder / "experts" / "1-0.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x55")


def _other_width(folder: Path) -> None:
    path, manifest = folder / "experts" / "1-0.safetensors", folder / "experts.json"
    tensors = safetensors.torch.load_file(path)
    data = safetensors.torch.save({**tensors, "fc1.weight": tensors["fc1.weight"][:, :-1].contiguous()})
    path.write_bytes(data)
    raw = json.loads(manifest.read_text())
    import hashlib

    raw["files"]["1-0"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest.write_text(json.dumps(raw))


def _changed(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "experts.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (_without, "3-5.safetensors is missing; copy"),
        (_cut, "1-0.safetensors has .* bytes, not"),
        (_turned, "1-0.safetensors is not the file that experts.json names"),
        (_other_width, "does not hold an expert of this model"),
        (_changed(format=2), "format 2"),
        (_changed(k=9), "impossible experts"),
        (_changed(experts=1_000_000), "impossible experts|damaged"),
        (_changed(blocks=[1, 9]), "damaged|names block 9"),
        (_changed(width=96), "larger than an expert|another model"),
        (_changed(files={}), "experts.json is damaged"),
        (lambda folder: (folder / "experts.json").write_text("{"), "cannot be read"),
        (lambda folder: (folder / "backbone.safetensors").unlink(), "there is no file"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused_by_name(folder: Path, spoil: Callable[[Path], None], why: str) -> None:
    spoil(folder)
    with pytest.raises(ModelError, match=why):
        load_vit(folder)


def test_a_file_that_goes_while_serving_fails_its_batch_alone(folder: Path) -> None:
    on_shelf = ElasticViT(load_vit(folder, on_shelf=True, expert_bytes=2 * read(folder).expert_bytes))
    runner = ElasticRunner(on_shelf, PIXELS)
    task = runner.prepare(weights(window=(0, 1)))
    other = runner.prepare(weights(window=(5, 1)))
    shelf_of(on_shelf).wait()
    path = folder / "experts" / "3-5.safetensors"
    data = path.read_bytes()
    path.unlink()
    with pytest.raises(ExpertsError, match=r"3-5.safetensors cannot be read \(No such file"):
        runner.answer(pictures(1), 0, [other])
    assert np.isfinite(runner.answer(pictures(1), 0, [task])).all()
    path.write_bytes(data)
    assert np.isfinite(runner.answer(pictures(1), 0, [other])).all(), "it is read again once it is back"


def test_a_model_with_experts_has_no_head_of_its_own(kept: Path) -> None:
    with pytest.raises(ModelError, match="no head of one linear layer"):
        own_head(str(kept), "mine")
