"""PURE: who owns which block of the KV cache. A request's blocks are kept in as few runs of neighbours as possible.

A run can be read as one view and copied as one piece (Shen et al. 2024, "FastSwitch": block groups).
"""

from bisect import bisect_left, insort
from typing import Final

BLOCK_TOKENS: Final = 16


class BlockTable:
    """``blocks`` blocks of ``block_tokens`` tokens. Owned and free blocks together are always all of them.

    >>> table = BlockTable(4, block_tokens=16)
    >>> table.grow(7, tokens=20), table.free
    ((0, 1), 2)
    >>> table.release(7), table.free
    (2, 4)
    """

    def __init__(self, blocks: int, block_tokens: int = BLOCK_TOKENS) -> None:
        if blocks < 1 or block_tokens < 1:
            raise ValueError(f"{blocks} blocks of {block_tokens} tokens: both must be at least 1")
        self.blocks, self.block_tokens = blocks, block_tokens
        self._owned: dict[int, tuple[int, ...]] = {}
        self._runs: list[tuple[int, int]] = [(0, blocks)]
        """Free runs (first block, length), ascending; neighbouring runs are joined."""
        self.free = blocks

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
        while count:
            taken = self._take(count, after=owned[-1] if owned else None)
            owned += taken
            count -= len(taken)
        self._owned[id] = tuple(owned)
        return self._owned[id]

    def release(self, id: int) -> int:
        """Takes all blocks of ``id`` back and returns how many they were."""
        blocks = self._owned.pop(id, ())
        for block in blocks:
            self._give_back(block)
        self.free += len(blocks)
        return len(blocks)

    def _take(self, count: int, after: int | None) -> list[int]:
        at = self._run_for(count, after)
        first, length = self._runs[at]
        used = min(count, length)
        if used == length:
            del self._runs[at]
        else:
            self._runs[at] = (first + used, length - used)
        self.free -= used
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
