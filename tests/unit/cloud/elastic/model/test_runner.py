"""The runner: mixed tasks equal single ones, in every number type and compiled; models by file and by name."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from isthmus.cloud.elastic.model.runner import ElasticRunner, NumberType
from isthmus.cloud.elastic.model.vit import ElasticViT
from isthmus.cloud.elastic.model.weights import ModelError, load_vit, pixel_spec
from isthmus.cloud.elastic.tasks.task import TaskWeights
from isthmus.data.images import STATISTICS, PixelSpec, read_images
from tests.rigs.elastic.runner import PICTURES_BHWC, PIXELS, model, some_tasks, weights
from tests.rigs.elastic.vit import save_vit


@pytest.mark.parametrize("gamma", [-3, 0, 2])
@pytest.mark.parametrize(("compiler", "packed"), [(None, False), (None, True), ("eager", False), ("eager", True)])
def test_a_mixed_batch_answers_as_single_ones(gamma: int, compiler: str | None, packed: bool) -> None:
    """The compiler "eager" traces and pads batches like the others, but runs the traced graph without compiling it."""
    runner = ElasticRunner(model(), PIXELS, compiler=compiler, packed=packed)
    plain = ElasticRunner(model(), PIXELS)
    tasks, alone = some_tasks(runner), some_tasks(plain)
    together = runner.answer(PICTURES_BHWC, gamma, tasks)
    for b, logits_C in enumerate(together):
        expected = plain.answer(PICTURES_BHWC[b : b + 1], gamma, alone[b : b + 1])[0]
        assert logits_C.dtype == np.float32
        np.testing.assert_allclose(logits_C, expected, rtol=1e-3, atol=1e-3)


def test_compiled_code_answers_the_same() -> None:
    if not os.environ.get("ISTHMUS_COMPILE"):
        pytest.skip("set ISTHMUS_COMPILE=1 to run this test, which takes a C++ compiler up to a minute")
    plain, compiled = ElasticRunner(model(depth=2), PIXELS), ElasticRunner(model(depth=2), PIXELS, compiler="inductor")
    images_BCHW = plain.images(PICTURES_BHWC[:2])
    expected_BD = plain.features(images_BCHW, -3)
    torch.testing.assert_close(compiled.features(images_BCHW, -3), expected_BD, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("number_type", ["bfloat16", "int8"])
def test_fewer_bits_answer_nearly_the_same(number_type: NumberType) -> None:
    exact, rough = ElasticRunner(model(), PIXELS), ElasticRunner(model(), PIXELS, number_type=number_type)
    for gamma in (0, 2):
        pairs = zip(
            exact.answer(PICTURES_BHWC, gamma, some_tasks(exact)),
            rough.answer(PICTURES_BHWC, gamma, some_tasks(rough)),
            strict=True,
        )
        for one, other in pairs:
            assert other.dtype == np.float32
            assert np.linalg.norm(other - one) < 0.1 * np.linalg.norm(one)


@pytest.mark.parametrize("gamma", [-2, 0, 2])
def test_a_large_batch_answers_as_single_ones(gamma: int) -> None:
    runner, count = ElasticRunner(model(), PIXELS), 70
    pictures_NHWC = np.random.default_rng(2).integers(0, 256, (count, 16, 16, 3), np.uint8)
    kinds = some_tasks(runner)
    tasks = [kinds[index % len(kinds)] for index in range(count)]
    whole = runner.answer(pictures_NHWC, gamma, tasks)
    for index in (0, 1, 32, count - 1):
        (alone,) = runner.answer(pictures_NHWC[index : index + 1], gamma, [tasks[index]])
        np.testing.assert_allclose(whole[index], alone, rtol=1e-3, atol=1e-3)
    one_task = runner.answer(pictures_NHWC, gamma, [kinds[0]] * count)
    np.testing.assert_allclose(one_task[0], whole[0], rtol=1e-3, atol=1e-3)


def test_int8_needs_a_processor_and_no_compiler() -> None:
    with pytest.raises(ValueError, match="int8 runs only on a processor"):
        ElasticRunner(model(), PIXELS, number_type="int8", compiler="eager")


def test_a_model_made_int8_stays_as_it_is() -> None:
    runner = ElasticRunner(model(), PIXELS, number_type="int8")
    tasks = [runner.own_task()] * 6
    pairs = zip(runner.answer(PICTURES_BHWC, -2, tasks), runner.plain().answer(PICTURES_BHWC, -2, tasks), strict=True)
    for one, other in pairs:
        np.testing.assert_array_equal(one, other)


def test_pictures_and_what_the_model_reads_are_both_taken() -> None:
    runner = ElasticRunner(model(), PIXELS)
    tasks = [runner.own_task()] * 6
    pairs = zip(
        runner.answer(PICTURES_BHWC, 0, tasks), runner.answer(PIXELS.standardise(PICTURES_BHWC), 0, tasks), strict=True
    )
    for one, other in pairs:
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_is_refused() -> None:
    runner = ElasticRunner(model(), PIXELS)
    with pytest.raises(ValueError, match="6 pictures and 1 tasks"):
        runner.answer(PICTURES_BHWC, 0, [runner.own_task()])
    with pytest.raises(ValueError, match="images of shape"):
        runner.answer(PICTURES_BHWC[:, :8], 0, [runner.own_task()] * 6)
    other = weights(1, 3)
    with pytest.raises(ValueError, match="do not fit the model"):
        runner.prepare(TaskWeights(other.head_weight_CD, other.head_bias_C, {3: other.prompts_LGD[2]}))
    with pytest.raises(ValueError, match="the head reads"):
        runner.prepare(TaskWeights(other.head_weight_CD[:, :9], other.head_bias_C, {}))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("vit_tiny_patch16_224", {}),
        ("vit_tiny_patch16_224", {"qk_norm": True, "init_values": 0.1, "reg_tokens": 3, "no_embed_class": True}),
        ("deit_tiny_distilled_patch16_224", {}),
    ],
)
def test_a_file_says_its_architecture(tmp_path: Path, name: str, changes: dict[str, object]) -> None:
    saved = model(name, **changes).vit
    save_vit(saved, tmp_path / "model.safetensors")
    loaded = load_vit(tmp_path / "model.safetensors")
    images_BCHW = torch.randn(2, 3, 16, 16)
    with torch.inference_mode():
        assert torch.equal(loaded(images_BCHW), saved(images_BCHW))


def test_models_that_cannot_be_had_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no file"):
        load_vit(tmp_path / "missing.safetensors")
    (tmp_path / "text.safetensors").write_text("no weights", encoding="utf-8")
    with pytest.raises(ModelError, match="not a safetensors file"):
        load_vit(tmp_path / "text.safetensors")
    state = model().vit.state_dict()
    save_file({name: value for name, value in state.items() if "norm1" not in name}, tmp_path / "part.safetensors")
    with pytest.raises(ModelError, match="norm1"):
        load_vit(tmp_path / "part.safetensors")
    far = {name.replace("blocks.2.", "blocks.999999."): value for name, value in state.items()}
    save_file(far, tmp_path / "far.safetensors")
    with pytest.raises(ModelError, match="blocks are missing"):
        load_vit(tmp_path / "far.safetensors")
    with pytest.raises(ModelError, match="timm has no model"):
        load_vit("no_such_model_of_theirs", random=True)
    with pytest.raises(ModelError, match="not a vision transformer"):
        load_vit("resnet18", random=True)


def test_pixel_statistics_are_said_or_found(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    vit = model().vit
    save_file(vit.state_dict(), path)
    assert pixel_spec(vit, path, "cifar10") == PixelSpec(16, *STATISTICS["cifar10"])
    assert pixel_spec(vit, "vit_tiny_patch16_224").mean == (0.5, 0.5, 0.5)
    with pytest.raises(ModelError, match="nothing says"):
        pixel_spec(vit, path)
    with pytest.raises(ModelError, match="known are"):
        pixel_spec(vit, path, "svhn")
    found = {"pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}}
    (tmp_path / "config.json").write_text(json.dumps(found), encoding="utf-8")
    assert pixel_spec(vit, path) == PixelSpec(16, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


def test_the_cifar10_vit_is_right_on_real_pictures() -> None:
    file, folder = os.environ.get("ISTHMUS_VIT"), os.environ.get("ISTHMUS_CIFAR10")
    if not file or not folder:
        pytest.skip("set ISTHMUS_VIT to the ViT's model.safetensors and ISTHMUS_CIFAR10 to CIFAR-10's folder")
    vit = load_vit(file)
    runner = ElasticRunner(ElasticViT(vit), pixel_spec(vit, file, "cifar10"))
    test = read_images(Path(folder) / "test.parquet", 32)
    test = test.only(np.arange(0, len(test), 20))
    for gamma, floor in ((0, 0.6), (-16, 0.58), (-32, 0.45)):
        answers = runner.answer(test.pictures_NHWC, gamma, [runner.own_task()] * len(test))
        assert np.mean(np.argmax(answers, axis=1) == test.labels_N) > floor
