"""Learning heads and prompts: they learn, more start from fewer, and a killed run ends as an undisturbed one."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from isthmus.cloud.elastic.model.runner import ElasticRunner
from isthmus.cloud.elastic.prepare.prompts import PromptConfig, first_prompts, learn_task, mean_tokens
from isthmus.cloud.elastic.tasks.recipes import RECIPES, TaskRecipe, read_recipe, split
from isthmus.cloud.elastic.tasks.task import PromptMode, TaskSpec, TaskWeights
from isthmus.data.images import LabelledImages
from isthmus.distill.training.checkpoint import CheckpointError
from isthmus.distill.training.loop import EpochReport
from isthmus.proto.errors import IsthmusError
from tests.rigs.elastic.prompts import CPU, PIXELS, bright_or_dark, config, model


def learned(folder: Path, **kwargs: object) -> TaskWeights:
    return learn_task(model(), PIXELS, bright_or_dark(), 2, config(), folder=folder, device=CPU, **kwargs)  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["append", "replace"])
def test_a_task_is_learned_and_prompts_lower_the_loss(tmp_path: Path, mode: PromptMode) -> None:
    losses: dict[str, list[float]] = {}

    def watch(what: str, report: EpochReport) -> None:
        losses.setdefault(what, []).append(report.loss)

    data = bright_or_dark()
    weights = learn_task(model(), PIXELS, data, 2, config(mode), folder=tmp_path, device=CPU, on_epoch=watch)
    assert list(losses) == ["head", "prompts 1", "prompts 2"]
    assert losses["head"][-1] < losses["head"][0]
    assert losses["prompts 2"][-1] < losses["prompts 1"][0]
    assert {gamma: prompts.shape for gamma, prompts in weights.prompts_LGD.items()} == {1: (2, 1, 192), 2: (2, 2, 192)}
    runner = ElasticRunner(model(), PIXELS)
    task = runner.prepare(weights, mode)
    for gamma in (0, 2):
        answers = np.argmax(runner.answer(data.pictures_NHWC, gamma, [task] * len(data)), axis=1)
        assert np.mean(answers == data.labels_N) > 0.9


def test_prompts_start_as_averages_of_tokens_and_more_from_fewer() -> None:
    tokens_LND = torch.arange(12.0).reshape(1, 6, 2)
    two = first_prompts(tokens_LND, 2, None)
    torch.testing.assert_close(two, torch.tensor([[[4.0, 5.0], [6.0, 7.0]]]))
    four = first_prompts(tokens_LND, 4, two + 1)
    assert torch.equal(four[:, :2], two + 1)
    torch.testing.assert_close(four[:, 2:], tokens_LND[:, 2:4])
    assert first_prompts(tokens_LND, 8, four).shape == (1, 8, 2)
    with pytest.raises(ValueError, match="earlier prompts are more than"):
        first_prompts(tokens_LND, 2, four)


def test_the_tokens_are_those_that_go_into_each_layer() -> None:
    vit, one = model(), bright_or_dark(1)
    tokens_LND = mean_tokens(vit, PIXELS, one, CPU)
    images_BCHW = torch.from_numpy(PIXELS.standardise(one.pictures_NHWC))
    with torch.inference_mode():
        first_BND = vit.vit._pos_embed(vit.vit.patch_embed(images_BCHW))
        second_BND = vit.vit.blocks[0](first_BND)
    torch.testing.assert_close(tokens_LND, torch.stack((first_BND[0, 1:], second_BND[0, 1:])))


def test_a_killed_run_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    def stop(what: str, report: EpochReport) -> None:
        if (what, report.epoch) == ("prompts 2", 1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learned(tmp_path / "killed", on_epoch=stop)
    resumed, whole = learned(tmp_path / "killed"), learned(tmp_path / "whole")
    assert np.array_equal(resumed.head_weight_CD, whole.head_weight_CD)
    for gamma in (1, 2):
        assert np.array_equal(resumed.prompts_LGD[gamma], whole.prompts_LGD[gamma])


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    learned(tmp_path)
    with pytest.raises(CheckpointError, match="belongs to another run"):
        learn_task(model(), PIXELS, bright_or_dark(20), 2, config(), folder=tmp_path, device=CPU)


def test_data_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    data = bright_or_dark()
    with pytest.raises(ValueError, match="for 1 classes"):
        learn_task(model(), PIXELS, data, 1, config(), folder=tmp_path, device=CPU)
    small = LabelledImages(data.pictures_NHWC[:, :8, :8], data.labels_N)
    with pytest.raises(ValueError, match="the model reads"):
        learn_task(model(), PIXELS, small, 2, config(), folder=tmp_path, device=CPU)
    for gammas in ((0, 2), (4, 2), (2, 2)):
        with pytest.raises(ValueError, match="must be above 0 and ascend"):
            PromptConfig(gammas)


def test_recipes_make_tasks_of_labels(tmp_path: Path) -> None:
    pictures = np.zeros((10, 4, 4, 3), np.uint8)
    pictures[:, 0, 0, 0] = np.arange(10)
    cifar = LabelledImages(pictures, np.arange(10))
    two = RECIPES["animals-vehicles"].apply(cifar)
    assert two.labels_N.tolist() == [1, 1, 0, 0, 0, 0, 0, 0, 1, 1]
    six = RECIPES["animals"].apply(cifar)
    assert six.pictures_NHWC[:, 0, 0, 0].tolist() == [2, 3, 4, 5, 6, 7]
    assert six.labels_N.tolist() == [0, 1, 2, 3, 4, 5]
    path = tmp_path / "own.json"
    path.write_text(
        json.dumps({"name": "own", "classes": ["a", "b"], "class_of_label": [0, 1, None]}), encoding="utf-8"
    )
    assert read_recipe(str(path)) == TaskRecipe("own", ("a", "b"), (0, 1, -1))
    with pytest.raises(ValueError, match="the data set has higher ones"):
        read_recipe(str(path)).apply(cifar)
    path.write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="is not a task recipe"):
        read_recipe(str(path))
    with pytest.raises(ValueError, match="neither a file nor one of"):
        read_recipe("no-such-task")
    for classes, of_label in ((("a",), (0,)), (("a", "b"), (0, 0)), (("a", "b"), (0, 1, 2)), (("a", "a"), (0, 1))):
        with pytest.raises(ValueError, match="task 'bad'"):
            TaskRecipe("bad", classes, of_label)


@pytest.mark.parametrize(
    ("name", "classes", "why"),
    [
        ("My Flowers", ("rose", "tulip"), "task name 'My Flowers': use letters"),
        ("../flowers", ("rose", "tulip"), "use letters"),
        ("f" * 65, ("rose", "tulip"), "at most 64"),
        ("birds", ("crane", "heron", "crane"), "'crane' is there 2 times; names must differ"),
        ("birds", ("crane", " "), "is not a name that can be shown"),
        ("birds", ("crane", "her\non"), "is not a name that can be shown"),
        ("birds", ("crane", "h" * 257), "is longer than 256 characters"),
        ("birds", tuple(map(str, range(1001))), "1001 are too many"),
    ],
)
def test_names_that_registering_would_refuse_are_refused_before_any_work(
    name: str, classes: tuple[str, ...], why: str
) -> None:
    with pytest.raises(ValueError, match=why):
        TaskRecipe(name, classes, tuple(range(len(classes))))
    with pytest.raises(IsthmusError, match=why):
        TaskSpec(name, classes)


def test_a_class_named_by_all_its_synonyms(tmp_path: Path) -> None:
    van = "police van, police wagon, paddy wagon, patrol wagon, wagon, black Maria"
    assert TaskSpec("wagons", TaskRecipe("wagons", (van, "other"), (0, 1)).classes).classes[0] == van
    path = tmp_path / "letters.json"
    path.write_text(json.dumps({"name": "letters", "classes": "abc", "class_of_label": [0, 1, 2]}))
    with pytest.raises(ValueError, match="must be lists"):
        read_recipe(str(path))


def test_a_split_is_seeded_and_loses_nothing() -> None:
    data = bright_or_dark(20)
    rest, held = split(data, held_share=0.2, seed=1)
    again, _ = split(data, held_share=0.2, seed=1)
    assert (len(rest), len(held)) == (16, 4)
    assert np.array_equal(rest.pictures_NHWC, again.pictures_NHWC)
    seen = np.concatenate([rest.pictures_NHWC, held.pictures_NHWC]).reshape(20, -1)
    assert sorted(map(bytes, seen)) == sorted(map(bytes, data.pictures_NHWC.reshape(20, -1)))
    for share in (0.0, 1.0):
        with pytest.raises(ValueError, match="one side empty"):
            split(data, held_share=share, seed=1)
