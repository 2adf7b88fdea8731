"""Runs each batch on the model of its task and size. A model that is not in memory is loaded first.

Every executor has memory of its own. A batch takes a free executor that holds its model, else the one that is idle for
longest, and the least recently used models leave before one is loaded. These are the rules of the simulator, by its own
code (policies/infaas.py).
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from isthmus.cloud.elastic.model.executor import Item, stacked
from isthmus.cloud.elastic.policies.infaas import ModelsInMemory, ModelSize, freest
from isthmus.cloud.elastic.tasks.task import FloatArray
from isthmus.cloud.elastic.variants.opening import Ready

log = logging.getLogger(__name__)

Open = Callable[[str, int], Ready]
"""Loads a task's model of a level."""


class Memory:
    """The models of one executor, at most ``memory_bytes`` of them. One thread at a time may call ``run``.

    At the start those of ``tasks`` are loaded that fit: base models first, then small, then large ones. A model larger
    than all of the memory stays alone in it, as in the simulator.
    """

    def __init__(self, sizes: Sequence[ModelSize], tasks: Sequence[str], memory_bytes: int, open: Open) -> None:
        self._sizes: Mapping[int, ModelSize] = {size.level: size for size in sizes}
        self._open = open
        self._order = ModelsInMemory(memory_bytes, tasks, sizes)
        self._models = {model: open(*model) for model in self._order.held}
        self.loads = 0
        self.removals = 0
        self.bytes = self._order.bytes
        """Bytes of the models in memory."""

    def holds(self, task: str, level: int) -> bool:
        """Returns whether this model is in memory."""
        return self._order.holds(task, self._sizes[level])

    def run(self, items: Sequence[Item], level: int) -> list[FloatArray]:
        """Returns the logits of each item, from the model of this size of their task.

        Raises ValueError for items of several tasks, and what loading raises; the model is then not in memory.
        """
        names = {item.task.name for item in items}
        if len(names) != 1:
            raise ValueError("a batch of model variants holds one task")
        (name,) = names
        ready = self._ready(name, level)
        pixels = ready.runner.pixels
        return ready.runner.answer(stacked(items, pixels), 0, [ready.task] * len(items))

    def _ready(self, name: str, level: int) -> Ready:
        load, left = self._order.use(name, self._sizes[level])
        for model in left:
            del self._models[model]
        self.removals += len(left)
        if load:
            try:
                self._models[name, level] = self._open(name, level)
                self.loads += 1
            except BaseException:
                self._order.forget(name, level)
                raise
            finally:
                self.bytes = self._order.bytes
        return self._models[name, level]


class Pool:
    """The executors of a server of variants: as many as there are memories, and any of them may run any batch."""

    def __init__(self, memories: Sequence[Memory], clock: Callable[[], float] = time.monotonic) -> None:
        self.memories = tuple(memories)
        self.executors = tuple(_Turn(self) for _ in self.memories)
        """What the engine's threads call. No more batches run at once than there are memories."""
        self._clock = clock
        self._turn = threading.Lock()
        self._free_since_s = dict.fromkeys(range(len(self.memories)), clock())

    def run(self, items: Sequence[Item], level: int) -> list[FloatArray]:
        """Runs a batch on the memory that ``freest`` names."""
        name = items[0].task.name
        with self._turn:
            since_s = [self._free_since_s.get(place, 0.0) for place in range(len(self.memories))]
            holds = [
                place in self._free_since_s and each.holds(name, level) for place, each in enumerate(self.memories)
            ]
            place = freest(list(self._free_since_s), since_s, holds)
            del self._free_since_s[place]
        try:
            return self.memories[place].run(items, level)
        finally:
            with self._turn:
                self._free_since_s[place] = self._clock()

    @property
    def loads(self) -> int:
        """Models loaded since the start."""
        return sum(each.loads for each in self.memories)

    @property
    def removals(self) -> int:
        """Models removed since the start."""
        return sum(each.removals for each in self.memories)

    @property
    def bytes(self) -> int:
        """Bytes of the models in all memories."""
        return sum(each.bytes for each in self.memories)


class _Turn:
    """One of a pool's executors, for the thread that the engine gives it."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    def run(self, items: Sequence[Item], gamma: int) -> list[FloatArray]:
        return self._pool.run(items, gamma)
