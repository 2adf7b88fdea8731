"""From a vanilla model to a store of warmed ones: budgets, soups, resuming after a kill; and serving from the store."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from isthmus.cloud.elastic.model.executor import Item, ModelExecutor
from isthmus.cloud.elastic.model.runner import ElasticRunner
from isthmus.cloud.elastic.model.vit import ElasticViT
from isthmus.cloud.elastic.tasks.task import Task, TaskSpec, TaskWeights
from isthmus.cloud.elastic.warm.models import WarmExecutor, WarmModels, model_of, timed_model
from isthmus.cloud.elastic.warm.store import Card, StoreError, WarmStore
from isthmus.cloud.warmup import warming as warming_module
from isthmus.cloud.warmup.planner import BudgetTooSmall, Plan, next_step
from isthmus.cloud.warmup.soup import Soup
from isthmus.cloud.warmup.tuning import tensors_of_model
from isthmus.cloud.warmup.warming import Warming, find_ratio
from isthmus.distill.training.loop import EpochReport
from tests.rigs.elastic.warmup import CLASSES, NUMBERS, PIXELS, bright_or_dark, quick, subject, tiny_vit


@pytest.fixture(scope="module")
def warmed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models tuned at 0, 4 and 8, profiled."""
    folder = tmp_path_factory.mktemp("warming")
    made = Warming(folder, subject(), NUMBERS, quick())
    made.run(made.begin(middle=0))
    made.profile()
    return folder


def test_every_number_is_tuned_where_no_budget_forbids_and_costs_are_recorded(warmed: Path) -> None:
    made = Warming(warmed, subject(), NUMBERS, quick())
    plan = made.plan()
    assert plan is not None
    assert [one.number for one in plan.models] == [0, 4, 8]
    assert all(one.seconds > 0 and one.predicted_s > 0 and one.accuracy is not None for one in plan.tuned)
    assert made.store.names() == ["tuned-0", "tuned-4", "tuned-8", "vanilla"]
    assert set(made.table()["tuned-4"]) == set(NUMBERS)
    assert not list((warmed / "tuning").iterdir())
    cards = {name: made.store.card(name) for name in made.store.names()}
    shared = {key for key, one in cards["vanilla"].tensors.items() if cards["tuned-8"].tensors[key] == one}
    assert shared == {"cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    own = {one.hash: one.bytes for one in cards["tuned-8"].tensors.values()} | {}
    frozen = sum(cards["tuned-8"].tensors[key].bytes for key in shared)
    assert plan.costs[8].bytes == sum(own.values()) - frozen


def test_budgets_hold_and_may_be_raised_later(tmp_path: Path) -> None:
    made = Warming(tmp_path, subject(), NUMBERS, quick(epochs=1))
    one = made.begin(middle=0).costs[8].bytes
    with pytest.raises(BudgetTooSmall, match=f"--storage-budget-bytes {2 * one}"):
        made.begin(middle=0, storage_budget_bytes=one)
    plan = made.run(made.begin(middle=0, storage_budget_bytes=2 * one))
    assert [tuned.number for tuned in plan.tuned] == [0, 8]
    assert next_step(plan).why == "no further model fits the budget"
    raised = made.run(made.begin(middle=0, storage_budget_bytes=3 * one))
    assert [tuned.number for tuned in raised.tuned] == [0, 8, 4]


def test_what_was_given_up_goes_on_with_more_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Warming(tmp_path, subject(), NUMBERS, quick())
    tune, given = warming_module.tune, []

    def slow(*args: Any, **kwargs: Any) -> tuple[ElasticViT, float]:
        if args[1] == 8 and not given:
            given.append(kwargs["allowance_s"])
            kwargs["allowance_s"] = 1e-9  # as if the first epoch had taken all there was
        return tune(*args, **kwargs)

    monkeypatch.setattr(warming_module, "tune", slow)
    plan = made.run(made.begin(middle=0, time_budget_s=1e6))
    assert [(one.number, one.accuracy is None) for one in plan.tuned] == [(0, False), (8, True)]
    assert next_step(plan).why == "the time budget is spent"
    assert [one.number for one in made.begin(middle=0, time_budget_s=1e6).tuned] == [0, 8]
    seen: list[tuple[str, int]] = []
    raised = made.begin(middle=0, time_budget_s=2e6)
    done = made.run(raised, on_epoch=lambda what, report: seen.append((what, report.epoch)))
    assert [one.number for one in done.models] == [0, 4, 8]
    assert seen[0] == ("number 8", 2)  # the epoch that was done is kept


def test_a_run_killed_between_and_within_models_goes_on(tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    def within(what: str, report: EpochReport) -> None:
        if (what, report.epoch) == ("number 8", 1):
            raise Killed

    made = Warming(tmp_path, subject(), NUMBERS, quick())
    with pytest.raises(Killed):
        made.run(made.begin(middle=0), on_epoch=within)
    left = made.plan()
    assert left is not None and [one.number for one in left.tuned] == [0]
    seen: list[tuple[str, int]] = []
    plan = made.run(left, on_epoch=lambda what, report: seen.append((what, report.epoch)))
    assert seen == [("number 8", 2), ("number 4", 1), ("number 4", 2)]
    assert [one.number for one in plan.tuned] == [0, 8, 4]
    other = Warming(tmp_path, subject(), NUMBERS, quick(seed=1))
    with pytest.raises(ValueError, match="belongs to another run"):
        other.begin(middle=0)


def test_soups_are_kept_by_gain_within_bytes(warmed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Warming(warmed, subject(), NUMBERS, quick())
    found = made.ensemble()
    assert [one.number for one in found] == list(NUMBERS)
    assert all(one.accuracy >= one.best_accuracy for one in found)

    def gaining(number: int, accuracies: dict[str, float], evaluate: object) -> Soup:
        best = max(accuracies, key=lambda name: accuracies[name])
        shares = {"tuned-0": 0.5, "tuned-8": 0.5} if number else {best: 1.0}
        return Soup(number, shares, accuracies[best] + number / 100, "greedy", best, accuracies[best])

    monkeypatch.setattr(warming_module.soup, "ensemble", gaining)
    made.ensemble()
    (name,) = [name for name in made.store.names() if name.startswith("soup-")]
    states = {member: made.store.load(member) for member in ("tuned-0", "tuned-8")}
    key = "blocks.1.mlp.fc1.weight"
    torch.testing.assert_close(made.store.load(name)[key], (states["tuned-0"][key] + states["tuned-8"][key]) / 2)
    assert set(made.table()[name]) == set(NUMBERS)
    made.ensemble(storage_budget_bytes=1)
    assert not any(name.startswith("soup-") for name in made.store.names())
    monkeypatch.undo()


def test_find_ratio_takes_data_and_model_and_returns_warmed_models(tmp_path: Path) -> None:
    data = bright_or_dark()
    store, table = find_ratio(
        ElasticViT(tiny_vit()),
        PIXELS,
        data,
        bright_or_dark(12, 6),
        CLASSES,
        tmp_path,
        numbers=(0, 30, 70),
        middle=30,
        config=quick("pruning", epochs=1),
        device="cpu",
    )
    assert {"vanilla", "tuned-30", "tuned-70"} <= set(table)
    assert store.common().reducer == "pruning"
    runner = base()
    timed = timed_model(store, runner.model)
    assert timed is not runner.model and timed.reducer.most == 70
    warm = WarmModels(store.path, runner)
    executor = WarmExecutor(ModelExecutor(runner, PIXELS), warm, (-70, -30, 0))
    assert warm.wait(120)
    items = [Item(data.pictures_NHWC[0], task(name="task")), Item(data.pictures_NHWC[1], task(name="other"))]
    mine, other = executor.run(items, -70)
    assert store.profiled().pictures == 12
    best = store.profiled().ranked(70)[0]
    model = model_of(store.card(best), store.load(best), runner.model)
    with torch.inference_mode():
        wanted = model(runner.images(data.pictures_NHWC[:1]), -70)[0].numpy()
    np.testing.assert_allclose(mine, wanted, rtol=1e-4, atol=1e-5)
    (whole,) = runner.answer(data.pictures_NHWC[1:2], 0, [runner.prepare(items[1].task.weights)])
    np.testing.assert_allclose(other, whole, rtol=1e-4, atol=1e-5)  # it cannot be pruned: all tokens
    warm.close()
    with pytest.raises(ValueError, match="number"):
        find_ratio(ElasticViT(tiny_vit()), PIXELS, data, data, CLASSES, tmp_path, numbers=(0, 90))


def base() -> ElasticRunner:
    return ElasticRunner(ElasticViT(tiny_vit()), PIXELS)


def task(classes: tuple[str, ...] = CLASSES, name: str = "bright-dark") -> Task:
    rng = np.random.default_rng(1)
    head = rng.standard_normal((len(classes), 64), np.float32)
    return Task(TaskSpec(name, classes), TaskWeights(head, np.zeros(len(classes), np.float32), {}))


def test_each_batch_runs_on_the_best_model_for_its_gamma_and_other_tasks_on_the_vanilla_one(warmed: Path) -> None:
    runner = base()
    warm = WarmModels(warmed / "models", runner)
    store = WarmStore(warmed / "models")
    executor = WarmExecutor(ModelExecutor(runner, PIXELS), warm, (-8, -4, 0))
    assert warm.wait(120)
    mine, other, renamed = task(), task(("x", "y", "z"), "other"), task(("bright", "dark"))
    assert warm.serves(mine) and not warm.serves(other) and not warm.serves(renamed)
    assert warm.accuracy(other, (-8, 0)) == {}
    picture = bright_or_dark(1).pictures_NHWC[0]
    for number in NUMBERS:
        answers = executor.run([Item(picture, mine), Item(picture, other), Item(picture, mine)], -number)
        best = store.profiled().ranked(number)[0]
        vit = tiny_vit()
        vit.load_state_dict(store.load(best))
        direct = ElasticRunner(ElasticViT(vit), PIXELS)
        (wanted,) = direct.answer(picture[None], -number, [direct.own_task()])
        np.testing.assert_allclose(answers[0], wanted, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(answers[2], wanted, rtol=1e-4, atol=1e-5)
        assert answers[1].shape == (3,)
    assert warm.missed == 0
    assert max(warm.accuracy(mine, (-8, -4, 0)).values()) <= 1
    warm.close()


def test_with_nothing_loaded_yet_the_vanilla_model_answers(warmed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = base()
    warm = WarmModels(warmed / "models", runner)
    monkeypatch.setattr(warm, "announce_near", lambda gamma, gammas: None)
    executor = WarmExecutor(ModelExecutor(runner, PIXELS), warm, (-8, 0))
    picture, mine = bright_or_dark(1).pictures_NHWC[0], task()
    (answer,) = executor.run([Item(picture, mine)], -8)
    (wanted,) = runner.answer(picture[None], -8, [runner.prepare(mine.weights)])
    np.testing.assert_array_equal(answer, wanted)
    assert warm.missed == 1
    warm.close()


def test_a_store_with_damaged_or_foreign_models_serves_the_others(tmp_path: Path, warmed: Path) -> None:
    source = WarmStore(warmed / "models")
    store = WarmStore.create(tmp_path / "models", source.common())
    for name in ("tuned-4", "tuned-8"):
        card = source.card(name)
        store.save(name, source.load(name), kind="tuned", number=card.number, heads=1, accuracy=card.accuracy)
    wide = tiny_vit(classes=3)
    store.save("foreign", tensors_of_model(ElasticViT(wide)), kind="tuned", number=2, heads=1, accuracy={0: 1.0})
    own = store.card("tuned-8").tensors["blocks.0.attn.qkv.weight"]
    (tmp_path / "models" / "tensors" / f"{own.hash}.safetensors").unlink()
    warm = WarmModels(tmp_path / "models", base())
    assert set(warm.cards) == {"tuned-4"}
    assert "no head for the 2 classes" in warm.left_out["foreign"] and "is missing" in warm.left_out["tuned-8"]
    warm.close()
    store.remove("tuned-4")
    with pytest.raises(StoreError, match=r"no model that can be used: .*missing"):
        WarmModels(tmp_path / "models", base())


def test_models_tuned_with_another_merge_order_are_refused(warmed: Path) -> None:
    other = ElasticRunner(ElasticViT(tiny_vit(), merge_order="receiving-first"), PIXELS)
    with pytest.raises(StoreError, match="measure one with --merge-order published"):
        WarmModels(warmed / "models", other)


def test_int8_and_a_bound_too_small_are_refused(warmed: Path) -> None:
    runner = base()
    with pytest.raises(StoreError, match="is too small for the largest model: give at least"):
        WarmModels(warmed / "models", runner, limit_bytes=1_000)
    if torch.backends.mkldnn.is_available():
        with pytest.raises(ValueError, match="float32 or bfloat16"):
            WarmModels(warmed / "models", ElasticRunner(ElasticViT(tiny_vit()), PIXELS, number_type="int8"))


def test_bfloat16_takes_half_the_memory(warmed: Path) -> None:
    whole = WarmModels(warmed / "models", base())
    half = WarmModels(warmed / "models", ElasticRunner(ElasticViT(tiny_vit()), PIXELS, number_type="bfloat16"))
    assert 2 * half.residency.limit_bytes == whole.residency.limit_bytes
    half.announce_near(-8, (-8,))
    assert half.wait(120)
    assert half.answer(bright_or_dark(2).pictures_NHWC, -8) is not None
    for each in (whole, half):
        each.close()


def test_a_plan_of_the_store_is_what_cards_say(warmed: Path) -> None:
    plan = Warming(warmed, subject(), NUMBERS, quick()).plan()
    assert isinstance(plan, Plan)
    card = WarmStore(warmed / "models").card("tuned-8")
    assert isinstance(card, Card) and dataclasses.replace(card) == card
    (tuned,) = [one for one in plan.tuned if one.number == 8]
    assert card.accuracy[8] == tuned.accuracy and card.seconds == tuned.seconds
