"""Tasks that come with a profiling set: the server measures their accuracy by itself, between queries."""

import asyncio
import json
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import safetensors.numpy

from isthmus.cloud.elastic.model.executor import Item, ModelExecutor
from isthmus.cloud.elastic.serve.measuring import Measurer
from isthmus.cloud.elastic.tasks.task import (
    PROFILING_LABELS,
    PROFILING_PICTURES,
    Measured,
    ModelShape,
    Task,
    TaskSpec,
    TaskWeights,
    expected_accuracy,
    profiling_of,
    with_profiling,
)
from isthmus.data.images import LabelledImages
from isthmus.proto.errors import InvalidInput, TooLarge
from isthmus.proto.v1 import elastic_pb2 as pb
from isthmus.proto.v1 import elastic_pb2_grpc as pb_grpc
from tests.rigs.elastic.server import DEPTH, SIDE, THREE, WIDTH, ElasticRig, Made, pixels, png, refusal, tiny_profile
from tests.rigs.project.patience import HANGS_S

SHAPE = ModelShape(DEPTH, WIDTH, SIDE)
TEN = THREE[0]


def varied(rig: ElasticRig) -> Made:
    """A task whose answers to random pictures differ. A random head answers nearly all of them alike."""
    logits_NC = np.stack([rig.direct(TEN, pixels(seed), 0) for seed in range(40)])
    weights = replace(TEN.weights, head_bias_C=TEN.weights.head_bias_C - logits_NC.mean(axis=0))
    return Made(TEN.spec, weights)


def set_of(rig: ElasticRig, made: Made, count: int, *, poisoned: bool = False) -> LabelledImages:
    """Pictures labelled as the model answers them at gamma 0; poisoned: each with another label than that."""
    pictures = np.stack([pixels(seed) for seed in range(count)])
    answers = np.array([int(rig.direct(made, picture, 0).argmax()) for picture in pictures])
    classes = len(made.spec.classes)
    return LabelledImages(pictures, (answers + 1) % classes if poisoned else answers)


async def measured(stub: Any, name: str) -> pb.RegisteredTask:
    async with asyncio.timeout(HANGS_S):
        while True:
            listed = (await stub.ListTasks(pb.ListTasksRequest())).tasks
            (task,) = [one for one in listed if one.description.name == name]
            if task.HasField("measured"):
                return task
            await asyncio.sleep(0.02)


def test_the_server_measures_and_keeps_it_over_a_restart(rig: ElasticRig) -> None:
    made = varied(rig)
    data = with_profiling(made.weights.to_bytes(), set_of(rig, made, 40))

    async def scenario() -> tuple[pb.RegisteredTask, pb.RegisteredTask]:
        async with rig.running() as (_, channel):
            stub = pb_grpc.ElasticServiceStub(channel)
            registered = (await stub.RegisterTask(made.messages(data))).task
            assert not registered.HasField("measured") and registered.description.accuracy[0] == 0.8
            first = await measured(stub, "ten")
            reply = await stub.MakeQuery(pb.MakeQueryRequest(task="ten", encoded=png(pixels(0)), min_accuracy=0.99))
            assert first.measured.accuracy[reply.gamma] >= 0.99
        async with rig.running() as (_, channel):
            return first, await measured(pb_grpc.ElasticServiceStub(channel), "ten")

    first, again = asyncio.run(scenario())
    assert first == again and first.measured.used and first.measured.pictures == 40
    assert set(first.measured.accuracy) == {-4, 0, 2} and first.measured.accuracy[0] == 1.0
    assert first.description.accuracy[0] == 0.8, "the owner's own figure stays visible"


def test_poisoned_labels_are_shown_and_not_used(rig: ElasticRig) -> None:
    made = varied(rig)
    data = with_profiling(made.weights.to_bytes(), set_of(rig, made, 40, poisoned=True))

    async def scenario() -> pb.RegisteredTask:
        async with rig.running() as (_, channel):
            stub = pb_grpc.ElasticServiceStub(channel)
            await stub.RegisterTask(made.messages(data))
            return await measured(stub, "ten")

    task = asyncio.run(scenario())
    assert task.measured.accuracy[0] == 0.0 and not task.measured.used


def test_a_registration_that_is_taken_back_while_it_measures_leaves_nothing_behind(
    rig: ElasticRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, other = varied(rig), Made(replace(TEN.spec, name="other"), varied(rig).weights)
    labelled = set_of(rig, made, 40)
    measuring, go = threading.Event(), threading.Event()
    run = ModelExecutor.run

    def held(self: ModelExecutor, items: Sequence[Item], gamma: int) -> list[Any]:
        measuring.set()
        assert go.wait(HANGS_S)
        return run(self, items, gamma)

    monkeypatch.setattr(ModelExecutor, "run", held)

    async def scenario() -> pb.RegisteredTask:
        async with rig.running() as (_, channel):
            stub = pb_grpc.ElasticServiceStub(channel)
            await stub.RegisterTask(made.messages(with_profiling(made.weights.to_bytes(), labelled)))
            assert await asyncio.to_thread(measuring.wait, HANGS_S)
            await stub.RemoveTask(pb.RemoveTaskRequest(name="ten"))
            go.set()
            await stub.RegisterTask(other.messages(with_profiling(other.weights.to_bytes(), labelled)))
            found = await measured(stub, "other")
            assert [task.description.name for task in (await stub.ListTasks(pb.ListTasksRequest())).tasks] == ["other"]
        async with rig.running() as (_, channel):
            again = (await pb_grpc.ElasticServiceStub(channel).ListTasks(pb.ListTasksRequest())).tasks
            assert [task.description.name for task in again] == ["other"]
        return found

    assert asyncio.run(scenario()).measured.pictures == 40


def test_a_registration_whose_caller_leaves_in_mid_upload_registers_nothing(rig: ElasticRig) -> None:
    made = varied(rig)
    labelled = set_of(rig, made, 40)
    data = with_profiling(made.weights.to_bytes(), labelled)

    async def scenario() -> None:
        async with rig.running() as (_, channel):
            stub = pb_grpc.ElasticServiceStub(channel)
            sent = asyncio.Event()

            async def half() -> Any:
                messages = list(made.messages(data))
                for message in messages[:-1]:
                    yield message
                while not any((rig.folder / "state" / "scratch").glob("*")):  # the server has begun to keep it
                    await asyncio.sleep(0.01)
                sent.set()
                await asyncio.Event().wait()

            call = stub.RegisterTask(half())
            await asyncio.wait_for(sent.wait(), HANGS_S)
            call.cancel()
            scratch = rig.folder / "state" / "scratch"
            while any(scratch.glob("*")):
                await asyncio.sleep(0.01)
            assert not (await stub.ListTasks(pb.ListTasksRequest())).tasks
            one_class = LabelledImages(labelled.pictures_NHWC, np.zeros(40, np.int64))
            refused = made.messages(with_profiling(made.weights.to_bytes(), one_class))
            status, said = await refusal(stub.RegisterTask(refused))
            assert status is grpc.StatusCode.INVALID_ARGUMENT and "all pictures are of one class" in said
            assert not (await stub.ListTasks(pb.ListTasksRequest())).tasks
            assert (await stub.RegisterTask(made.messages(data))).task.version == 1

    asyncio.run(scenario())


@pytest.fixture
def rig(tmp_path: Path) -> ElasticRig:
    return ElasticRig(tmp_path)


def test_measured_comes_before_the_owners_figures_only_if_it_is_credible() -> None:
    spec = TaskSpec("t", ("a", "b"), accuracy={-4: 0.9, 0: 0.95})
    weights = TaskWeights(np.zeros((2, WIDTH), np.float32), np.zeros(2, np.float32), {})
    for found, expected in (
        (None, {-4: 0.9, 0: 0.95}),
        (Measured({-4: 0.6, 0: 0.8}, 100, 0.5), {-4: 0.6, 0: 0.8}),
        (Measured({-4: 0.5, 0: 0.59}, 100, 0.5), {-4: 0.9, 0: 0.95}),  # within two standard errors of chance
    ):
        told = TaskSpec("t", ("a", "b"), accuracy=spec.accuracy, measured=found)
        assert expected_accuracy(Task(told, weights), (-4, 0), []) == expected
        assert TaskSpec.from_json(told.to_json()) == told
    old = json.loads(spec.to_json())
    del old["measured"]
    assert TaskSpec.from_json(json.dumps(old)) == spec


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({PROFILING_LABELS: np.zeros(4, np.int64)}, InvalidInput, "all pictures are of one class"),
        ({PROFILING_LABELS: np.array([0, 1, 2, 10])}, InvalidInput, "labels must be from 0 to 9"),
        ({PROFILING_LABELS: np.array([0, 1, 2, -1])}, InvalidInput, "labels must be from 0 to 9"),
        ({PROFILING_LABELS: np.arange(3)}, InvalidInput, "labels are 3 int64; one int64 per picture"),
        ({PROFILING_LABELS: np.zeros(4, np.float32)}, InvalidInput, "labels are 4 float32"),
        ({PROFILING_LABELS: None}, InvalidInput, "belong together"),
        ({PROFILING_PICTURES: np.zeros((4, 8, 8, 3), np.uint8)}, InvalidInput, "this model needs N x 16 x 16 x 3"),
        ({PROFILING_PICTURES: np.zeros((4, 16, 16, 3), np.float32)}, InvalidInput, "4 x 16 x 16 x 3 float32"),
        ({PROFILING_PICTURES: np.zeros((10_001, 16, 16, 3), np.uint8)}, TooLarge, "at most 10000 are accepted"),
    ],
)
def test_wrong_sets_are_refused(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    right = {PROFILING_PICTURES: np.zeros((4, SIDE, SIDE, 3), np.uint8), PROFILING_LABELS: np.arange(4)}
    tensors = {name: value for name, value in {**right, **changes}.items() if value is not None}
    data = safetensors.numpy.save({**safetensors.numpy.load(TEN.weights.to_bytes()), **tensors})
    TaskWeights.from_bytes(data, classes=10, model=SHAPE)
    with pytest.raises(error, match=message):
        profiling_of(data, classes=10, model=SHAPE)


class Slow:
    """An executor that answers class 0, and lets a test decide what happens meanwhile."""

    def __init__(self, on_run: Any) -> None:
        self.sizes: list[int] = []
        self._on_run = on_run

    def run(self, items: Sequence[Item], gamma: int) -> list[Any]:
        self.sizes.append(len(items))
        self._on_run(len(self.sizes))
        return [np.array([1.0, 0.0], np.float32) for _ in items]


class FakeRegistry:
    def __init__(self, labelled: LabelledImages) -> None:
        self.labelled, self.current, self.kept = labelled, True, threading.Event()
        self.found: Measured | None = None

    def profiling(self, task: Task) -> LabelledImages | None:
        return self.labelled

    def is_current(self, task: Task) -> bool:
        return self.current

    def measured(self, task: Task, found: Measured) -> bool:
        self.found = found
        self.kept.set()
        return True


def test_it_waits_while_queries_are_there_runs_few_at_a_time_and_ends_with_its_task() -> None:
    weights = TaskWeights(np.zeros((2, WIDTH), np.float32), np.zeros(2, np.float32), {})
    task = Task(TaskSpec("t", ("a", "b")), weights)
    labelled = LabelledImages(np.zeros((20, SIDE, SIDE, 3), np.uint8), np.arange(20) % 4 // 3)
    registry: Any = FakeRegistry(labelled)
    busy = threading.Event()
    busy.set()
    executor = Slow(lambda runs: None)
    # 1 ms for one image and 8 ms for 64: all 20 would fit in 10 ms, so the largest power of two below 20 runs.
    measurer = Measurer(executor, tiny_profile(), lambda: not busy.is_set())
    measurer.ask(task)
    measurer.attach(registry)
    measurer.start()
    time.sleep(0.2)
    assert executor.sizes == []
    busy.clear()
    assert registry.kept.wait(HANGS_S)
    assert executor.sizes == [16, 4] * 2, "at gamma -4 and 0; the task has no prompts"
    assert registry.found == Measured({-4: 0.75, 0: 0.75}, 20, 0.75) and not registry.found.credible
    measurer.stop()

    registry = FakeRegistry(labelled)

    def replaced(runs: int) -> None:
        registry.current = False
        gone.set()

    gone = threading.Event()
    measurer = Measurer(Slow(replaced), tiny_profile(), lambda: True)
    measurer.ask(task)
    measurer.attach(registry)
    measurer.start()
    assert gone.wait(HANGS_S)
    measurer.stop()
    assert registry.found is None
