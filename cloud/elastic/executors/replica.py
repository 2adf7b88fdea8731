"""One copy of the model in another process, with the tasks that were sent to it. Any transport can stand before it."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from isthmus.cloud.elastic.executors.opening import Opening, check, opened
from isthmus.cloud.elastic.model.runner import ServedTask
from isthmus.cloud.elastic.tasks.task import FloatArray, PromptMode, TaskWeights


class Replica:
    """Opens the model and runs one image. Raises what ``opened`` and ``check`` raise. Tasks are known by numbers."""

    def __init__(self, opening: Opening) -> None:
        torch.set_num_threads(opening.threads)
        self._threads = opening.threads
        self._runner = opened(opening)
        check(self._runner)
        self._tasks: dict[int, ServedTask] = {}

    def prepare(self, number: int, weights: bytes, classes: int, mode: PromptMode) -> None:
        """Places a task on the model's device. ``weights``: a safetensors file. Raises IsthmusError or ValueError."""
        read = TaskWeights.from_bytes(weights, classes=classes, model=self._runner.model.shape)
        self._tasks[number] = self._runner.prepare(read, mode)

    def run(self, pictures: npt.NDArray[Any], gamma: int, tasks: Sequence[int], drop: Sequence[int]) -> FloatArray:
        """Returns the logits of all pictures behind one another. Forgets the tasks in ``drop`` first."""
        torch.set_num_threads(self._threads)  # it belongs to the thread, and Ray has several
        for number in drop:
            self._tasks.pop(number, None)
        return np.concatenate(self._runner.answer(pictures, gamma, [self._tasks[number] for number in tasks]))
