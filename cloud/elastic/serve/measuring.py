"""Measures the accuracy of tasks that came with a profiling set, while nothing else is to do.

A few pictures run at a time, and only if no query waits or runs. A query that arrives meanwhile waits for these few
pictures at most. If the task is replaced or removed, its measurement ends.
"""

import logging
import queue
import threading
from collections.abc import Callable
from typing import Final

import numpy as np

from isthmus.cloud.elastic.model.executor import Executor, Item
from isthmus.cloud.elastic.scheduling.profile import Profile
from isthmus.cloud.elastic.serve.registry import Registry
from isthmus.cloud.elastic.tasks.task import Measured, Task
from isthmus.data.images import LabelledImages
from isthmus.proto.errors import IsthmusError

log = logging.getLogger(__name__)

MOST_PICTURES: Final = 500
"""Pictures that are measured, drawn at random: the standard error is then at most 2.2 points."""
LONGEST_S: Final = 0.01
"""Pictures run together as long as they take no longer than this; one always runs."""
IDLE_S: Final = 0.05
"""How often to look whether the server is idle."""


class Measurer:
    """Measures one task after another on a thread of its own. Call ``attach``, ``start`` and ``stop`` once each."""

    def __init__(
        self,
        executor: Executor,
        profile: Profile,
        idle: Callable[[], bool],
        *,
        on_start: Callable[[], None] = lambda: None,
    ) -> None:
        """``idle`` says whether no query waits or runs. ``on_start`` is called on the thread."""
        self._executor = executor
        self._profile = profile
        self._idle = idle
        self._on_start = on_start
        self._asked: queue.SimpleQueue[Task] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._registry: Registry | None = None
        self._thread = threading.Thread(target=self._run, name="elastic-measurer", daemon=True)

    def ask(self, task: Task) -> None:
        """Measures the task when its turn comes."""
        self._asked.put(task)

    def attach(self, registry: Registry) -> None:
        """Names the registry that keeps the tasks and takes what is measured."""
        self._registry = registry

    def start(self) -> None:
        """Begins to measure."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the measurement under way, which starts over with the next server. Blocks."""
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        self._on_start()
        while not self._stopping.is_set():
            try:
                task = self._asked.get(timeout=IDLE_S)
            except queue.Empty:
                continue
            try:
                self._measure(task)
            except (IsthmusError, OSError) as error:
                log.warning("the accuracy of task %s could not be measured: %s", task.name, error)
            except Exception:
                log.exception("the accuracy of task %s could not be measured", task.name)

    def _measure(self, task: Task) -> None:
        assert self._registry is not None, "attached"
        labelled = self._registry.profiling(task)
        if labelled is None:
            return
        if len(labelled) > MOST_PICTURES:
            labelled = labelled.only(np.random.default_rng(0).permutation(len(labelled))[:MOST_PICTURES])
        accuracy = {}
        for gamma in self._profile.gammas:
            if gamma <= 0 or gamma in task.prompted_gammas:
                share = self._accuracy(task, labelled, gamma)
                if share is None:
                    return
                accuracy[gamma] = share
        chance = float(np.bincount(labelled.labels_N).max() / len(labelled))
        found = Measured(accuracy, len(labelled), chance)
        if self._registry.measured(task, found):
            shown = ", ".join(f"{share:.1%} at {gamma}" for gamma, share in accuracy.items())
            log.info("task %s was measured on %d pictures: %s", task.name, len(labelled), shown)
            if not found.credible:
                log.warning(
                    "the labels of task %s's profiling set do not fit it (always answering one class is right for "
                    "%.1f %%), so its owner's figures are used",
                    task.name,
                    100 * chance,
                )

    def _accuracy(self, task: Task, labelled: LabelledImages, gamma: int) -> float | None:
        """Returns the accuracy; None if the task was replaced or the server stops."""
        times_s = self._profile.times_s(gamma)
        together = 1
        while 2 * together <= len(labelled) and times_s[2 * together] <= LONGEST_S:
            together *= 2
        right = 0
        for first in range(0, len(labelled), together):
            while not self._idle():
                if self._stopping.wait(IDLE_S):
                    return None
            assert self._registry is not None, "attached"
            if self._stopping.is_set() or not self._registry.is_current(task):
                return None
            some = labelled.only(np.arange(first, min(first + together, len(labelled))))
            logits = self._executor.run([Item(picture, task) for picture in some.pictures_NHWC], gamma)
            right += sum(
                int(logits_C.argmax()) == label for logits_C, label in zip(logits, some.labels_N.tolist(), strict=True)
            )
        return right / len(labelled)
