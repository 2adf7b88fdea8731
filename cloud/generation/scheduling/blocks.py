"""PURE: who owns which block of the KV cache. A request's blocks are kept in as few runs of neighbours as possible.

A run can be read as one view and copied as one piece (Shen et al. 2024, "FastSwitch": block groups). Full blocks of
prompts that begin alike may have several owners (``prefixes.py``); nobody writes to a full block.
"""

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from isthmus.cloud.generation.scheduling.prefixes import Prefixes

BLOCK_TOKENS: Final = 16


@dataclass(frozen=True, slots=True)
class Shared:
    """What a request found computed: its first ``tokens`` tokens.

    ``copy`` (from, to) is the block that it shares in part, and its own. It must be made before the next step.
    """

    tokens: int
    copy: tuple[int, int] | None = None


class BlockTable:
    """``blocks`` blocks of ``block_tokens`` tokens. Owned and free blocks together are always all of them.

    With ``kept``, blocks of prompts are found by requests that begin alike. At most so many of them have no owner any
    more and wait to be found; they count as free, and the least recently used makes room when blocks are needed.

    >>> table = BlockTable(4, block_tokens=16)
    >>> table.grow(7, tokens=20), table.free
    ((0, 1), 2)
    >>> table.release(7), table.free
    (2, 4)
    """

    def __init__(self, blocks: int, block_tokens: int = BLOCK_TOKENS, *, kept: int = 0) -> None:
        if blocks < 1 or block_tokens < 1 or kept < 0:
            raise ValueError(f"{blocks} blocks of {block_tokens} tokens, {kept} kept: too few")
        self.blocks, self.block_tokens = blocks, block_tokens
        self._most_kept = kept
        self._prefixes = Prefixes(block_tokens)
        self._owners: dict[int, int] = {}
        """Number of owners of each block that has more than one."""
        self._kept: OrderedDict[int, None] = OrderedDict()
        """Known blocks without an owner, the least recently used first."""
        self._owned: dict[int, tuple[int, ...]] = {}
        self._runs: list[tuple[int, int]] = [(0, blocks)]
        """Free runs (first block, length), ascending; neighbouring runs are joined."""
        self._loose = blocks

    @property
    def free(self) -> int:
        """Blocks without an owner."""
        return self._loose + len(self._kept)

    @property
    def kept(self) -> int:
        """Blocks without an owner that still hold the beginning of a prompt."""
        return len(self._kept)

    def needed(self, tokens: int) -> int:
        """Returns the number of blocks that hold so many tokens."""
        return -(-tokens // self.block_tokens)

    def missing(self, id: int, tokens: int) -> int:
        """Returns how many more blocks ``id`` needs to hold ``tokens`` tokens."""
        return max(0, self.needed(tokens) - len(self._owned.get(id, ())))

    def owned(self, id: int) -> tuple[int, ...]:
        """Returns the blocks of ``id`` in the order of its tokens."""
        return self._owned.get(id, ())

    @property
    def owners(self) -> tuple[int, ...]:
        return tuple(self._owned)

    def grow(self, id: int, tokens: int) -> tuple[int, ...]:
        """Gives ``id`` blocks for ``tokens`` tokens in all, and returns its blocks.

        Prefers the blocks behind its last one, then the smallest run that fits whole, then the longest runs. Raises
        ValueError if there are too few free blocks; nothing has changed then.
        """
        count = self.missing(id, tokens)
        if count > self.free:
            raise ValueError(f"{count} blocks are needed and {self.free} are free")
        if count == 0:
            return self.owned(id)
        owned = list(self.owned(id))
        while self._loose < count:
            self._forget(next(iter(self._kept)))
        while count:
            taken = self._take(count, after=owned[-1] if owned else None)
            owned += taken
            count -= len(taken)
        self._owned[id] = tuple(owned)
        return self._owned[id]

    def release(self, id: int) -> int:
        """Takes all blocks of ``id`` back and returns how many they were."""
        blocks = self._owned.pop(id, ())
        # The last block first: it is of the least use to others.
        for block in reversed(blocks):
            owners = self._owners.pop(block, 1) - 1
            if owners > 1:
                self._owners[block] = owners
            elif not owners and block in self._prefixes:
                self._kept[block] = None
            elif not owners:
                self._give_back(block)
        while len(self._kept) > self._most_kept:
            self._forget(next(iter(self._kept)))
        return len(blocks)

    def share(self, id: int, salt: str, tokens: Sequence[int]) -> Shared | None:
        """Gives ``id``, which owns nothing, the blocks that hold the longest known beginning of ``tokens``.

        A block of which only the first tokens are alike is copied to one of its own, if one is free. Returns None, and
        gives nothing, if no beginning is known.
        """
        found = self._prefixes.find(salt, tokens) if self._most_kept else None
        if found is None or id in self._owned or not (found.blocks or found.partial):
            return None
        for block in found.blocks:
            if block in self._kept:
                del self._kept[block]
            else:
                self._owners[block] = self._owners.get(block, 1) + 1
        self._owned[id] = found.blocks
        whole = len(found.blocks) * self.block_tokens
        if found.partial and self.free:
            if found.further in self._kept:
                self._kept.move_to_end(found.further)
            if self._loose or next(iter(self._kept)) != found.further:
                target = self.grow(id, whole + found.partial)[-1]
                return Shared(whole + found.partial, (found.further, target))
        if not found.blocks:
            del self._owned[id]
            return None
        return Shared(whole)

    def know(self, id: int, salt: str, tokens: Sequence[int]) -> None:
        """Makes the full blocks of ``id``, which hold ``tokens``, known to requests that begin alike."""
        if self._most_kept:
            self._prefixes.add(salt, tokens, self._owned[id][: len(tokens) // self.block_tokens])

    def _forget(self, block: int) -> None:
        """Frees a kept block. Those that follow it have no owner either, or are not found any more."""
        for gone in self._prefixes.remove(block):
            if gone in self._kept:
                del self._kept[gone]
                self._give_back(gone)

    def _take(self, count: int, after: int | None) -> list[int]:
        at = self._run_for(count, after)
        first, length = self._runs[at]
        used = min(count, length)
        if used == length:
            del self._runs[at]
        else:
            self._runs[at] = (first + used, length - used)
        self._loose -= used
        return list(range(first, first + used))

    def _run_for(self, count: int, after: int | None) -> int:
        if after is not None:
            at = bisect_left(self._runs, (after + 1, 0))
            if at < len(self._runs) and self._runs[at][0] == after + 1:
                return at
        places = range(len(self._runs))
        fitting = [at for at in places if self._runs[at][1] >= count]
        if fitting:
            return min(fitting, key=lambda at: self._runs[at][1])
        return max(places, key=lambda at: self._runs[at][1])

    def _give_back(self, block: int) -> None:
        first, length = block, 1
        at = bisect_left(self._runs, (block, 0))
        if at < len(self._runs) and self._runs[at][0] == block + 1:
            length += self._runs.pop(at)[1]
        if at and sum(self._runs[at - 1]) == block:
            before = self._runs.pop(at - 1)
            first, length = before[0], before[1] + length
        insort(self._runs, (first, length))
        self._loose += 1
