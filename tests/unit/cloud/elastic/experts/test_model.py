"""A ViT with experts: the dense model's answers where they must be the same, and no task that disturbs another."""

import math
import threading

import numpy as np
import pytest
import torch

from isthmus.cloud.elastic.experts.layer import Routing, Seen
from isthmus.cloud.elastic.model.executor import Item, ModelExecutor
from isthmus.cloud.elastic.model.runner import ElasticRunner
from isthmus.cloud.elastic.prepare.upcycling import with_experts
from isthmus.cloud.elastic.scheduling.levels import level_of
from isthmus.cloud.elastic.tasks.router import ExpertsShape
from isthmus.cloud.elastic.tasks.task import Task, TaskSpec, TaskWeights
from tests.rigs.elastic.experts import PIXELS, SHAPE, dense, model, pictures, router, uniform, weights
from tests.rigs.elastic.vit import images


@pytest.mark.parametrize("gamma", [0, -4])
@torch.no_grad()
def test_one_expert_is_the_dense_block(gamma: int) -> None:
    whole = with_experts(dense(), experts=1, k=1, ratio=4.0)
    found = whole.features(images(), gamma, routing=uniform(whole.experts, 1))
    torch.testing.assert_close(found, dense().features(images(), gamma), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_with_all_experts_alike_the_model_is_the_dense_one() -> None:
    made = with_experts(dense(), experts=8, k=8)
    found = made.features(images(), routing=uniform(made.experts, 8))
    torch.testing.assert_close(found, dense().features(images()), atol=1e-4, rtol=1e-4)


def test_a_token_costs_as_much_as_with_the_usual_mlp() -> None:
    made = with_experts(dense(), experts=16, k=4)
    routers = 2 * 2 * SHAPE.layers * made.width * 16 * made.tokens
    assert 0 <= made.operations(0) - dense().operations(0) <= routers
    assert made.operations(0, k=1) < made.operations(0, k=2) < made.operations(0)


@torch.no_grad()
def test_merged_tokens_are_routed_after_merging_and_prompts_like_tokens() -> None:
    made = model()
    rows: list[int] = []

    def seen(one: Seen) -> None:
        rows.append(len(one.experts_NK))

    blank = uniform(SHAPE, 2)
    routing = Routing(blank.weight_TMDE, blank.bias_TME, 2, seen=seen)
    made.features(images(2), -4, routing=routing)
    made.features(images(2), 2, torch.zeros(1, made.depth, 2, made.width), routing=routing)
    merged, last = 2 * (37 - 2 * 4), 2  # after two layers; the last block computes the class token alone
    assert rows == [merged, last, 2 * (37 + 2 * 2), last]


def test_what_cannot_become_experts_is_refused() -> None:
    with pytest.raises(ValueError, match="has experts already"):
        with_experts(model())
    with pytest.raises(ValueError, match="blocks 0 to 3"):
        with_experts(dense(), blocks=(4,))
    with pytest.raises(ValueError, match="must divide 768"):
        with_experts(dense(), experts=8, ratio=0.7)
    with pytest.raises(ValueError, match="are not an MLP of 768"):
        with_experts(dense(), experts=2, k=1, ratio=1.0)
    with pytest.raises(ValueError, match="9 of 8 experts per token"):
        with_experts(dense(), experts=8, k=9)


def test_routers_that_do_not_fit_are_refused_before_anything_is_computed() -> None:
    made = model()
    with pytest.raises(ValueError, match="no router was given"):
        made.features(images())
    with pytest.raises(ValueError, match="without experts"):
        dense().features(images(), routing=uniform(SHAPE, 1))
    with pytest.raises(ValueError, match="routers of shape"):
        made.features(images(), routing=uniform(ExpertsShape(2, 9, 1), 1))
    with pytest.raises(ValueError, match="9 experts per token"):
        made.features(images(), routing=uniform(SHAPE, 9))
    with pytest.raises(ValueError, match="routers for 2 pictures, and 3"):
        blank = uniform(SHAPE, 1)
        made.features(
            images(3), routing=Routing(blank.weight_TMDE, blank.bias_TME, 1, torch.zeros(2, dtype=torch.long))
        )
    runner = ElasticRunner(made, PIXELS)
    with pytest.raises(ValueError, match="has no router"):
        runner.prepare(TaskWeights(np.zeros((2, 192), np.float32), np.zeros(2, np.float32), {}))
    with pytest.raises(ValueError, match="does not fit"):
        bad = router(shape=ExpertsShape(2, 9, 3))
        runner.prepare(TaskWeights(np.zeros((2, 192), np.float32), np.zeros(2, np.float32), {}, bad))
    with pytest.raises(ValueError, match="does not run compiled"):
        ElasticRunner(model(), PIXELS, compiler="eager")
    with pytest.raises(ValueError, match="leaves no expert"):
        served = runner.prepare(weights())
        runner.answer(pictures(1), level_of(0, 3), [served])


@pytest.mark.parametrize(("number_type", "packed", "near"), [("float32", False, 1e-4), ("float32", True, 1e-4)])
def test_a_task_answers_alike_alone_and_beside_others(number_type: str, packed: bool, near: float) -> None:
    runner = ElasticRunner(model(), PIXELS, packed=packed)
    tasks = [
        runner.prepare(weights(seed, classes, window))
        for seed, classes, window in ((1, 3, None), (2, 5, (0, 4)), (3, 2, (4, 4)))
    ]
    some = pictures(6)
    order = [tasks[place] for place in (0, 1, 2, 1, 0, 2)]
    for level in (0, -4, level_of(0, 1), level_of(-4, 2)):
        together = runner.answer(some, level, order)
        for place, task in enumerate(order):
            alone = runner.answer(some[place : place + 1], level, [task])[0]
            np.testing.assert_allclose(together[place], alone, atol=near * 10, rtol=1e-4)


def test_fewer_experts_give_other_answers_and_are_those_of_a_smaller_k() -> None:
    made = model()
    runner = ElasticRunner(made, PIXELS)
    task = runner.prepare(weights())
    usual, fewer = (runner.answer(pictures(2), level, [task] * 2) for level in (0, level_of(0, 1)))
    assert not np.allclose(usual, fewer, atol=1e-3)
    given = router()
    routing = Routing(torch.from_numpy(given.weight_MDE)[None], torch.from_numpy(given.bias_ME)[None], 2)
    with torch.no_grad():
        features_BD = made.features(runner.images(pictures(2)), routing=routing)
    logits_BC = features_BD @ task.head_weight_CD.T + task.head_bias_C
    np.testing.assert_allclose(np.stack(fewer), logits_BC.numpy(), atol=1e-4, rtol=1e-4)


def test_experts_outside_a_window_are_never_computed() -> None:
    made = model()
    with torch.no_grad():
        for mlp in made.expert_layers:
            for outside in (0, 1, 6, 7):
                mlp.experts[outside].fc2.bias.fill_(math.nan)
    runner = ElasticRunner(made, PIXELS)
    inside = runner.prepare(weights(window=(2, 4)))
    assert np.isfinite(runner.answer(pictures(3), 0, [inside] * 3)).all()
    narrow = runner.prepare(weights(window=(3, 1)))  # a window smaller than k
    assert np.isfinite(runner.answer(pictures(3), 0, [narrow] * 3)).all()


def test_a_threshold_skips_experts_of_little_weight() -> None:
    made = model()
    all_experts = ElasticRunner(made, PIXELS)
    skipping = ElasticRunner(made, PIXELS, least_weight=0.99)
    first = level_of(0, 2)  # one expert per token
    wanted = all_experts.answer(pictures(2), first, [all_experts.prepare(weights())] * 2)
    found = skipping.answer(pictures(2), 0, [skipping.prepare(weights())] * 2)
    np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_int8_experts_answer_nearly_alike() -> None:
    plain, small = ElasticRunner(model(), PIXELS), ElasticRunner(model(), PIXELS, number_type="int8")
    one, other = (np.stack(each.answer(pictures(4), 0, [each.prepare(weights())] * 4)) for each in (plain, small))
    assert np.linalg.norm(one - other) < 0.2 * np.linalg.norm(one)


def test_the_executor_serves_tasks_with_routers() -> None:
    runner = ElasticRunner(model(), PIXELS)
    executor = ModelExecutor(runner, PIXELS)
    tasks = [Task(TaskSpec(f"t{seed}", ("a", "b", "c")), weights(seed)) for seed in (1, 2)]
    items = [Item(picture, tasks[place % 2]) for place, picture in enumerate(pictures(4))]
    found: list[object] = []
    thread = threading.Thread(target=lambda: found.extend(executor.run(items, level_of(-4, 1))))
    thread.start()
    thread.join()
    assert len(found) == 4
    assert {np.shape(each) for each in found} == {(3,)}
