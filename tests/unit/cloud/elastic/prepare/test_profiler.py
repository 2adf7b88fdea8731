"""Measuring: a profile's three tables, which machine it is of, and which number type is taken."""

import itertools

import numpy as np
import pytest
import torch

from isthmus.cloud.elastic.model.runner import ElasticRunner, NumberType
from isthmus.cloud.elastic.model.timm_import import create_model
from isthmus.cloud.elastic.model.vit import ElasticViT
from isthmus.cloud.elastic.prepare.precision import choose
from isthmus.cloud.elastic.prepare.profiler import (
    LiveBytes,
    accuracy,
    key_similarity,
    machine_key,
    measure,
    measure_latency,
)
from isthmus.cloud.elastic.scheduling.profile import Profile
from isthmus.cloud.elastic.tasks.task import TaskWeights
from isthmus.data.images import LabelledImages, PixelSpec

PIXELS = PixelSpec(16, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
RNG = np.random.default_rng(3)
LABELLED = LabelledImages(RNG.integers(0, 256, (10, 16, 16, 3), np.uint8), RNG.integers(0, 4, 10))


def runner() -> ElasticRunner:
    torch.manual_seed(0)
    vit = create_model(
        "vit_tiny_patch16_224", pretrained=False, img_size=16, patch_size=4, depth=3, num_classes=4
    ).eval()
    return ElasticRunner(ElasticViT(vit, {-4: (-6, -4, 0)}), PIXELS)


def test_a_profile_holds_all_that_was_asked_for() -> None:
    made = runner()
    prompts_LGD = {2: np.zeros((3, 2, 192), np.float32)}
    weights = TaskWeights(np.eye(4, 192, dtype=np.float32), np.zeros(4, np.float32), prompts_LGD)
    steps: list[tuple[str, int, int]] = []
    profile = measure(
        made,
        gammas=(2, -4, 0, 4),
        sizes=(4, 1),
        tasks={"four": (made.prepare(weights), LABELLED)},
        repeats=1,
        on_step=lambda *step: steps.append(step),
    )
    assert profile.gammas == (-4, 0, 2, 4) and profile.sizes == (1, 4)
    assert profile.key == machine_key(made)
    assert profile.schedules == {-4: (-6, -4, 0)}
    assert profile.accuracy["four"][4] == 0.0  # it has no prompts there
    assert all(0 <= share <= 1 for share in profile.accuracy["four"].values())
    assert profile.memory[-4][1] < profile.memory[4][1]
    assert profile.memory[0][0] < profile.memory[0][1]
    assert {what: done == every for what, done, every in steps} == {"time": True, "memory": True, "accuracy": True}
    assert Profile.from_json(profile.to_json()) == profile


def test_memory_of_larger_batches_is_extended_in_a_straight_line_and_is_enough() -> None:
    sizes = (1, 2, 4, 16)
    brief = measure(runner(), gammas=(-4, 0), sizes=sizes, repeats=1, memory_sizes=(1, 4))
    whole = measure(runner(), gammas=(-4, 0), sizes=sizes, repeats=1)
    for gamma in (-4, 0):
        assert brief.memory[gamma][0] == whole.memory[gamma][0] and brief.memory[gamma][2] == whole.memory[gamma][2]
        for guessed, counted in zip(brief.memory[gamma], whole.memory[gamma], strict=True):
            assert 0.99 * counted <= guessed <= 1.2 * counted


def test_times_are_the_clocks_median_and_pairs_take_turns() -> None:
    ticks = itertools.count()
    found = measure_latency(runner(), (0, -4), (2, 1), repeats=3, clock=lambda: float(next(ticks)))
    assert found == {-4: (1.0, 1.0), 0: (1.0, 1.0)}
    assert next(ticks) == 2 * 4 * 4 - 4  # the first repeat warms up and asks only once for each


def test_another_model_is_another_key() -> None:
    one, other = runner(), runner()
    assert machine_key(one) == machine_key(other)
    with torch.no_grad():
        other.model.vit.head.weight[0, 0] += 1
    assert machine_key(one).differences(machine_key(other))[0].startswith("model_hash")


def test_accuracy_is_the_share_that_is_right() -> None:
    made = runner()
    task = made.own_task()
    answers = np.argmax(made.answer(LABELLED.pictures_NHWC, 0, [task] * 10), axis=1)
    labels = answers.copy()
    labels[:3] = (labels[:3] + 1) % 4
    assert accuracy(made, task, LabelledImages(LABELLED.pictures_NHWC, labels), 0) == pytest.approx(0.7)


def test_tokens_that_are_alike_have_similarity_one() -> None:
    made = runner()
    with torch.no_grad():
        made.model.vit.pos_embed.zero_()
    flat = LabelledImages(np.full((3, 16, 16, 3), 90, np.uint8), np.zeros(3, np.int64))
    assert key_similarity(made, flat) == pytest.approx((1.0, 1.0, 1.0), abs=1e-4)
    assert max(key_similarity(runner(), LABELLED)) < 0.999


def test_live_bytes_counts_what_is_alive_together() -> None:
    with LiveBytes() as live:
        first = torch.zeros(1_000)
        view = first[10:]
        second = first + 1
        del first, view
        second = second + 1  # two of them at once, as before
    assert live.peak == 8_000
    assert second.sum() == 2_000


@pytest.mark.parametrize("number_type", ["bfloat16", "int8"])
def test_fewer_bits_are_measured_like_float32(number_type: NumberType) -> None:
    made = ElasticRunner(runner().model, PIXELS, number_type=number_type)
    profile = measure(made, gammas=(-4, 0), sizes=(1, 2), repeats=1)
    assert profile.key.number_type == number_type
    assert all(one < two for one, two in profile.memory.values())


def test_a_model_without_a_head_is_judged_by_another() -> None:
    vit = create_model("vit_tiny_patch16_224", pretrained=False, img_size=16, patch_size=4, depth=2, num_classes=0)
    headless = ElasticViT(vit.eval())
    assert choose(headless, PIXELS, LABELLED, batch=2, repeats=1).measured[0].accuracy == 1.0


def test_the_quickest_number_type_that_answers_alike_is_taken() -> None:
    model = runner().model
    with torch.no_grad():
        model.vit.head.weight.normal_(std=1.0)
    took_s = {"float32": 2.0, "bfloat16": 1.0, "int8": 0.5}
    ticks = itertools.cycle(tick for seconds in took_s.values() for tick in (0.0, seconds))
    now = itertools.accumulate(itertools.chain([0.0] * 3, ticks))
    choice = choose(model, PIXELS, LABELLED, batch=4, repeats=2, clock=lambda: next(now))
    assert [one.number_type for one in choice.measured] == list(took_s)
    assert [one.images_per_s for one in choice.measured] == [2.0, 4.0, 8.0]
    assert choice.measured[0].accuracy == 1.0
    alike = [one for one in choice.measured if one.accuracy >= 0.995]
    assert choice.number_type == alike[-1].number_type
    assert choice.number_type in choice.said()


def test_a_number_type_far_slower_than_float32_is_given_up_after_a_round() -> None:
    took_s = {"float32": 1.0, "bfloat16": 9.0, "int8": 1.2}
    rounds = [*took_s.values(), *took_s.values(), 1.0, 1.2, 1.0, 1.2]
    ticks = iter(itertools.accumulate(tick for seconds in rounds for tick in (0.0, seconds)))
    ended = itertools.chain(list(ticks)[6:], itertools.repeat(0.0))  # the first round is not timed at its end
    ended = itertools.chain([0.0] * 3, ended)
    choice = choose(runner().model, PIXELS, LABELLED, batch=2, repeats=3, clock=lambda: next(ended))
    slow = choice.measured[1]
    assert np.isnan(slow.accuracy) and slow.images_per_s == pytest.approx(2 / 9) and "too slow" in choice.said()


def test_a_tasks_labels_judge_where_there_are_some() -> None:
    model = runner().model
    labels_N = np.arange(len(LABELLED)) % 2
    weights = TaskWeights(np.zeros((2, model.width), np.float32), np.array([1, 0], np.float32), {})  # answers 0
    pictures = LabelledImages(LABELLED.pictures_NHWC, labels_N)
    choice = choose(model, PIXELS, pictures, task=weights, batch=2, repeats=1)
    found = {one.accuracy for one in choice.measured if not np.isnan(one.accuracy)}  # NaN: too slow on this machine
    assert found == {float(np.mean(labels_N == 0))}
    assert "accuracy" in choice.said()


def test_int8_is_left_out_where_it_cannot_run() -> None:
    choice = choose(runner().model, PIXELS, LABELLED, compiler="eager", batch=2, repeats=1)
    assert [one.number_type for one in choice.measured] == ["float32", "bfloat16"]
