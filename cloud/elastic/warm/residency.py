"""Keeps models in memory up to a limit. A thread loads them before they are needed; the least recently used one leaves.

Serving never waits: ``using`` returns a model that is in memory now, or None. Tensors shared by several models are in
memory once. Room is made before a load starts, so the limit holds at every moment. A model in use is not removed; a
load that needs its room waits. Loading takes processor time from serving, so the loader rests after each load.
"""

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from torch import Tensor

from isthmus.cloud.elastic.warm.store import Card, Stored, StoreError, WarmStore

log = logging.getLogger(__name__)

REST: Final = 9.0
"""Seconds of rest per second of loading, unless a caller waits. So the loader works at most a tenth of the time."""

Model = TypeVar("Model")


@dataclass
class _Resident(Generic[Model]):
    card: Card
    model: Model
    users: int = 0


class Residency(Generic[Model]):
    """Keeps models of ``store`` in memory.

    ``build`` makes a model from a card and its tensors, which it must not copy. ``placed`` moves one tensor to the
    model's device, and ``bytes_of`` returns its size there.
    Raises StoreError if the limit is too small for the largest of ``cards``; the message names the least limit.
    """

    def __init__(
        self,
        store: WarmStore,
        cards: Mapping[str, Card],
        build: Callable[[Card, Mapping[str, Tensor]], Model],
        *,
        limit_bytes: int | None = None,
        placed: Callable[[Tensor], Tensor] = lambda tensor: tensor,
        bytes_of: Callable[[Stored], int] = lambda stored: stored.bytes,
        rest: float = REST,
    ) -> None:
        self._store, self._cards, self._build, self._placed = store, cards, build, placed
        self._sizes = {one.hash: bytes_of(one) for card in cards.values() for one in card.tensors.values()}
        self.limit_bytes = sum(self._sizes.values()) if limit_bytes is None else limit_bytes
        largest = max((self._alone(card) for card in cards.values()), default=0)
        if largest > self.limit_bytes:
            raise StoreError(
                f"a limit of {self.limit_bytes} bytes is too small for the largest model: give at least {largest}"
            )
        self._changed = threading.Condition()
        self._resident: OrderedDict[str, _Resident[Model]] = OrderedDict()  # longest unused first
        self._tensors: dict[str, tuple[Tensor, int]] = {}
        self._reserved = 0
        self._wanted: list[str] = []
        self._rest, self._rests_until_s = rest, time.monotonic()
        self._waiting = 0
        self.broken: dict[str, str] = {}
        """Models whose files are damaged, with the reason."""
        self.loads = 0
        self.peak_bytes = 0
        """The most bytes ever used, including loads in progress."""
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="warm-loader", daemon=True)
        self._thread.start()

    @property
    def bytes(self) -> int:
        """The bytes of all tensors in memory or being loaded."""
        with self._changed:
            return self._taken()

    def resident(self) -> tuple[str, ...]:
        """Returns the models in memory, least recently used first."""
        with self._changed:
            return tuple(self._resident)

    def fitting(self, names: Sequence[str]) -> tuple[str, ...]:
        """Returns as many of ``names``, from the first on, as fit into the limit together."""
        hashes: set[str] = set()
        for count, name in enumerate(names):
            hashes |= {one.hash for one in self._cards[name].tensors.values()}
            if sum(self._sizes[hash] for hash in hashes) > self.limit_bytes:
                return tuple(names[:count])
        return tuple(names)

    def announce(self, names: Sequence[str]) -> None:
        """Announces that these models will be needed, in this order. It does not wait.

        Models that were announced before and are not named now are no longer loaded. Name only as many as fit together
        (see ``fitting``): more would displace one another.
        """
        with self._changed:
            for name in reversed(names):
                if name in self._resident:
                    self._resident.move_to_end(name)
            wanted = [name for name in names if name not in self.broken]
            if wanted != self._wanted:
                self._wanted = wanted
                self._changed.notify_all()

    @contextmanager
    def using(self, name: str) -> Iterator[Model | None]:
        """Holds the model for the duration of the block; None if it is not in memory. It never waits for a file."""
        with self._changed:
            found = self._resident.get(name)
            if found is not None:
                self._resident.move_to_end(name)
                found.users += 1
        try:
            yield None if found is None else found.model
        finally:
            if found is not None:
                with self._changed:
                    found.users -= 1
                    self._changed.notify_all()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Waits until the last announced models are in memory or found damaged. Returns False after ``timeout_s``.

        The loader does not rest meanwhile. Use it before serving and for measurements.
        """
        with self._changed:
            self._waiting += 1
            self._changed.notify_all()
            try:
                return self._changed.wait_for(
                    lambda: self._closed or all(name in self._resident for name in self._wanted), timeout_s
                )
            finally:
                self._waiting -= 1

    def close(self) -> None:
        """Stops the loader and releases all models."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()
        self._resident.clear()
        self._tensors.clear()

    def _run(self) -> None:
        while (card := self._next()) is not None:
            began_s = time.monotonic()
            try:
                self._load(card)
            except Exception as error:
                why = str(error) if isinstance(error, StoreError) else repr(error)
                log.error("the warmed model %s cannot be used, others serve on: %s", card.name, why)
                with self._changed:
                    self.broken[card.name] = why
                    self._wanted = [name for name in self._wanted if name != card.name]
                    self._changed.notify_all()
            ended_s = time.monotonic()
            self._rests_until_s = ended_s + self._rest * (ended_s - began_s)

    def _next(self) -> Card | None:
        """Waits for an announced model that can be loaded, and reserves its room. Returns None after ``close``."""
        with self._changed:
            while not self._closed:
                rests_s = self._rests_until_s - time.monotonic()
                if rests_s > 0 and not self._waiting:
                    self._changed.wait(rests_s)
                    continue
                for name in self._wanted:
                    if name not in self._resident:
                        if self._make_room(self._cards[name]):
                            return self._cards[name]
                        break  # a model in use blocks it; keep the order, or later models would starve this one
                self._changed.wait()
        return None

    def _make_room(self, card: Card) -> bool:
        """Removes the least recently used models until ``card`` fits, and reserves its bytes. Called under the lock.

        A model that is needed sooner is not removed. Otherwise models that do not fit together would displace each
        other forever.
        """
        sooner = set(self._wanted[: self._wanted.index(card.name)])
        while self._taken() + self._missing(card) > self.limit_bytes:
            idle = next((name for name, held in self._resident.items() if not held.users and name not in sooner), None)
            if idle is None:
                return False
            self._forget(idle)
        self._reserved = self._missing(card)
        self.peak_bytes = max(self.peak_bytes, self._taken())
        return True

    def _load(self, card: Card) -> None:
        with self._changed:
            have = {one.hash: self._tensors[one.hash][0] for one in card.tensors.values() if one.hash in self._tensors}
        try:
            for stored in card.tensors.values():
                if stored.hash not in have:
                    have[stored.hash] = self._placed(self._store.tensor(stored))
            model = self._build(card, {key: have[stored.hash] for key, stored in card.tensors.items()})
        except BaseException:
            with self._changed:
                self._reserved = 0
            raise
        with self._changed:
            for hash in {one.hash for one in card.tensors.values()}:
                users = self._tensors[hash][1] if hash in self._tensors else 0
                self._tensors[hash] = (have[hash], users + 1)
            self._reserved = 0
            self._resident[card.name] = _Resident(card, model)
            self.loads += 1
            self._changed.notify_all()

    def _forget(self, name: str) -> None:
        for hash in {one.hash for one in self._resident.pop(name).card.tensors.values()}:
            tensor, users = self._tensors[hash]
            if users > 1:
                self._tensors[hash] = (tensor, users - 1)
            else:
                del self._tensors[hash]

    def _taken(self) -> int:
        return sum(self._sizes[hash] for hash in self._tensors) + self._reserved

    def _missing(self, card: Card) -> int:
        hashes = {one.hash for one in card.tensors.values()}
        return sum(self._sizes[hash] for hash in hashes if hash not in self._tensors)

    def _alone(self, card: Card) -> int:
        return sum(self._sizes[hash] for hash in {one.hash for one in card.tensors.values()})
