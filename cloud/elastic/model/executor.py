"""Runs a batch: images of any tasks together, all at one gamma."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from isthmus.cloud.elastic.tasks.task import FloatArray, PromptMode, Task, TaskWeights
from isthmus.data.images import PixelSpec

Image = npt.NDArray[Any]
"""uint8 (H, W, 3) RGB in the model's size, or float32 (3, H, W) standardised for the model."""


@dataclass(frozen=True, eq=False)
class Item:
    """One image, and the task whose prompts and head answer for it."""

    image: Image
    task: Task


class Executor(Protocol):
    """Runs batches one at a time, on the thread that calls it."""

    def run(self, items: Sequence[Item], gamma: int) -> list[FloatArray]:
        """Returns the logits (C,) of each item, in order: one per class of its task. An error fails the whole batch."""


class ExecutorLost(RuntimeError):
    """What ran the batches is gone: its process or its machine. The message says what is known of the reason."""


@runtime_checkable
class Supervised(Protocol):
    """An executor outside this process, which can be lost and started again. While it is lost, ``run`` raises."""

    @property
    def lost(self) -> bool:
        """Whether it must be restored before it can run a batch."""

    def watch(self, changed: Callable[[], None]) -> None:
        """Calls ``changed``, on any thread, as soon as the executor is lost, even if no batch runs."""

    def restore(self) -> None:
        """Starts it, and waits until it can run. Does nothing if it can. Raises ExecutorLost."""

    def suspend(self) -> None:
        """Ends it until the next ``restore``, and gives its memory back. Not called while a batch runs."""

    def close(self) -> None:
        """Ends it for good. A ``restore`` under way raises ExecutorLost."""


class Runner(Protocol):
    """The model on its device, such as ``runner.ElasticRunner``. ``prepare`` returns a type of the runner's own."""

    def prepare(self, weights: TaskWeights, mode: PromptMode) -> Any: ...

    def answer(self, images: Image, gamma: int, tasks: Sequence[Any]) -> list[FloatArray]: ...


class ModelExecutor:
    """An executor that runs the model. A task is prepared once, and dropped when nothing refers to it any more.

    A lock serialises preparing and running, since the runner supports one thread at a time.
    """

    def __init__(self, runner: Runner, pixels: PixelSpec) -> None:
        self._runner = runner
        self._pixels = pixels
        self._turn = threading.Lock()
        self._prepared: WeakKeyDictionary[Task, Any] = WeakKeyDictionary()

    def prepare(self, task: Task) -> None:
        """Places a task's weights on the model's device, so that its first query does not wait for that."""
        with self._turn:
            self._prepared[task] = self._runner.prepare(task.weights, task.spec.prompt_mode)

    def run(self, items: Sequence[Item], gamma: int) -> list[FloatArray]:
        for item in items:
            if item.task not in self._prepared:
                self.prepare(item.task)
        with self._turn:
            tasks = [self._prepared[item.task] for item in items]
            return self._runner.answer(stacked(items, self._pixels), gamma, tasks)


def stacked(items: Sequence[Item], pixels: PixelSpec) -> Image:
    """Stacks the images into one array. If some of them are standardised already, it standardises the others too."""
    return np.stack(alike(items, pixels))


def alike(items: Sequence[Item], pixels: PixelSpec) -> list[Image]:
    """Returns the images in one form. If some of them are standardised already, it standardises the others too."""
    images = [item.image for item in items]
    if len({image.dtype for image in images}) > 1:
        images = [image if image.dtype == np.float32 else pixels.standardise(image[None])[0] for image in images]
    return images
