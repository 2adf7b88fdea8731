"""A task is kept whole or not at all: what fits the model is served again after a restart, the rest is refused."""

import dataclasses
import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from isthmus.cloud.elastic.serve.registry import Registry
from isthmus.cloud.elastic.tasks.router import ExpertsShape, TaskRouter
from isthmus.cloud.elastic.tasks.task import ModelShape, Task, TaskSpec, TaskWeights, expected_accuracy
from isthmus.cloud.store.artefacts import Artefacts
from isthmus.cloud.store.database import Database
from isthmus.proto.errors import Busy, InvalidInput, IsthmusError, NotYours, StorageFull, TooLarge
from isthmus.proto.limits import MAX_TASKS

MODEL = ModelShape(layers=3, width=8, image_px=16)
SPEC = TaskSpec("animals", ("cat", "dog"), "append", {-4: 0.5, 0: 0.9, 2: 0.95})


def weights(classes: int = 2, gammas: tuple[int, ...] = (2,), seed: int = 0) -> TaskWeights:
    rng = np.random.default_rng(seed)
    prompts = {gamma: rng.standard_normal((MODEL.layers, gamma, MODEL.width), np.float32) for gamma in gammas}
    head = rng.standard_normal((classes, MODEL.width), np.float32)
    return TaskWeights(head, rng.standard_normal(classes, np.float32), prompts)


@dataclasses.dataclass
class Shop:
    """A registry in a folder, which can be opened again."""

    folder: Path
    changes: list[tuple[str, Task | None]] = dataclasses.field(default_factory=list)

    @property
    def artefacts(self) -> Artefacts:
        return Artefacts(str(self.folder / "artefacts"))

    def open(self, model: ModelShape = MODEL) -> Registry:
        database = Database(f"sqlite:///{self.folder / 'isthmus.db'}")
        database.migrate()
        registry = Registry(database, self.artefacts, model, lambda name, task: self.changes.append((name, task)))
        registry.load()
        return registry

    def file(self, data: bytes) -> Path:
        path = self.folder / "upload.part"
        path.write_bytes(data)
        return path

    def artefact_names(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "artefacts").iterdir())


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    return Shop(tmp_path)


def test_a_task_is_served_at_once_and_after_a_restart(shop: Shop) -> None:
    registry = shop.open()
    sent = weights()
    registry.register(SPEC, shop.file(sent.to_bytes()), 1.0)
    for each in (registry, shop.open()):
        task = each.get("animals")
        assert (task.spec, task.version, task.prompted_gammas) == (SPEC, 1, (2,))
        assert (task.weights.head_weight_CD == sent.head_weight_CD).all()
        assert (task.weights.prompts_LGD[2] == sent.prompts_LGD[2]).all()
    assert [name for name, _ in shop.changes] == ["animals", "animals"]


def test_registering_a_name_again_replaces_it_and_frees_the_old_weights(shop: Shop) -> None:
    registry = shop.open()
    registry.register(SPEC, shop.file(weights(seed=1).to_bytes()), 1.0)
    (first,) = shop.artefact_names()
    same = dataclasses.replace(SPEC, name="twin")
    registry.register(same, shop.file(weights(seed=1).to_bytes()), 2.0)
    assert shop.artefact_names() == [first]
    registry.register(SPEC, shop.file(weights(seed=2).to_bytes()), 3.0)
    assert len(shop.artefact_names()) == 2
    registry.remove("twin")
    (second,) = shop.artefact_names()
    assert second != first
    assert registry.get("animals").version == 2
    assert [(task.name, task.version) for task in shop.open().listing()] == [("animals", 2)]


def test_a_removed_task_is_gone(shop: Shop) -> None:
    registry = shop.open()
    registry.register(SPEC, shop.file(weights().to_bytes()), 1.0)
    registry.remove("animals")
    assert shop.changes[-1] == ("animals", None)
    assert (shop.artefact_names(), registry.listing(), shop.open().listing()) == ([], [], [])
    for call in (registry.get, registry.remove):
        with pytest.raises(NotYours, match="no task 'animals'"):
            call("animals")


def test_a_task_that_fits_no_more_is_kept_but_not_served(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    shop.open().register(SPEC, shop.file(weights().to_bytes()), 1.0)
    assert shop.open(dataclasses.replace(MODEL, width=12)).listing() == []
    assert "animals is not served" in caplog.text
    assert [task.name for task in shop.open().listing()] == ["animals"]
    shop.artefacts.remove(shop.artefact_names()[0])
    assert shop.open().listing() == []


def tensors(**changes: Any) -> dict[str, Any]:
    good = {
        "head.weight": np.zeros((2, MODEL.width), np.float32),
        "head.bias": np.zeros(2, np.float32),
        "prompts.2": np.zeros((MODEL.layers, 2, MODEL.width), np.float32),
    }
    changed = good | {name.replace("_", "."): value for name, value in changes.items()}
    return {name: value for name, value in changed.items() if value is not None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_bias": None}, "head.bias is missing"),
        (
            {"head_weight": np.zeros((3, 8), np.float32)},
            "head.weight is 3 x 8; this model and .* need 2 x 8",
        ),
        ({"prompts_2": np.zeros((3, 4, 8), np.float32)}, "prompts.2 is 3 x 4 x 8"),
        ({"prompts_2": np.zeros((4, 2, 8), np.float32)}, "need 3 x 2 x 8"),
        ({"prompts_2": np.zeros((3, 2, 16), np.float32)}, "prompts.2"),
        ({"prompts_0": np.zeros((3, 0, 8), np.float32)}, "unknown tensor 'prompts.0'"),
        ({"prompts_9999": np.zeros((3, 1, 8), np.float32)}, "unknown tensor"),
        ({"backdoor": np.zeros(1, np.float32)}, "unknown tensor 'backdoor'"),
        ({"head_bias": np.zeros(2, np.float64)}, "it must be float32"),
        ({"head_bias": np.array([0, np.nan], np.float32)}, "NaN"),
    ],
)
def test_weights_that_do_not_fit_the_model_are_refused(shop: Shop, changes: dict[str, Any], message: str) -> None:
    registry = shop.open()
    with pytest.raises(InvalidInput, match=message):
        registry.register(SPEC, shop.file(safetensors.numpy.save(tensors(**changes))), 1.0)
    assert (registry.listing(), shop.artefact_names()) == ([], [])


@pytest.mark.parametrize("data", [b"", b"\x80\x04pickle", b"\xff" * 64, weights().to_bytes()[:-5]])
def test_what_is_no_safetensors_file_is_refused(shop: Shop, data: bytes) -> None:
    with pytest.raises(InvalidInput, match="not a safetensors file"):
        shop.open().register(SPEC, shop.file(data), 1.0)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"classes": ("one",)}, InvalidInput),
        ({"classes": ("a", "a")}, InvalidInput),
        ({"classes": ("a", "")}, InvalidInput),
        ({"classes": tuple(map(str, range(1_001)))}, TooLarge),
        ({"prompt_mode": "shallow"}, InvalidInput),
        ({"accuracy": {0: float("nan")}}, InvalidInput),
        ({"accuracy": {0: 1.2}}, InvalidInput),
        ({"accuracy": {-5_000: 0.1}}, TooLarge),
        ({"default_latency_s": float("inf")}, InvalidInput),
        ({"default_latency_s": -1.0}, InvalidInput),
        ({"default_utility": float("nan")}, InvalidInput),
    ],
)
def test_a_description_that_cannot_be_is_refused(change: dict[str, Any], error: type[IsthmusError]) -> None:
    with pytest.raises(error):
        dataclasses.replace(SPEC, **change)


@pytest.mark.parametrize("name", ["", "../x", "a b", "x" * 65, "a\n"])
def test_a_name_that_is_no_name_is_refused(shop: Shop, name: str) -> None:
    with pytest.raises(InvalidInput, match="task"):
        shop.open().register(dataclasses.replace(SPEC, name=name), shop.file(weights().to_bytes()), 1.0)


def test_one_task_too_many_leaves_nothing_behind(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isthmus.cloud.elastic.serve.registry.MAX_TASKS", 1)
    registry = shop.open()
    registry.register(SPEC, shop.file(weights(seed=1).to_bytes()), 1.0)
    kept = shop.artefact_names()
    with pytest.raises(Busy, match="1 tasks are registered already"):
        registry.register(dataclasses.replace(SPEC, name="more"), shop.file(weights(seed=2).to_bytes()), 2.0)
    assert shop.artefact_names() == kept
    registry.register(SPEC, shop.file(weights(seed=3).to_bytes()), 3.0)
    assert MAX_TASKS >= 1


def test_a_full_disk_registers_nothing(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = shop.open()
    data = weights().to_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("shutil.copyfileobj", full)
    with pytest.raises(StorageFull):
        registry.register(SPEC, shop.file(data), 1.0)
    assert (registry.listing(), shop.open().listing()) == ([], [])


def test_accuracy_is_as_measured_else_between_else_of_the_others() -> None:
    gammas = (-8, -4, -2, 0, 2, 4)
    task = Task(SPEC, weights())
    assert expected_accuracy(task, gammas, []) == pytest.approx({-8: 0.5, -4: 0.5, -2: 0.7, 0: 0.9, 2: 0.95, 4: 0.0})
    unmeasured = Task(dataclasses.replace(SPEC, accuracy={}), weights(gammas=()))
    others = [{-8: 0.2, 0: 0.8}, {-8: 0.4, 0: 1.0}]
    found = expected_accuracy(unmeasured, gammas, others)
    assert found == pytest.approx({-8: 0.3, -4: 0.6, -2: 0.75, 0: 0.9, 2: 0.0, 4: 0.0})
    alone = expected_accuracy(unmeasured, gammas, [])
    assert alone[-8] < alone[-4] < alone[0] == 1
    assert alone[2] == 0


EXPERTS = ExpertsShape(layers=2, experts=4, k=2)
WITH_EXPERTS = dataclasses.replace(MODEL, experts=EXPERTS)


def routed() -> TaskWeights:
    return dataclasses.replace(weights(), router=TaskRouter.blank(EXPERTS, MODEL.width))


def test_a_router_is_kept_with_its_task() -> None:
    given = routed()
    again = TaskWeights.from_bytes(given.to_bytes(), classes=2, model=WITH_EXPERTS)
    assert given.router is not None and again.router is not None
    np.testing.assert_array_equal(again.router.weight_MDE, given.router.weight_MDE)
    np.testing.assert_array_equal(again.router.bias_ME, given.router.bias_ME)
    assert (again.router.first, again.router.count) == (0, 4)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"router.weight": None}, "router.weight is missing; this server's model has experts"),
        ({"router.bias": None}, "router.bias is missing"),
        ({"router.weight": np.zeros((2, 9, 4), np.float32)}, "router.weight is 2 x 9 x 4.*need 2 x 8 x 4"),
        ({"router.weight": np.zeros((2, 8, 4), np.float64)}, "is float64; it must be float32"),
        ({"router.weight": np.full((2, 8, 4), np.nan, np.float32)}, "router.weight holds NaN"),
        ({"router.bias": np.full((2, 4), -np.inf, np.float32)}, "router.bias holds NaN or infinity"),
        ({"router.window": np.array([3, 2])}, "names 2 experts from 3 on; this model has 4"),
        ({"router.window": np.array([-1, 2])}, "names 2 experts from -1 on"),
        ({"router.window": np.array([0, 0])}, "names 0 experts"),
    ],
)
def test_a_router_that_does_not_fit_is_refused_by_name(changes: dict[str, Any], why: str) -> None:
    tensors = {**routed().tensors(), **changes}
    data = safetensors.numpy.save({name: value for name, value in tensors.items() if value is not None})
    with pytest.raises(InvalidInput, match=why):
        TaskWeights.from_bytes(data, classes=2, model=WITH_EXPERTS)


def test_a_router_for_a_model_without_experts_is_refused() -> None:
    with pytest.raises(InvalidInput, match="this server's model has none"):
        TaskWeights.from_bytes(routed().to_bytes(), classes=2, model=MODEL)


def test_levels_with_fewer_experts_are_estimated_only_if_some_were_measured() -> None:
    levels = (-10_004, -10_000, -4, 0)
    measured = dataclasses.replace(SPEC, accuracy={-4: 0.5, 0: 0.9})
    found = expected_accuracy(Task(measured, routed()), levels, [])
    assert found == {-10_004: 0.0, -10_000: 0.0, -4: 0.5, 0: 0.9}
    one_more = dataclasses.replace(SPEC, accuracy={-4: 0.5, 0: 0.9, -10_000: 0.8})
    assert expected_accuracy(Task(one_more, routed()), levels, [])[-10_004] == 0.8
    nothing = expected_accuracy(Task(dataclasses.replace(SPEC, accuracy={}), routed()), levels, [])
    assert nothing == {-10_004: 0.0, -10_000: 0.0, -4: 0.96, 0: 1.0}
