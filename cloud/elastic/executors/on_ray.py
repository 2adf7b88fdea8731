"""An executor on a Ray cluster: an actor with a copy of the model, on any machine that has room and the same file.

Ray may restart nothing by itself: the engine restores a lost executor, so that the plans know of it. A second call into
the actor never returns while it lives, and so notices its end even if no batch runs.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Final

import numpy as np

from isthmus import __version__
from isthmus.cloud.cluster import connection as cluster
from isthmus.cloud.elastic.executors.numbers import TaskNumbers, split
from isthmus.cloud.elastic.executors.opening import Opening
from isthmus.cloud.elastic.executors.process import COMPILING_S, END_S, PATIENCE_S
from isthmus.cloud.elastic.executors.replica import Replica
from isthmus.cloud.elastic.model.executor import ExecutorLost, Item, alike
from isthmus.cloud.elastic.tasks.task import FloatArray, PromptMode, Task
from isthmus.cloud.garbage import spare_what_is_there
from isthmus.data.images import PixelSpec
from isthmus.proto.errors import IsthmusError

log = logging.getLogger(__name__)

START_S: Final = 600.0
"""Longest time until a cluster has room for the actor and the model is loaded."""


class Actor:
    """What runs on the cluster. Raises RuntimeError if the machine has another version of Isthmus."""

    def __init__(self, opening: str, version: str) -> None:
        if version != __version__:
            raise RuntimeError(f"the cluster has isthmus {__version__}, the server {version}: install one version")
        self._replica = Replica(Opening.from_json(opening))
        spare_what_is_there()

    def pid(self) -> int:
        """Returns the actor's process id."""
        import os

        return os.getpid()

    def vigil(self) -> None:
        """Returns never."""
        threading.Event().wait()

    def prepare(self, number: int, weights: bytes, classes: int, mode: PromptMode) -> None:
        self._replica.prepare(number, weights, classes, mode)

    def run(self, pictures: Any, gamma: int, tasks: list[int], drop: list[int]) -> FloatArray:
        return self._replica.run(pictures, gamma, tasks, drop)


class RayExecutor:
    """Runs batches in a Ray actor (see the module). ``restore`` connects this process and starts the actor.

    A batch whose actor or machine is gone, or that takes longer than ``patience_s``, raises ExecutorLost. Any other
    failure of a batch raises RuntimeError, and the actor goes on. The actor takes ``opening.threads`` of the cluster's
    CPUs, and one of its GPUs if the model runs on one.
    """

    def __init__(
        self,
        opening: Opening,
        pixels: PixelSpec,
        *,
        address: str = cluster.LOCAL,
        cpus: int = 1,
        patience_s: float | None = None,
    ) -> None:
        """``cpus``: those of a cluster that this process starts."""
        self._opening = opening
        self._pixels = pixels
        self._address = address
        self._cpus = cpus
        self._patience_s = patience_s or (PATIENCE_S if opening.compiler is None else COMPILING_S)
        self._turn = threading.Lock()
        self._changed: Callable[[], None] = lambda: None
        self._actor: Any = None
        self._known: set[int] = set()
        self._lost = True
        self._closed = False
        self._numbers = TaskNumbers()
        self.pid: int | None = None
        """The actor's process id on its machine, while it runs."""

    @property
    def lost(self) -> bool:
        return self._lost

    def watch(self, changed: Callable[[], None]) -> None:
        self._changed = changed

    def restore(self) -> None:
        with self._turn:
            if self._closed:
                raise ExecutorLost("the server is stopping")
            if not self._lost:
                return
            try:
                cluster.connect(self._address, self._cpus)
            except IsthmusError as error:
                raise ExecutorLost(str(error)) from error
            gpus = int(self._opening.device.startswith("cuda"))
            actor: Any = None
            try:
                made = cluster.actor(Actor, cpus=self._opening.threads, gpus=gpus)
                actor = made.remote(self._opening.to_json(), __version__)
                self._actor = actor
                if self._closed:  # while it was made: "close" has not seen it
                    raise ExecutorLost("the server is stopping")
                self.pid = cluster.first_answer(actor.pid.remote(), START_S)
                vigil = actor.vigil.remote()
            except Exception as error:  # many types: no room, no machine, no model
                self._kill(actor)
                raise ExecutorLost(f"Ray has started no executor: {cluster.last_words(error)}") from error
            self._known.clear()
            self._lost = False
            threading.Thread(target=self._keep_vigil, args=(actor, vigil), name="vigil", daemon=True).start()

    def prepare(self, task: Task) -> None:
        """Gives the actor a task, so that its first query does not wait for that. A lost one gets it later."""
        if self._lost:
            return
        with self._turn, suppress(ExecutorLost):
            if not self._lost:
                self._give(task)

    def run(self, items: Sequence[Item], gamma: int) -> list[FloatArray]:
        with self._turn:
            if self._lost:
                raise ExecutorLost("it is being started again")
            for task in dict.fromkeys(item.task for item in items):
                self._give(task)
            numbers = [self._numbers.of(item.task) for item in items]
            dropped = self._numbers.dropped()
            self._known.difference_update(dropped)
            pictures = np.stack(alike(items, self._pixels))
            return split(self._answer(self._actor.run, pictures, gamma, numbers, dropped), items)

    def suspend(self) -> None:
        with self._turn:
            actor, self._actor = self._actor, None
            self._lost, self.pid = True, None
            self._kill(actor)

    def close(self) -> None:
        self._closed = True
        actor = self._actor
        self._gone(actor)
        self._kill(actor)

    def _give(self, task: Task) -> None:
        number = self._numbers.of(task)
        if number not in self._known:
            weights, spec = task.weights.to_bytes(), task.spec
            self._answer(self._actor.prepare, number, weights, len(spec.classes), spec.prompt_mode)
            self._known.add(number)

    def _answer(self, method: Any, *arguments: Any) -> Any:
        """Calls the actor. Raises ExecutorLost, and RuntimeError if the call itself failed."""
        import ray
        from ray.exceptions import RayTaskError

        actor = self._actor
        try:
            return cluster.bounded(lambda: ray.get(method.remote(*arguments)), self._patience_s)
        except RayTaskError as error:
            raise RuntimeError(str(error)[-8_000:]) from error
        except TimeoutError as error:
            self._gone(actor)
            self._kill(actor)
            raise ExecutorLost(f"its actor gave no answer for {self._patience_s:g} s and was killed") from error
        except Exception as error:  # the actor, its machine, the cluster or the connection is gone
            self._gone(actor)
            raise ExecutorLost(cluster.last_words(error)) from error

    def _keep_vigil(self, actor: Any, vigil: Any) -> None:
        import ray

        try:
            ray.get(vigil)
        except Exception as error:
            if not self._closed and self._actor is actor and not self._lost:
                log.error("an executor on Ray has ended: %s", cluster.last_words(error))
        self._gone(actor)

    def _gone(self, actor: Any) -> None:
        if actor is self._actor:
            self._lost = True
            self.pid = None
            self._changed()

    def _kill(self, actor: Any) -> None:
        if actor is not None:
            import ray

            with suppress(Exception):
                cluster.bounded(lambda: ray.kill(actor), END_S)
