"""Experts in memory, up to a limit: read from their files when they are needed, and the next one ahead of its turn.

While one expert computes, the next one of the same layer is read (M3ViT's double buffer), so two experts and the rows
are the least memory. An expert that no registered task may use stays on disk. The longest unused one leaves first.
"""

import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Final

import torch
from torch import nn

from isthmus.cloud.elastic.experts.files import ExpertFiles, ExpertsError
from isthmus.cloud.elastic.experts.layer import Expert

Key = tuple[int, int]
"""Layer (counting those with experts) and expert."""
LEAST: Final = 2
"""Experts that must fit: the one that computes, and the next one."""


class Shelf:
    """The experts of all layers of a model. One thread at a time may use ``each``.

    ``limit_bytes`` bounds the bytes of experts in memory, as they are held; None: no bound. Raises ExpertsError for a
    limit below two experts.
    """

    def __init__(self, files: ExpertFiles, *, limit_bytes: int | None = None) -> None:
        self.files, self.limit_bytes = files, limit_bytes
        self._device, self._dtype = torch.device("cpu"), torch.float32
        self._made: Callable[[nn.Linear], nn.Module] | None = None
        self._lock = threading.Lock()
        self._held: OrderedDict[Key, Future[Expert]] = OrderedDict()  # longest unused first
        self._users: Counter[Key] = Counter()
        self._leaving: deque[tuple[Key, ...]] = deque()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="experts")
        self.loads = 0
        """Experts read so far."""
        self.waits = 0
        """Times that computing had to wait for an expert."""
        self.peak_bytes = 0
        """The most bytes held so far, those being read included."""
        self._check()

    def __deepcopy__(self, _memo: object) -> "Shelf":
        """A copy of a model reads its own experts, in its own number type."""
        return Shelf(self.files, limit_bytes=self.limit_bytes)

    @property
    def expert_bytes(self) -> int:
        """The size of one expert as it is held."""
        return self.files.expert_bytes * self._dtype.itemsize // torch.float32.itemsize

    @property
    def bytes(self) -> int:
        """The bytes of all experts in memory or being read."""
        return len(self.held()) * self.expert_bytes

    def held(self) -> tuple[Key, ...]:
        """Returns the experts in memory or being read, longest unused first."""
        with self._lock:
            self._let_go()
            return tuple(self._held)

    def place(self, device: torch.device, dtype: torch.dtype) -> None:
        """Holds experts on this device, in this number type, from now on. Raises ExpertsError as the constructor."""
        with self._lock:
            if (device, dtype) != (self._device, self._dtype):
                self._device, self._dtype = device, dtype
                self._held.clear()
        self._check()

    def remake(self, made: Callable[[nn.Linear], nn.Module]) -> None:
        """Replaces the linear layers of experts by ``made(linear)`` when they are read."""
        with self._lock:
            self._made = made
            self._held.clear()

    def each(self, layer: int, experts: Sequence[int]) -> Iterator[nn.Module]:
        """Yields these experts of a layer, in order; while one is in use, the next one is read.

        Raises ExpertsError if a file is missing or wrong. It is read again when it is next asked for.
        """
        keys = [(layer, expert) for expert in experts]
        with self._lock:
            self._let_go()
        for position, key in enumerate(keys):
            with self._lock:
                future = self._asked(key, {key})
            self.waits += not future.done()
            try:
                module = future.result()
            except BaseException:
                with self._lock:
                    self._held.pop(key, None)
                raise
            if position + 1 < len(keys):
                with self._lock:
                    self._asked(keys[position + 1], {key, keys[position + 1]})
            yield module

    def announce(self, keys: Iterable[Key]) -> None:
        """Notes that a task may use these experts, and reads ahead as many of them as there is room for."""
        with self._lock:
            self._let_go()
            for key in keys:
                self._users[key] += 1
                if key not in self._held and len(self._held) < self._room:
                    self._read(key)

    def release(self, keys: Iterable[Key]) -> None:
        """Notes that the task is gone: experts that no other task may use leave memory before the next batch.

        It takes no lock, since a collector of garbage may call it anywhere.
        """
        self._leaving.append(tuple(keys))

    def wait(self) -> None:
        """Waits until nothing is being read. For measurements and tests; serving never needs it."""
        with self._lock:
            futures = list(self._held.values())
        wait(futures)

    @property
    def _room(self) -> int:
        """The number of experts that fit."""
        every = self.files.shape.layers * self.files.shape.experts
        return every if self.limit_bytes is None else min(every, self.limit_bytes // self.expert_bytes)

    def _check(self) -> None:
        least = min(LEAST, self.files.shape.layers * self.files.shape.experts)
        if self._room < least:
            raise ExpertsError(
                f"a limit of {self.limit_bytes} bytes is too small for {least} experts: give at least "
                f"{least * self.expert_bytes}"
            )

    def _let_go(self) -> None:
        """Removes the experts that no task may use any more. Under the lock."""
        while self._leaving:
            for key in self._leaving.popleft():
                self._users[key] -= 1
                if self._users[key] <= 0:
                    del self._users[key]
                    self._held.pop(key, None)

    def _asked(self, key: Key, keep: set[Key]) -> Future[Expert]:
        """Returns the expert that is held or will be; makes room without removing any of ``keep``. Under the lock."""
        known = self._held.get(key)
        if known is not None:
            self._held.move_to_end(key)
            return known
        while len(self._held) >= self._room:
            oldest = next(each for each in self._held if each not in keep)
            future = self._held.pop(oldest)
            if not future.cancel():
                wait([future])  # it may be half read, and its memory is not free before that ends
        return self._read(key)

    def _read(self, key: Key) -> Future[Expert]:
        future = self._pool.submit(self._load, key, self._device, self._dtype, self._made)
        self._held[key] = future
        self.loads += 1
        self.peak_bytes = max(self.peak_bytes, len(self._held) * self.expert_bytes)
        return future

    def _load(
        self, key: Key, device: torch.device, dtype: torch.dtype, made: Callable[[nn.Linear], nn.Module] | None
    ) -> Expert:
        expert = self.files.load(*key).to(device, dtype)
        if made is not None:
            expert.remake(made)
        return expert.eval()
