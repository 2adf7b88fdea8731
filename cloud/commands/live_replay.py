"""A replay in real time: the real model runs every batch, on pictures whose labels are known."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from isthmus.cloud.elastic.model.runner import ElasticRunner, ServedTask
from isthmus.cloud.elastic.model.vit import ElasticViT
from isthmus.cloud.elastic.model.weights import load_vit, pixel_spec
from isthmus.cloud.elastic.prepare.inputs import pictures_of
from isthmus.cloud.elastic.prepare.precision import named
from isthmus.cloud.elastic.prepare.profiler import machine_key
from isthmus.cloud.elastic.scheduling.engine import Work
from isthmus.cloud.elastic.scheduling.profile import Profile
from isthmus.cloud.elastic.scheduling.simulate import TICK_S
from isthmus.cloud.elastic.tasks.files import load_tasks
from isthmus.cloud.elastic.tasks.task import FloatArray, ModelShape
from isthmus.cloud.elastic.warm.models import WarmModels
from isthmus.data.images import LabelledImages, Pictures

WARM_UP_SIZES = (1, 64)


@dataclass(frozen=True, eq=False)
class LiveTask:
    """What a task's queries ask about, and what answers them."""

    served: ServedTask
    labelled: LabelledImages
    warmed: bool = False


class LiveWorld:
    """The world of ``simulate.serve`` with a real clock and a real model. Query i asks about the i-th picture of its
    task, counted round."""

    def __init__(
        self,
        runner: ElasticRunner,
        tasks: Mapping[str, LiveTask],
        *,
        warm: WarmModels | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._runner = runner
        self._tasks = tasks
        self.warm = warm
        self._gammas: tuple[int, ...] = ()
        self._clock = clock
        self._sleep = sleep
        self._began_s = clock()

    def begin(self, gammas: Sequence[int]) -> None:
        """Runs a small and a full batch of every task at every gamma, then sets the clock to 0. Of warmed models those
        are loaded that are needed first."""
        self._gammas = tuple(gammas)
        if self.warm is not None:
            self.warm.announce_near(0, self._gammas)
            self.warm.wait()
        for task in self._tasks.values():
            for size in WARM_UP_SIZES:
                pictures_NHWC = np.resize(task.labelled.pictures_NHWC, (size, *task.labelled.pictures_NHWC.shape[1:]))
                for gamma in gammas:
                    self._answers(pictures_NHWC, gamma, [task] * size)
        self._began_s = self._clock()

    def now_s(self) -> float:
        return self._clock() - self._began_s

    def wait(self, until_s: float) -> None:
        self._sleep(max(TICK_S, until_s - self.now_s()))  # a clock's rounding may leave less than it can be moved by

    def run(self, work: Work) -> list[bool | None]:
        asked = [(self._tasks[query.task], query.id) for query in work.batch.queries]
        places = [id % len(task.labelled) for task, id in asked]
        pictures = [task.labelled.pictures_NHWC[place] for (task, _), place in zip(asked, places, strict=True)]
        logits = self._answers(np.stack(pictures), work.gamma, [task for task, _ in asked])
        return [
            bool(logits_C.argmax() == task.labelled.labels_N[place])
            for logits_C, (task, _), place in zip(logits, asked, places, strict=True)
        ]

    def _answers(self, pictures_NHWC: Pictures, gamma: int, tasks: Sequence[LiveTask]) -> list[FloatArray]:
        """As elastic serving does it: the warmed task on warmed models, all others on the model itself."""
        answers: dict[int, FloatArray] = {}
        warmed = [index for index, task in enumerate(tasks) if task.warmed and gamma <= 0]
        if self.warm is not None and warmed:
            answers = dict(zip(warmed, self.warm.answer(pictures_NHWC[warmed], gamma) or (), strict=False))
            self.warm.announce_near(gamma, self._gammas)
        rest = [index for index in range(len(tasks)) if index not in answers]
        if rest:
            able = gamma if self.warm is None or self.warm.common.reducer == "merging" else max(gamma, 0)
            found = self._runner.answer(pictures_NHWC[rest], able, [tasks[index].served for index in rest])
            answers |= dict(zip(rest, found, strict=True))
        return [answers[index] for index in range(len(tasks))]


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
) -> tuple[LiveWorld, Profile, tuple[str, ...]]:
    """The world, the profile with just the tasks that the folder holds, and what differs from the machine it was
    measured on. Torch gets the threads that the profile was measured with; pictures are chosen by chance.

    Raises ValueError where the profile knows none of the tasks, or was measured with a number type there is not;
    and what loading model, tasks and pictures raises: ValueError, OSError.
    """
    number_type = named(profile.key.number_type)
    if number_type is None:
        raise ValueError(f"the profile was measured in {profile.key.number_type!r}, which cannot be run here")
    if profile.key.device == "cpu" and profile.key.threads > 0:
        torch.set_num_threads(profile.key.threads)
    vit = load_vit(model)
    elastic = ElasticViT(vit, profile.schedules)
    pixel = pixel_spec(vit, model, pixels)
    runner = ElasticRunner(elastic, pixel, device=device, number_type=number_type, packed=warm is None)
    labelled = pictures_of(data, elastic, limit, seed)
    warmed = None if warm is None else WarmModels(warm, runner, limit_bytes=warm_bytes)
    found = {
        one.spec.name: LiveTask(
            runner.prepare(one.weights, one.spec.prompt_mode),
            one.recipe.apply(labelled),
            warmed is not None and warmed.fits(one.spec.name, one.spec.classes),
        )
        for one in load_tasks(tasks, ModelShape(elastic.depth, elastic.width, elastic.image_px))
        if one.spec.name in profile.accuracy
    }
    if not found:
        raise ValueError(f"{tasks.name} holds no task that the profile knows: {', '.join(profile.accuracy) or 'none'}")
    for task in profile.accuracy.keys() - found.keys():
        profile = profile.without_task(task)
    return LiveWorld(runner, found, warm=warmed), profile, profile.key.differences(machine_key(runner))
