"""PURE: the requests under way as columns, so that all that wait are ranked at once, however many they are.

A column changes when a request comes, goes, or loses its place; nothing changes while it waits. So a decision costs a
few operations on arrays in place of a loop over the queue. Axes: N waiting requests.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from isthmus.cloud.generation.scheduling.policy import Life, State

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_FIRST_ROOM: Final = 256
_MOST_KINDS: Final = 1_024
"""Classes of requests that have a number at a time. Clients choose the names, so those in use alone are kept."""
_COLUMNS: Final = ("id", "arrival_s", "prompt", "log_prompt", "most", "deadline_s", "ttft_s", "tpot_s", "kind")
_CHANGING: Final = ("tokens", "computed")


@dataclass(frozen=True, slots=True)
class Waiting:
    """Waiting or running requests, (N,) each, in no order. Wishes that a request has not are infinite.

    ``kind_N`` are places in ``kinds``. ``first_token_by_s_N`` is infinite for a request that has its first token.
    """

    lives: tuple[Life, ...]
    id_N: Floats
    arrival_s_N: Floats
    prompt_N: Floats
    log_prompt_N: Floats
    most_N: Floats
    deadline_s_N: Floats
    first_token_by_s_N: Floats
    tpot_s_N: Floats
    kind_N: Ints
    tokens_N: Floats
    computed_N: Floats
    kinds: tuple[str, ...]

    @property
    def known_N(self) -> Floats:
        return self.prompt_N + self.tokens_N

    @property
    def to_prefill_N(self) -> Floats:
        """The tokens that must be computed before the next is drawn; 0 for those whose next step is a decode."""
        pending_N = self.known_N - self.computed_N
        return np.where((self.computed_N > 0) & (pending_N == 1), 0.0, pending_N)

    def by(self, *keys: npt.NDArray[Any]) -> list[Life]:
        """Returns the requests by these keys, the first one above all, and by id if all are equal."""
        order_N = np.lexsort((self.id_N, *reversed(keys)))
        return [self.lives[at] for at in order_N.tolist()]


class Queue:
    """Columns of the requests under way. Its owner passes ``arrived`` and ``left`` on.

    >>> queue = Queue()
    >>> queue.arrived(Life(Request(7, range(5), max_tokens=3, arrival_s=1.0)))
    >>> queue.waiting({}).prompt_N.tolist(), queue.waiting({7: 1}).prompt_N.tolist()
    ([5.0], [])
    """

    def __init__(self) -> None:
        self._columns = {name: np.zeros(_FIRST_ROOM) for name in (*_COLUMNS, *_CHANGING)}
        self._waits_N = np.zeros(_FIRST_ROOM, dtype=bool)
        self._lives: list[Life | None] = [None] * _FIRST_ROOM
        self._at: dict[int, int] = {}
        self._free = list(range(_FIRST_ROOM))[::-1]
        self._kinds: dict[str, int] = {}
        self._holding: set[int] = set()

    def arrived(self, life: Life) -> None:
        """Adds a request, which waits."""
        if not self._free:
            self._grow()
        at = self._at[life.id] = self._free.pop()
        request, columns = life.request, self._columns
        columns["id"][at] = life.id
        columns["arrival_s"][at] = request.arrival_s
        columns["prompt"][at] = len(request.prompt)
        columns["log_prompt"][at] = math.log(len(request.prompt))
        columns["most"][at] = request.max_tokens
        columns["deadline_s"][at] = math.inf if request.deadline_s is None else request.deadline_s
        columns["ttft_s"][at] = math.inf if request.ttft_s is None else request.arrival_s + request.ttft_s
        columns["tpot_s"][at] = math.inf if request.tpot_s is None else request.tpot_s
        columns["kind"][at] = self._kind(request.kind)
        self._lives[at] = life
        self._waits(at, life)

    def left(self, life: Life) -> None:
        """Removes a request. Unknown ones are ignored."""
        at = self._at.pop(life.id, None)
        if at is not None:
            self._waits_N[at] = False
            self._lives[at] = None
            self._free.append(at)
            self._holding.discard(life.id)

    def waiting(self, blocks: Mapping[int, int]) -> Waiting:
        """Returns the requests that have no ``blocks``."""
        for id in blocks.keys() ^ self._holding:
            at = self._at.get(id)
            if at is None:
                continue
            if id in blocks:
                self._waits_N[at] = False
            elif (life := self._lives[at]) is not None:
                self._waits(at, life)
        self._holding = {id for id in blocks if id in self._at}
        return self._rows(np.flatnonzero(self._waits_N))

    def running(self, state: State) -> Waiting:
        """Returns those that have blocks in ``state``, in the same form."""
        return self.of_lives([state.lives[id] for id in state.blocks if id in self._at])

    def of_lives(self, lives: Sequence[Life]) -> Waiting:
        """Returns these requests, which are under way, in the same form and in their order."""
        at_N = np.array([self._at[life.id] for life in lives], dtype=np.int64)
        self._columns["tokens"][at_N] = [len(life.tokens) for life in lives]
        self._columns["computed"][at_N] = [life.computed for life in lives]
        return self._rows(at_N)

    def _rows(self, at_N: Ints) -> Waiting:
        of = {name: column[at_N] for name, column in self._columns.items()}
        return Waiting(
            lives=tuple([self._lives[at] for at in at_N.tolist()]),
            id_N=of["id"],
            arrival_s_N=of["arrival_s"],
            prompt_N=of["prompt"],
            log_prompt_N=of["log_prompt"],
            most_N=of["most"],
            deadline_s_N=of["deadline_s"],
            first_token_by_s_N=np.where(of["tokens"] > 0, math.inf, of["ttft_s"]),
            tpot_s_N=of["tpot_s"],
            kind_N=of["kind"].astype(np.int64),
            tokens_N=of["tokens"],
            computed_N=of["computed"],
            kinds=tuple(self._kinds),
        )

    def of(self, state: State) -> Waiting:
        """Returns the requests that wait in ``state``."""
        return self.waiting(state.blocks)

    def _waits(self, at: int, life: Life) -> None:
        self._waits_N[at] = True
        self._columns["tokens"][at] = len(life.tokens)
        self._columns["computed"][at] = life.computed

    def _kind(self, name: str) -> int:
        if name not in self._kinds and len(self._kinds) >= _MOST_KINDS:
            self._kinds = {}
            for life, at in ((self._lives[at], at) for at in self._at.values()):
                if life is not None:
                    self._columns["kind"][at] = self._kinds.setdefault(life.request.kind, len(self._kinds))
        return self._kinds.setdefault(name, len(self._kinds))

    def _grow(self) -> None:
        room = len(self._lives)
        self._columns = {name: np.concatenate((column, np.zeros(room))) for name, column in self._columns.items()}
        self._waits_N = np.concatenate((self._waits_N, np.zeros(room, dtype=bool)))
        self._lives += [None] * room
        self._free += list(range(room, 2 * room))[::-1]
