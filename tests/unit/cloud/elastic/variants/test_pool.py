"""Executors of model variants load and drop models as the simulator does, within their memory."""

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.cloud.elastic.model.executor import Item
from isthmus.cloud.elastic.policies.infaas import ModelSize, loading_executor
from isthmus.cloud.elastic.scheduling.engine import Work
from isthmus.cloud.elastic.scheduling.query import Batch, Query
from isthmus.cloud.elastic.tasks.task import Task, TaskSpec, TaskWeights
from isthmus.cloud.elastic.variants.pool import Memory, Pool
from isthmus.data.images import PixelSpec

SIZES = (ModelSize(-1, 10, 0.1), ModelSize(0, 30, 0.3), ModelSize(1, 90, 0.9))
NAMES = ("a", "b", "c")
HEAD = TaskWeights(np.zeros((2, 1), np.float32), np.zeros(2, np.float32), {})
TASKS = {name: Task(TaskSpec(name, ("no", "yes")), HEAD) for name in NAMES}
PIXELS = PixelSpec(2, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


class Model:
    """A model that answers with its own task and level."""

    def __init__(self, name: str, level: int) -> None:
        self.runner, self.task, self.pixels, self._answer = self, None, PIXELS, (NAMES.index(name), level)

    def answer(self, images: Any, gamma: int, tasks: Sequence[Any]) -> list[Any]:
        assert gamma == 0
        return [np.array(self._answer, np.float32)] * len(images)


class Disk:
    """Opens models, counts how many bytes of them are alive, and fails for those in ``broken``."""

    def __init__(self) -> None:
        self.opened: list[tuple[str, int]] = []
        self.broken: set[tuple[str, int]] = set()

    def open(self, name: str, level: int) -> Any:
        if (name, level) in self.broken:
            raise OSError("cannot be read")
        self.opened.append((name, level))
        return Model(name, level)


def items(name: str, count: int = 1) -> list[Item]:
    return [Item(np.zeros((2, 2, 3), np.uint8), TASKS[name])] * count


@given(
    st.lists(st.tuples(st.sampled_from(NAMES), st.sampled_from((-1, 0, 1))), max_size=40),
    st.integers(60, 400),
    st.integers(1, 3),
)
def test_the_same_batches_load_the_same_models_as_in_the_simulator(
    batches: list[tuple[str, int]], memory_bytes: int, executors: int
) -> None:
    disks = [Disk() for _ in range(executors)]
    clock_s = [0.0]
    memories = [Memory(SIZES, NAMES, memory_bytes, disk.open) for disk in disks]
    pool = Pool(memories, clock=lambda: clock_s[0])
    takes_s = loading_executor(SIZES, memory_bytes, NAMES, executors)
    at_first = sum(len(disk.opened) for disk in disks)
    loads = 0
    for number, (name, level) in enumerate(batches):
        clock_s[0] += 10.0
        started_s = clock_s[0]
        query = Query(number, name, started_s, 1.0, 1.0)
        simulated_s = takes_s(Work(number, Batch((query,)), level, started_s, 1.0))
        clock_s[0] += simulated_s
        (answer,) = pool.executors[number % executors].run(items(name), level)
        assert answer.tolist() == [NAMES.index(name), level], "the task's own model of this size"
        loads += simulated_s > 1.0
        assert pool.loads == loads == sum(len(disk.opened) for disk in disks) - at_first
        for memory in memories:
            held = sum({size.level: size.memory_bytes for size in SIZES}[each[1]] for each in memory._models)
            assert held == memory.bytes <= max(memory_bytes, 90)
    assert pool.bytes == sum(memory.bytes for memory in memories)


def test_a_model_that_cannot_be_loaded_fails_its_batch_and_no_other() -> None:
    disk = Disk()
    memory = Memory(SIZES, (), 120, disk.open)
    memory.run(items("a"), 0)
    disk.broken.add(("b", 1))
    with pytest.raises(OSError, match="cannot be read"):
        memory.run(items("b"), 1)
    assert not memory.holds("b", 1) and memory.bytes == 30
    memory.run(items("a"), 0)
    disk.broken.clear()
    memory.run(items("b"), 1)
    assert (memory.loads, memory.bytes) == (2, 120)


def test_a_batch_of_two_tasks_is_refused() -> None:
    with pytest.raises(ValueError, match="holds one task"):
        Memory(SIZES, (), 120, Disk().open).run([*items("a"), *items("b")], 0)


def test_two_batches_of_one_model_run_at_once_on_two_executors() -> None:
    disk, inside, go = Disk(), threading.Barrier(3), threading.Event()

    class Slow(Model):
        def answer(self, images: Any, gamma: int, tasks: Sequence[Any]) -> list[Any]:
            inside.wait(60)
            assert go.wait(60)
            return super().answer(images, gamma, tasks)

    pool = Pool([Memory(SIZES, (), 120, lambda name, level: Slow(name, level)) for _ in range(2)])  # type: ignore[arg-type,return-value]
    threads = [threading.Thread(target=executor.run, args=(items("a"), 0)) for executor in pool.executors]
    for thread in threads:
        thread.start()
    inside.wait(60)
    go.set()
    for thread in threads:
        thread.join(60)
    assert pool.loads == 2 and not disk.opened
