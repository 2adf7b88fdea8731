"""A replay in real time: the real model runs every batch, on labelled pictures."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from isthmus.cloud.elastic.model.executor import Executor, Item, ModelExecutor
from isthmus.cloud.elastic.model.runner import ElasticRunner
from isthmus.cloud.elastic.model.vit import ElasticViT
from isthmus.cloud.elastic.model.weights import load_vit, pixel_spec
from isthmus.cloud.elastic.prepare.inputs import pictures_of
from isthmus.cloud.elastic.prepare.precision import named
from isthmus.cloud.elastic.prepare.profiler import machine_key
from isthmus.cloud.elastic.scheduling.engine import Work
from isthmus.cloud.elastic.scheduling.profile import Profile
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

    Query i asks about picture i of its task, modulo the number of pictures.
    """

    def __init__(
        self,
        executor: Executor,
        tasks: Mapping[str, LiveTask],
        *,
        warm: WarmModels | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._executor = executor
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
                    self._executor.run(items, gamma)
        self._began_s = self._clock()

    def now_s(self) -> float:
        return self._clock() - self._began_s

    def wait(self, until_s: float) -> None:
        self._sleep(max(TICK_S, until_s - self.now_s()))  # rounding may leave less than the clock's smallest step

    def run(self, work: Work) -> list[bool | None]:
        items: list[Item] = []
        labels: list[int] = []
        for query in work.batch.queries:
            asked = self._tasks[query.task]
            place = query.id % len(asked.labelled)
            items.append(Item(asked.labelled.pictures_NHWC[place], asked.task))
            labels.append(int(asked.labelled.labels_N[place]))
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
) -> tuple[LiveWorld, Profile, tuple[str, ...]]:
    """Returns the world, the profile with only the tasks of the folder, and the differences from the profiled machine.

    Torch gets the number of threads that the profile was measured with. Pictures are chosen at random.
    Raises ValueError if the profile has none of the tasks or an unknown number type, and the ValueError and OSError of
    loading model, tasks and pictures.
    """
    number_type = named(profile.key.number_type)
    if number_type is None:
        raise ValueError(f"the profile was measured in number type {profile.key.number_type!r}, which is unknown here")
    if profile.key.device == "cpu" and profile.key.threads > 0:
        torch.set_num_threads(profile.key.threads)
    vit = load_vit(model)
    elastic = ElasticViT(vit, profile.schedules, merge_order=profile.merge_order)
    pixel = pixel_spec(vit, model, pixels)
    runner = ElasticRunner(elastic, pixel, device=device, number_type=number_type, packed=warm is None)
    labelled = pictures_of(data, pixel, limit, seed, columns)
    found = {
        one.spec.name: LiveTask(Task(one.spec, one.weights), one.recipe.apply(labelled))
        for one in load_tasks(tasks, elastic.shape)
        if one.spec.name in profile.accuracy
    }
    if not found:
        raise ValueError(
            f"{tasks.name} holds none of the profile's tasks: {', '.join(profile.accuracy) or 'it has none'}"
        )
    for task in profile.accuracy.keys() - found.keys():
        profile = profile.without_task(task)
    base = ModelExecutor(runner, pixel)
    warmed = None if warm is None else WarmModels(warm, runner, limit_bytes=warm_bytes)
    executor = base if warmed is None else WarmExecutor(base, warmed, profile.gammas)
    return LiveWorld(executor, found, warm=warmed), profile, profile.key.differences(machine_key(runner))
