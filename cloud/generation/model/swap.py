"""The pool beside the KV cache, where preempted requests wait with their keys and values (Shen et al. 2024,
"FastSwitch").

Copies out run on a thread of their own, so a step waits only for the copies in of its own requests. What is on the far
side already is not copied again: of a request that comes back and is preempted once more, only what it computed
meanwhile is.

With a folder, the pool is a file per copy that is mapped into memory: the system may write it out when memory is short.

Axes: L layers, K key-value heads, P tokens, D values per head.
"""

import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from isthmus.data.memory import give_back


@dataclass
class _Far:
    """What the pool has of one request, in order: pieces of (keys, values), of which ``tokens`` in all."""

    pieces: list["Future[tuple[Tensor, Tensor]]"] = field(default_factory=list)
    tokens: int = 0
    away: bool = False
    """Whether the request is here alone. Else the copy may be forgotten when room is short."""


class SwapPool:
    """Room for ``tokens`` tokens. One thread calls it. ``bytes_per_s`` slows copies down as a bus would."""

    def __init__(
        self,
        tokens: int,
        *,
        folder: Path | None = None,
        bytes_per_s: float | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if tokens < 1:
            raise ValueError(f"a pool of {tokens} tokens: must be at least 1")
        self._room = tokens
        self._folder = folder
        self._bytes_per_s = bytes_per_s
        self._sleep = sleep
        self._far: OrderedDict[int, _Far] = OrderedDict()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="isthmus-swap")
        self._changes = 0
        """Copies out that were asked for, and drops, since the start."""
        self.copied_bytes = 0
        """Bytes copied out since the start."""

    @property
    def tokens(self) -> int:
        """Tokens in the pool, copies of requests that have come back included."""
        return sum(far.tokens for far in self._far.values())

    def put(self, id: int, keys_LKPD: Tensor, values_LKPD: Tensor) -> None:
        """Takes a request's keys and values; they are copied meanwhile, so the caller must not change them.

        Raises ValueError if there is no room even without the copies of requests that have come back.
        """
        far = self._far.setdefault(id, _Far())
        self._far.move_to_end(id)
        far.away = True
        new = slice(far.tokens, keys_LKPD.shape[2])
        self._make_room(new.stop - new.start)
        far.tokens = new.stop
        if new.start < new.stop:
            far.pieces.append(self._thread.submit(self._copied, keys_LKPD[:, :, new], values_LKPD[:, :, new]))
            self._settle_later()

    def take(self, id: int) -> tuple[Tensor, Tensor]:
        """Returns a request's keys and values, and waits for their copies. A copy stays, if there is room for it."""
        far = self._far[id]
        far.away = False
        pieces = [piece.result() for piece in far.pieces]
        keys, values = (torch.cat(each, dim=2) for each in zip(*pieces, strict=True))
        return keys, values

    def drop(self, ids: Iterable[int]) -> None:
        """Forgets these requests, and gives their memory back to the system meanwhile. Unknown ids are ignored."""
        dropped = False
        for id in ids:
            dropped |= self._far.pop(id, None) is not None
        if dropped:
            self._settle_later()

    def close(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _make_room(self, tokens: int) -> None:
        for id in [id for id, far in self._far.items() if not far.away]:
            if self.tokens + tokens <= self._room:
                break
            del self._far[id]
        if self.tokens + tokens > self._room:
            raise ValueError(f"the pool has no room for {tokens} further tokens")

    def _copied(self, keys_LKPD: Tensor, values_LKPD: Tensor) -> tuple[Tensor, Tensor]:
        size = keys_LKPD.nbytes + values_LKPD.nbytes
        if self._bytes_per_s is not None:
            self._sleep(size / self._bytes_per_s)
        self.copied_bytes += size
        return self._place(keys_LKPD), self._place(values_LKPD)

    def _settle_later(self) -> None:
        self._changes += 1
        self._thread.submit(self._settle, self._changes)

    def _settle(self, changes: int) -> None:
        """Gives freed memory back to the system after the last change of several: the C library would keep it."""
        if changes == self._changes:
            give_back()

    def _place(self, source: Tensor) -> Tensor:
        if self._folder is None:
            return source.to("cpu", copy=True).contiguous()
        # The file has no name once it is open, so nothing is left behind however the process ends.
        with tempfile.NamedTemporaryFile(dir=self._folder) as file:
            file.truncate(source.nbytes)
            target = torch.from_file(file.name, shared=True, size=source.numel(), dtype=source.dtype)
        target = target.view(source.shape)
        target.copy_(source)
        return target
