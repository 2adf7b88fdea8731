"""A replay in real time: the real model runs every batch, on labelled pictures."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from isthmus.cloud.elastic.executors.opening import Opening, opened
from isthmus.cloud.elastic.executors.process import ProcessExecutor
from isthmus.cloud.elastic.model.executor import Executor, Item, ModelExecutor
from isthmus.cloud.elastic.prepare.inputs import pictures_of
from isthmus.cloud.elastic.prepare.precision import named
from isthmus.cloud.elastic.prepare.profiler import machine_key
from isthmus.cloud.elastic.scheduling.engine import Work
from isthmus.cloud.elastic.scheduling.profile import Profile
from isthmus.cloud.elastic.scheduling.query import Query
from isthmus.cloud.elastic.scheduling.simulate import TICK_S
from isthmus.cloud.elastic.tasks.files import load_tasks
from isthmus.cloud.elastic.tasks.task import Task
from isthmus.cloud.elastic.warm.models import WarmExecutor, WarmModels
from isthmus.data.images import USUAL_COLUMNS, Columns, LabelledImages

WARM_UP_SIZES = (1, 64)


@dataclass(frozen=True, eq=False)
class LiveTask:
    """A task, and the labelled pictures that its queries ask about."""

    task: Task
    labelled: LabelledImages


class LiveWorld:
    """The world of ``simulate.serve`` with a real clock and a real executor.

    Query i asks about picture i of its task, modulo the number of pictures. With ``others`` it has several executors,
    and ``traced.serve_at_once`` serves in it.
    """

    def __init__(
        self,
        executor: Executor,
        tasks: Mapping[str, LiveTask],
        *,
        others: Sequence[Executor] = (),
        warm: WarmModels | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._executor = executor
        self.executors = (executor, *others)
        self._tasks = tasks
        self.warm = warm
        self._clock = clock
        self._sleep = sleep
        self._began_s = clock()

    def begin(self, gammas: Sequence[int]) -> None:
        """Waits for the warmed models that are announced first, runs a small and a full batch of every task at every
        gamma, then sets the clock to 0."""
        if self.warm is not None:
            self.warm.wait()
        for asked in self._tasks.values():
            for size in WARM_UP_SIZES:
                items = [Item(asked.labelled.pictures_NHWC[at % len(asked.labelled)], asked.task) for at in range(size)]
                for gamma in gammas:
                    for executor in self.executors:
                        executor.run(items, gamma)
        self._began_s = self._clock()

    def now_s(self) -> float:
        return self._clock() - self._began_s

    def wait(self, until_s: float) -> None:
        self._sleep(max(TICK_S, until_s - self.now_s()))  # rounding may leave less than the clock's smallest step

    def asked(self, query: Query) -> tuple[Item, int]:
        """Returns what a query asks about, and the right label."""
        asked = self._tasks[query.task]
        place = query.id % len(asked.labelled)
        return Item(asked.labelled.pictures_NHWC[place], asked.task), int(asked.labelled.labels_N[place])

    def run(self, work: Work) -> list[bool | None]:
        items: list[Item] = []
        labels: list[int] = []
        for query in work.batch.queries:
            item, label = self.asked(query)
            items.append(item)
            labels.append(label)
        logits = self._executor.run(items, work.gamma)
        return [bool(logits_C.argmax() == label) for logits_C, label in zip(logits, labels, strict=True)]


def open_live(
    profile: Profile,
    *,
    model: str,
    tasks: Path,
    data: Path,
    pixels: str | None,
    device: str,
    limit: int | None,
    seed: int,
    warm: Path | None = None,
    warm_bytes: int | None = None,
    columns: Columns = USUAL_COLUMNS,
    executors: int = 1,
    kind: Literal["thread", "process"] = "thread",
) -> tuple[LiveWorld, Profile, tuple[str, ...]]:
    """Returns the world, the profile with only the tasks of the folder, and the differences from the profiled machine.

    Torch gets the number of threads that the profile was measured with. Pictures are chosen at random. Several
    executors run in threads or processes (``kind``).
    Raises ValueError if the profile has none of the tasks or an unknown number type, and the ValueError and OSError of
    loading model, tasks and pictures.
    """
    number_type = named(profile.key.number_type)
    if number_type is None:
        raise ValueError(f"the profile was measured in number type {profile.key.number_type!r}, which is unknown here")
    if profile.key.device == "cpu" and profile.key.threads > 0:
        torch.set_num_threads(profile.key.threads)
    opening = Opening(
        source=model,
        pixels=pixels,
        device=device,
        number_type=number_type,
        packed=warm is None,
        threads=max(1, profile.key.threads),
        schedules=profile.schedules,
        merge_order=profile.merge_order,
    )
    runner = opened(opening)
    pixel, shape = runner.pixels, runner.model.shape
    labelled = pictures_of(data, pixel, limit, seed, columns)
    found = {
        one.spec.name: LiveTask(Task(one.spec, one.weights), one.recipe.apply(labelled))
        for one in load_tasks(tasks, shape)
        if one.spec.name in profile.accuracy
    }
    if not found:
        raise ValueError(
            f"{tasks.name} holds none of the profile's tasks: {', '.join(profile.accuracy) or 'it has none'}"
        )
    for task in profile.accuracy.keys() - found.keys():
        profile = profile.without_task(task)
    differences = profile.key.differences(machine_key(runner))
    if kind == "process":
        processes = [ProcessExecutor(opening, pixel) for _ in range(executors)]
        for process in processes:
            process.start()
        for process in processes:
            process.restore()
        return LiveWorld(processes[0], found, others=processes[1:]), profile, differences
    base = ModelExecutor(runner, pixel)
    warmed = None if warm is None else WarmModels(warm, runner, limit_bytes=warm_bytes)
    executor = base if warmed is None else WarmExecutor(base, warmed, profile.gammas)
    others = [ModelExecutor(opened(opening), pixel) for _ in range(executors - 1)]
    return LiveWorld(executor, found, others=others, warm=warmed), profile, differences
