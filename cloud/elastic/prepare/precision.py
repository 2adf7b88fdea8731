"""Chooses the number type for serving: the fastest on this machine whose accuracy is close to float32's.

bfloat16 doubles the throughput on a processor with bfloat16 units, and may halve it on one without. int8 costs some
accuracy, more with some models than with others. So both are measured.
"""

import copy
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from isthmus.cloud.elastic.model.runner import ElasticRunner, NumberType, ServedTask, runs_onednn
from isthmus.cloud.elastic.model.vit import ElasticViT
from isthmus.cloud.elastic.tasks.router import TaskRouter
from isthmus.cloud.elastic.tasks.task import TaskWeights
from isthmus.data.images import LabelledImages, PixelSpec

NUMBER_TYPES: Final[tuple[NumberType, ...]] = ("float32", "bfloat16", "int8")
HOPELESS: Final = 1.5
"""A number type that takes this many times as long as float32 in a first round is not measured any further."""
MAX_LOSS: Final = 0.005
"""A number type that loses more accuracy than this is not chosen, however fast it is."""


def named(name: str | None) -> NumberType | None:
    """Returns the number type of this name, or None."""
    return next((number_type for number_type in NUMBER_TYPES if number_type == name), None)


def noise(size_px: int, count: int = 32) -> LabelledImages:
    """Makes random pictures, for measurements without real ones."""
    pictures_NHWC = np.random.default_rng(0).integers(0, 256, (count, size_px, size_px, 3), np.uint8)
    return LabelledImages(pictures_NHWC, np.zeros(len(pictures_NHWC), np.int64))


@dataclass(frozen=True)
class Measured:
    """One number type. ``accuracy`` is against the labels or, without labels, the share of float32's answers kept.

    It is NaN for a number type that was too slow to be measured any further.
    """

    number_type: NumberType
    images_per_s: float
    accuracy: float


@dataclass(frozen=True)
class Choice:
    """The chosen number type, and all measurements, float32 first."""

    number_type: NumberType
    measured: tuple[Measured, ...]
    batch: int
    labelled: bool

    def said(self) -> str:
        """Returns one line for a log or a terminal."""
        kind = "accuracy" if self.labelled else "same answers as float32"
        each = "; ".join(
            f"{one.number_type} {one.images_per_s:.4g} images/s, "
            + ("too slow" if math.isnan(one.accuracy) else f"{one.accuracy:.1%} {kind}")
            for one in self.measured
        )
        return f"number type {self.number_type} (at batch {self.batch}: {each})"


def choose(
    model: ElasticViT,
    pixels: PixelSpec,
    pictures: LabelledImages,
    *,
    task: TaskWeights | None = None,
    device: str = "cpu",
    batch: int = 8,
    repeats: int = 5,
    compiler: str | None = None,
    packed: bool = False,
    number_types: Sequence[NumberType] = NUMBER_TYPES,
    clock: Callable[[], float] = time.perf_counter,
) -> Choice:
    """Measures each number type that the device can run, on copies of the model at gamma 0 that take turns.

    With ``task``, the labels of ``pictures`` are its classes, and a number type is judged by accuracy. Without it, a
    number type is judged by how often its answer equals float32's, with the model's own head, or with a random head if
    there is none. ``device``, ``compiler`` and ``packed`` are those of the runner that will serve.
    """
    able = [name for name in number_types if name != "int8" or runs_onednn(device, compiler)]
    types: tuple[NumberType, ...] = ("float32", *(name for name in able if name != "float32"))
    runners = {
        name: ElasticRunner(
            copy.deepcopy(model), pixels, device=device, number_type=name, compiler=compiler, packed=packed
        )
        for name in types
    }
    heads = {name: _head(runner) if task is None else runner.prepare(task) for name, runner in runners.items()}
    took_s: dict[str, list[float]] = {name: [] for name in types}
    some = np.resize(pictures.pictures_NHWC, (batch, *pictures.pictures_NHWC.shape[1:]))
    for repeat in range(repeats + 1):
        for name, runner in runners.items():
            if repeat > 1 and took_s[name][0] > HOPELESS * took_s["float32"][0]:
                continue
            began_s = clock()
            runner.answer(some, 0, [heads[name]] * batch)
            if repeat:
                took_s[name].append(clock() - began_s)
    medians_s = {name: statistics.median(took_s[name]) for name in types}
    answers = {
        name: _answers(runner, heads[name], pictures, batch)
        for name, runner in runners.items()
        if medians_s[name] <= HOPELESS * medians_s["float32"]
    }
    wanted = answers["float32"] if task is None else pictures.labels_N
    measured = tuple(
        Measured(
            name,
            batch / medians_s[name],
            float(np.mean(answers[name] == wanted)) if name in answers else math.nan,
        )
        for name in types
    )
    good = [one for one in measured if one.accuracy >= measured[0].accuracy - MAX_LOSS]
    best = max(good, key=lambda one: one.images_per_s)
    return Choice(best.number_type, measured, batch, task is not None)


def _head(runner: ElasticRunner) -> ServedTask:
    try:
        return runner.own_task()
    except ValueError:
        model = runner.model
        weight_CD = np.random.default_rng(0).standard_normal((10, model.width), np.float32)
        router = TaskRouter.blank(model.experts, model.width) if model.expert_layers else None
        return runner.prepare(TaskWeights(weight_CD, np.zeros(10, np.float32), {}, router))


def _answers(
    runner: ElasticRunner, task: ServedTask, pictures: LabelledImages, batch: int
) -> np.typing.NDArray[np.int64]:
    found = []
    for first in range(0, len(pictures), batch):
        some = pictures.pictures_NHWC[first : first + batch]
        found += [int(logits_C.argmax()) for logits_C in runner.answer(some, 0, [task] * len(some))]
    return np.array(found, np.int64)
