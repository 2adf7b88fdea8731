"""Models in memory within a bound: loaded ahead of need on a thread, the one used longest ago makes room.

Who serves never waits: ``using`` gives what is there now, or nothing. Tensors that several models hold are in memory
once. Room is made before a load begins, so the bound holds at every moment; a model in use is not removed, and a load
that needs its room waits for it. Loading takes processor time from serving, so the loader rests after each load.
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
"""Seconds of rest for each second of loading, unless somebody waits: the loader works a tenth of the time at most."""

Model = TypeVar("Model")


@dataclass
class _Resident(Generic[Model]):
    card: Card
    model: Model
    users: int = 0


class Residency(Generic[Model]):
    """``build`` makes a model of a card and its tensors, which it must not copy; ``placed`` puts one tensor where the
    model wants it, and ``bytes_of`` says what it takes there.

    Raises StoreError for a bound that does not hold the largest of ``cards``, with the least one that does.
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
        self._store, self._cards, self._build, self._placed, self._bytes_of = store, cards, build, placed, bytes_of
        self._sizes = {one.hash: bytes_of(one) for card in cards.values() for one in card.tensors.values()}
        self.limit_bytes = sum(self._sizes.values()) if limit_bytes is None else limit_bytes
        largest = max((self._alone(card) for card in cards.values()), default=0)
        if largest > self.limit_bytes:
            raise StoreError(f"a bound of {self.limit_bytes} bytes holds not even one model: give at least {largest}")
        self._changed = threading.Condition()
        self._resident: OrderedDict[str, _Resident[Model]] = OrderedDict()  # longest unused first
        self._tensors: dict[str, tuple[Tensor, int]] = {}
        self._reserved = 0
        self._wanted: list[str] = []
        self._rest, self._rests_until_s = rest, time.monotonic()
        self._waiting = 0
        self.broken: dict[str, str] = {}
        """Models whose files turned out to be damaged, and how."""
        self.loads = 0
        self.peak_bytes = 0
        """The most that was ever taken, loads under way included."""
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="warm-loader", daemon=True)
        self._thread.start()

    @property
    def bytes(self) -> int:
        """Of all tensors in memory, and of those being loaded."""
        with self._changed:
            return self._taken()

    def resident(self) -> tuple[str, ...]:
        """Models that can be used now, the one used longest ago first."""
        with self._changed:
            return tuple(self._resident)

    def fitting(self, names: Sequence[str]) -> tuple[str, ...]:
        """As many of ``names``, from the first on, as the bound holds together."""
        hashes: set[str] = set()
        for count, name in enumerate(names):
            hashes |= {one.hash for one in self._cards[name].tensors.values()}
            if sum(self._sizes[hash] for hash in hashes) > self.limit_bytes:
                return tuple(names[:count])
        return tuple(names)

    def announce(self, names: Sequence[str]) -> None:
        """These will be needed, the first of them first; what was announced before and is not named any more is no
        longer loaded. At most what the bound holds together should be named (see ``fitting``): more would displace one
        another. Does not wait."""
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
        """The model for as long as the block runs, or None where it is not in memory. Never waits for a file."""
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
        """Waits until what was announced last is in memory, or broken; the loader does not rest meanwhile. For a start,
        and for measurements."""
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
        """Ends the loader and lets go of all models."""
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
        """Waits for a model that is wanted and can be loaded, and reserves its room. None: the end."""
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
                        break  # a model in use is in its way: in their order, or the last would starve the first
                self._changed.wait()
        return None

    def _make_room(self, card: Card) -> bool:
        """Removes models, the one used longest ago first, until ``card`` fits; reserves its bytes. Under the lock.

        None is removed that is wanted sooner: else models that do not fit together would displace each other for ever.
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
