"""Tasks by numbers: what the server calls a task towards a process that holds it."""

import weakref
from collections import deque
from collections.abc import Sequence

import numpy as np

from isthmus.cloud.elastic.model.executor import Item
from isthmus.cloud.elastic.tasks.task import FloatArray, Task


class TaskNumbers:
    """Gives each task a number, from 1. When nothing refers to a task any more, its number is in ``dropped`` once."""

    def __init__(self) -> None:
        self._numbers: weakref.WeakKeyDictionary[Task, int] = weakref.WeakKeyDictionary()
        self._given = 0
        self._dropped: deque[int] = deque()

    def of(self, task: Task) -> int:
        number = self._numbers.get(task)
        if number is None:
            self._given += 1
            number = self._numbers[task] = self._given
            weakref.finalize(task, self._dropped.append, number)
        return number

    def dropped(self) -> list[int]:
        """Returns the numbers of tasks that are gone since the last call."""
        return [self._dropped.popleft() for _ in range(len(self._dropped))]


def split(logits: FloatArray, items: Sequence[Item]) -> list[FloatArray]:
    """Splits the logits of a batch, which are behind one another, into those of each item.

    Raises RuntimeError if their number is another one.
    """
    ends = np.cumsum([len(item.task.spec.classes) for item in items])
    if len(logits) != ends[-1]:
        raise RuntimeError(f"{len(logits)} logits for {ends[-1]} classes")
    return np.split(logits, ends[:-1])
