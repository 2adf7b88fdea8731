"""Tuning with fewer tokens: it learns, frozen weights stay, a killed run ends like a whole one, costs are counted."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from isthmus.cloud.elastic.model.pruning import Pruning
from isthmus.cloud.elastic.model.vit import ElasticViT
from isthmus.cloud.elastic.prepare.prompts import Pictures
from isthmus.cloud.elastic.warm.store import ReducerName
from isthmus.cloud.warmup.profiling import accuracies, check_numbers
from isthmus.cloud.warmup.pruning_training import PrunedPictures, PruningLoss, masked_attention, masked_forward
from isthmus.cloud.warmup.tuning import (
    LABELS_WEIGHT,
    TARGETS,
    GivenUp,
    TuneConfig,
    learning_of,
    predicted_seconds,
    probe,
    start,
    tensors_of_model,
    tune,
    with_head,
)
from isthmus.data.images import LabelledImages
from isthmus.distill.training.loop import EpochReport
from tests.rigs.elastic.warmup import CPU, bright_or_dark, quick, subject


@pytest.mark.parametrize("reducer", ["merging", "pruning"])
def test_tuning_learns_and_leaves_the_embedding_and_the_vanilla_model(tmp_path: Path, reducer: ReducerName) -> None:
    what, losses = subject(), []
    before = {name: tensor.clone() for name, tensor in tensors_of_model(what.model).items()}
    number = 6 if reducer == "merging" else 50
    model, seconds = tune(
        what, number, quick(reducer, epochs=4), folder=tmp_path, on_epoch=lambda report: losses.append(report.loss)
    )
    assert losses[-1] < losses[0] and seconds > 0
    tuned = tensors_of_model(model)
    for name, tensor in before.items():
        assert torch.equal(tensors_of_model(what.model)[name], tensor)
        frozen = name.startswith(("patch_embed", "pos_embed", "cls_token"))
        assert torch.equal(tuned[name], tensor) == frozen, name
    assert any(name.startswith("reducer.") for name in tuned) == (reducer == "pruning")
    share = accuracies(model, what.pixels, what.profiling, [number], device=CPU)[number]
    assert share > 0.7


def test_the_vanilla_models_own_answers_are_learned_without_a_label(tmp_path: Path) -> None:
    what, rng = subject(), np.random.default_rng(0)
    noisy = rng.integers(0, 256, what.learning.pictures_NHWC.shape, np.uint8)  # tokens that are unlike when merged
    what = replace(what, learning=replace(what.learning, pictures_NHWC=noisy))
    with torch.no_grad():
        what.model.vit.head.weight.mul_(1_000)  # answers that differ from picture to picture
    wrong = replace(what, learning=replace(what.learning, labels_N=1 - what.learning.labels_N))
    images = torch.from_numpy(what.pixels.standardise(noisy))
    told_BC = what.model(images).softmax(dim=-1)

    def apart(model: ElasticViT) -> float:
        with torch.no_grad():
            return float(functional.kl_div(model(images, -8).log_softmax(dim=-1), told_BC, reduction="batchmean"))

    config = quick(epochs=6, target="vanilla")
    torch.testing.assert_close(what.answers_NC, what.model(images), rtol=1e-4, atol=1e-4)
    unmoved = replace(config, train=replace(config.train, augment=False))
    still, _ = tune(what, 8, unmoved, folder=tmp_path / "still")
    assert apart(still) < apart(what.model) / 2
    tuned, _ = tune(what, 8, config, folder=tmp_path / "right")
    assert apart(tuned) < apart(what.model) / 2
    same, seconds = tune(what, 0, config, folder=tmp_path / "same")
    assert seconds == 0 and apart(same) == apart(what.model)
    again, _ = tune(wrong, 8, config, folder=tmp_path / "wrong")
    for name, tensor in tensors_of_model(tuned).items():
        assert torch.equal(tensors_of_model(again)[name], tensor), name


@pytest.mark.parametrize("augment", [True, False])
def test_both_targets_are_one_loss(augment: bool) -> None:
    what = subject()
    noisy = np.random.default_rng(0).integers(0, 256, what.learning.pictures_NHWC.shape, np.uint8)
    what = replace(what, learning=replace(what.learning, pictures_NHWC=noisy))
    with torch.no_grad():
        what.model.vit.head.weight.mul_(100)
    values = {}
    for target in TARGETS:
        plain = quick(target=target)
        config = replace(plain, train=replace(plain.train, augment=augment))
        dataset, loss = learning_of(what, start(what, config), 8, config)
        batch = [torch.stack(column) for column in zip(*(dataset[i] for i in range(4)), strict=True)]
        values[target] = loss(batch).item()
    assert values["vanilla"] > 0 and values["labels"] > 0
    assert values["both"] == pytest.approx(values["vanilla"] + LABELS_WEIGHT * values["labels"], rel=1e-4)


def test_a_killed_run_ends_as_an_undisturbed_one_and_its_seconds_count(tmp_path: Path) -> None:
    for reducer, number in (("merging", 6), ("pruning", 50)):
        config = quick("merging" if reducer == "merging" else "pruning", epochs=2)
        ticks = iter(range(1_000))

        def clock(ticks: "object" = ticks) -> float:
            return float(next(ticks))  # type: ignore[call-overload]

        def stop(report: EpochReport) -> None:
            if report.epoch == 1:
                raise KeyboardInterrupt

        killed = tmp_path / reducer
        with pytest.raises(KeyboardInterrupt):
            tune(subject(), number, config, folder=killed, on_epoch=stop, clock=clock)
        resumed, seconds = tune(subject(), number, config, folder=killed, clock=clock)
        whole, _ = tune(subject(), number, config, folder=tmp_path / f"{reducer}-whole")
        assert seconds == 2.0  # a tick for each epoch, before and after
        for name, tensor in tensors_of_model(whole).items():
            assert torch.equal(tensors_of_model(resumed)[name], tensor), name


def test_tuning_is_given_up_before_it_passes_its_allowance(tmp_path: Path) -> None:
    ticks = iter(range(0, 10_000, 10))
    with pytest.raises(GivenUp) as caught:
        tune(subject(), 4, quick(epochs=6), folder=tmp_path, allowance_s=35.0, clock=lambda: float(next(ticks)))
    assert caught.value.seconds == 30.0
    assert json.loads((tmp_path / "4.seconds.json").read_text())["seconds"] == 30.0


def test_a_probe_predicts_by_operations() -> None:
    what, config = subject(), quick(epochs=3)
    measured = probe(what, (0, 4, 8), config, steps=1)
    assert set(measured.step_s) == {0, 8} and measured.seconds > 0
    known = replace(measured, step_s={0: 0.2, 8: 0.1})
    seconds = predicted_seconds(what, known, (0, 4, 8), config)
    assert seconds[0] == pytest.approx(3 * 2 * 0.2) and seconds[8] == pytest.approx(3 * 2 * 0.1)
    model = ElasticViT(what.model.vit)
    part = (model.operations(-4) - model.operations(-8)) / (model.operations(0) - model.operations(-8))
    assert seconds[4] == pytest.approx(6 * (0.1 + 0.1 * part))


def test_masked_attention_is_attention_among_those_that_stay() -> None:
    model = start(subject(), quick("pruning"))
    attention = model.blocks[0].attn
    torch.manual_seed(1)
    tokens_BTD = torch.randn(2, 1 + 5, 64)
    staying_BN = torch.tensor([[1.0, 0.0, 1.0, 1.0, 0.0]] * 2)
    with torch.no_grad():
        masked = masked_attention(attention, tokens_BTD, staying_BN, 1)
        left = attention(tokens_BTD[:, [0, 1, 3, 4]])
    torch.testing.assert_close(masked[:, [0, 1, 3, 4]], left, rtol=1e-3, atol=1e-4)


def test_training_decides_as_serving_would_prune_and_gradients_reach_the_predictors() -> None:
    what, config = subject(), quick("pruning")
    model = start(what, config)
    assert isinstance(model.reducer, Pruning)
    dataset = PrunedPictures(Pictures(what.learning, what.pixels, augment=False, seed=0), model.reducer, 0)
    batch = [torch.stack(column) for column in zip(*(dataset[index] for index in range(4)), strict=True)]
    masked = masked_forward(model, batch[0], batch[2])
    stages = len(model.reducer.stages)
    assert masked.staying_SBN.shape == (stages, 4, 16)
    hard = masked.staying_SBN.detach()
    assert set(hard.round(decimals=4).unique().tolist()) <= {0.0, 1.0}
    assert (hard[1:] <= hard[:-1] + 1e-6).all()  # who has gone stays away
    everyone = torch.zeros_like(batch[2])
    everyone[..., 1] = 1e3
    torch.testing.assert_close(
        masked_forward(model, batch[0], everyone).logits_BC, model(batch[0], 0), rtol=1e-3, atol=1e-4
    )
    PruningLoss(model, what.model, 50, config.train)(batch).backward()
    for stage in range(stages):
        gradient = model.reducer.predictors[stage].judge[0].weight.grad
        assert gradient is not None and gradient.abs().sum() > 0
    with pytest.raises(ValueError, match="this model merges"):
        masked_forward(what.model, batch[0], batch[2])


def test_the_kept_share_learns_what_is_asked_for(tmp_path: Path) -> None:
    model, _ = tune(subject(), 70, quick("pruning", epochs=25), folder=tmp_path)
    noise = torch.from_numpy(np.random.default_rng(0).gumbel(size=(12, 2, 16, 2)).astype(np.float32))
    images = torch.from_numpy(subject().pixels.standardise(bright_or_dark(12).pictures_NHWC))
    with torch.no_grad():
        kept = masked_forward(model, images, noise).staying_SBN.mean(dim=(1, 2))
    assert abs(float(kept[0]) - 0.3) < 0.2 and float(kept[-1]) < float(kept[0])


def test_what_cannot_be_tuned_is_refused(tmp_path: Path) -> None:
    what = subject()
    with pytest.raises(ValueError, match=r"numbers 9: with 17 tokens.*merges per layer must be from 0 to 8"):
        tune(what, 9, quick(), folder=tmp_path)
    with pytest.raises(ValueError, match=r"numbers 71: .*pruned per cent must be from 0 to 70"):
        check_numbers([0, 71], start(what, quick("pruning")))
    with pytest.raises(ValueError, match="numbers none"):
        check_numbers([], what.model)
    dark = LabelledImages(what.profiling.pictures_NHWC[::2], what.profiling.labels_N[::2])
    with pytest.raises(ValueError, match="the profiling set holds no picture of bright"):
        replace(what, profiling=dark)
    with pytest.raises(ValueError, match="label 1, but only 1 classes"):
        replace(what, classes=("dark",), model=with_head(what.model, 1, 0))
    with pytest.raises(ValueError, match="head has 2 classes; task 'bright-dark' has 3"):
        replace(what, classes=("a", "b", "c"))


def test_a_new_head_leaves_the_rest_as_it_is() -> None:
    what = subject()
    headed = with_head(what.model, 5, seed=1)
    assert headed.classes == 5 and what.model.classes == 2
    with torch.inference_mode():
        assert headed(torch.zeros(1, 3, 16, 16)).shape == (1, 5)
    assert torch.equal(headed.vit.blocks[0].attn.qkv.weight, what.model.vit.blocks[0].attn.qkv.weight)
    loss = functional.cross_entropy(start(what, TuneConfig())(torch.zeros(1, 3, 16, 16), -8), torch.tensor([0]))
    loss.backward()
