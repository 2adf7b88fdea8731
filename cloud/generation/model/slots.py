"""The slots layout: each request has its own blocks of 64 columns, with its own end. No shifting, no shared beginnings.

The blocks of all requests stand side by side without a gap, so the rows that decode are two batched products: scores
over all blocks at once, and weighted values over all blocks at once. Only the scores, which are small, are put in order
by row in between. Where requests end, blocks move from the end of the pool into the gaps.

Axes, beside those of ``kv.py``: N blocks of the pool, B columns of a block, R rows that decode, M most blocks of a row.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

from isthmus.cloud.generation.model.kv import KVCache, KVShape, Span, attend_one, causal, check_follows
from isthmus.data.memory import give_back

BLOCK: Final = 64
"""Columns of a block."""
_STEP: Final = 8
"""Blocks are read in multiples of this many, since a processor's product is prepared anew for each number of blocks."""


@dataclass
class _Slot:
    """The numbers of a request's blocks in the pool, in order, and how many of their columns are stored."""

    blocks: list[int] = field(default_factory=list)
    used: int = 0


class SlotCache(KVCache):
    """A pool that doubles when it is full, and halves when three quarters of it are free.

    Columns that no request has stored yet are zeros: attention multiplies them by zero, and what a request has left
    there could be infinite.
    """

    movable = True

    def __init__(self, shape: KVShape) -> None:
        self._shape = shape
        self._slots: dict[int, _Slot] = {}
        self._owners: list[tuple[int, int]] = []
        """Of each used block of the pool, the request and the block's place in it."""
        self._keys_LNKBD = shape.empty(0, columns=BLOCK)
        self._values_LNKBD = shape.empty(0, columns=BLOCK)
        self._spans: Sequence[Span] = ()
        self._chunks: list[tuple[Span, Tensor | None, Tensor]] = []
        self._decodes: _Decodes | None = None

    def begin(self, spans: Sequence[Span]) -> None:
        for span in spans:
            check_follows(span, self.tokens(span.id))
        for span in spans:
            self._make_room(span.id, span.end)
        device = torch.device(self._shape.device)
        self._spans = spans
        self._chunks = [
            (span, causal(span, device), torch.tensor(self._slots[span.id].blocks, device=device))
            for span in spans
            if span.count > 1 or span.first == 0
        ]
        decodes = [span for span in spans if span.count == 1 and span.first > 0]
        self._decodes = None
        if decodes:
            tables = [self._slots[span.id].blocks for span in decodes]
            whole = len(decodes) == len(spans)
            spare = len(self._owners)
            uneven = len({len(table) for table in tables}) > 1
            read = _rounded((spare if uneven else max(map(max, tables))) + 1)
            if read > self._keys_LNKBD.shape[1]:
                self._resize(read)
            self._decodes = _Decodes(decodes, tables, spare, read, self._shape, whole)

    def attend(self, layer: int, queries_THD: Tensor, keys_TKD: Tensor, values_TKD: Tensor) -> Tensor:
        keys_NKBD, values_NKBD = self._keys_LNKBD[layer], self._values_LNKBD[layer]
        decodes = self._decodes
        if decodes is not None and decodes.rows_T is None:
            return decodes.attend(queries_THD, keys_TKD, values_TKD, keys_NKBD, values_NKBD)
        out_THD = torch.empty_like(queries_THD)
        for span, mask, blocks in self._chunks:
            rows = slice(span.start, span.start + span.count)
            columns = torch.arange(span.first, span.end, device=blocks.device)
            places = (blocks[columns // BLOCK], slice(None), columns % BLOCK)
            keys_NKBD[places], values_NKBD[places] = keys_TKD[rows], values_TKD[rows]
            if span.first == 0:
                keys_KCD, values_KCD = keys_TKD[rows].transpose(0, 1), values_TKD[rows].transpose(0, 1)
            else:
                keys_KCD, values_KCD = (_in_order(each[blocks], span.end) for each in (keys_NKBD, values_NKBD))
            out_THD[rows] = attend_one(queries_THD[rows], keys_KCD, values_KCD, mask)
        if decodes is not None and decodes.rows_T is not None:
            at = decodes.rows_T
            out_THD[at] = decodes.attend(queries_THD[at], keys_TKD[at], values_TKD[at], keys_NKBD, values_NKBD)
        return out_THD

    def end(self) -> None:
        for span in self._spans:
            self._slots[span.id].used = span.end

    def drop(self, ids: Iterable[int]) -> None:
        for id in ids:
            slot = self._slots.pop(id, None)
            if slot is not None:
                self._free(slot.blocks)

    def tokens(self, id: int) -> int:
        slot = self._slots.get(id)
        return 0 if slot is None else slot.used

    def read(self, id: int, blocks: Sequence[int], first: int, end: int) -> tuple[Tensor, Tensor]:
        own = torch.tensor(self._slots[id].blocks, dtype=torch.int64, device=self._shape.device)
        at = torch.arange(first, end, device=self._shape.device)
        keys, values = (
            each[:, own[at // BLOCK], :, at % BLOCK].permute(1, 2, 0, 3).contiguous()
            for each in (self._keys_LNKBD, self._values_LNKBD)
        )
        return keys, values

    def place(self, id: int, blocks: Sequence[int], keys_LKPD: Tensor, values_LKPD: Tensor) -> None:
        if id in self._slots:
            raise ValueError(f"request {id} is in the cache already")
        tokens = keys_LKPD.shape[2]
        self._make_room(id, tokens)
        slot = self._slots[id]
        for at, block in enumerate(slot.blocks):
            columns = slice(at * BLOCK, min((at + 1) * BLOCK, tokens))
            count = columns.stop - columns.start
            self._keys_LNKBD[:, block, :, :count] = keys_LKPD[:, :, columns]
            self._values_LNKBD[:, block, :, :count] = values_LKPD[:, :, columns]
        slot.used = tokens

    @property
    def bytes(self) -> int:
        """Bytes of keys and values, unused columns and free blocks included."""
        return self._keys_LNKBD.nbytes + self._values_LNKBD.nbytes

    def taken(self, id: int) -> tuple[Tensor, Tensor]:
        """Removes a request and returns its keys and values, (L, K, tokens, D) each."""
        keys, values = self.read(id, (), 0, self.tokens(id))
        self.drop([id])
        return keys, values

    def _make_room(self, id: int, tokens: int) -> None:
        slot = self._slots.setdefault(id, _Slot())
        missing = -(-tokens // BLOCK) - len(slot.blocks)
        if len(self._owners) + missing > self._keys_LNKBD.shape[1]:
            self._resize(max(len(self._owners) + missing, 2 * self._keys_LNKBD.shape[1]))
        for _ in range(missing):
            self._owners.append((id, len(slot.blocks)))
            slot.blocks.append(len(self._owners) - 1)

    def _free(self, blocks: Iterable[int]) -> None:
        """Frees these blocks, each by moving the pool's last block to its place."""
        for block in sorted(blocks, reverse=True):
            last = len(self._owners) - 1
            if block != last:
                id, at = self._owners[last]
                for stored in (self._keys_LNKBD, self._values_LNKBD):
                    stored[:, block] = stored[:, last]
                self._owners[block] = (id, at)
                self._slots[id].blocks[at] = block
            for stored in (self._keys_LNKBD, self._values_LNKBD):
                stored[:, last] = 0
            self._owners.pop()
        if len(self._owners) <= self._keys_LNKBD.shape[1] // 4:
            self._resize(self._keys_LNKBD.shape[1] // 2)

    def _resize(self, blocks: int) -> None:
        used, shrinks = len(self._owners), blocks < self._keys_LNKBD.shape[1]
        for name in ("_keys_LNKBD", "_values_LNKBD"):
            old = getattr(self, name)
            new = self._shape.empty(blocks, columns=BLOCK)
            new[:, :used] = old[:, :used]
            new[:, used:] = 0
            setattr(self, name, new)
        if shrinks:
            del old
            give_back()


class _Decodes:
    """What all layers of a step need to know of the rows that decode; ``read`` blocks of the pool are looked at.

    Blocks of other requests among them are computed too, and their results are not used. The block ``spare`` is of
    nobody.
    """

    def __init__(
        self, spans: Sequence[Span], tables: Sequence[list[int]], spare: int, read: int, shape: KVShape, whole: bool
    ) -> None:
        device = shape.device
        most = max(map(len, tables))
        self._read, self._most, self._scale = read, most, shape.head_dim**-0.5
        self.rows_T = None if whole else torch.tensor([span.start for span in spans], device=device)
        """The rows of the step that decode; None if all do."""
        self._last_R = torch.tensor([table[-1] for table in tables], device=device)
        self._column_R = torch.tensor([span.first % BLOCK for span in spans], device=device)
        # Where a row has fewer blocks than others, its table ends with ``spare``, whose weights are masked ones: zeros.
        shortest = min(range(len(tables)), key=lambda row: len(tables[row]))
        rows_N, places_N = [shortest] * read, [most - 1] * read
        for row, table in enumerate(tables):
            for place, block in enumerate(table):
                rows_N[block], places_N[block] = row, place
        self._table_RM = torch.tensor([table + [spare] * (most - len(table)) for table in tables], device=device)
        self._row_N, self._place_N = torch.tensor(rows_N, device=device), torch.tensor(places_N, device=device)
        ends_R = torch.tensor([span.end for span in spans])
        unseen_RC = torch.arange(most * BLOCK)[None] >= ends_R[:, None]
        mask_RC = torch.zeros(unseen_RC.shape).masked_fill_(unseen_RC, -torch.inf)
        self._mask_R1C = mask_RC.to(device, shape.dtype)[:, None]
        self._by_row: Tensor | None = None
        self._by_block: Tensor | None = None

    def attend(
        self, queries_RHD: Tensor, keys_RKD: Tensor, values_RKD: Tensor, keys_NKBD: Tensor, values_NKBD: Tensor
    ) -> Tensor:
        rows, heads, dim = queries_RHD.shape
        group = heads // keys_RKD.shape[1]
        by_row, by_block = self._orders(heads)
        keys_NKBD[self._last_R, :, self._column_R] = keys_RKD
        values_NKBD[self._last_R, :, self._column_R] = values_RKD
        keys_XBD, values_XBD = keys_NKBD[: self._read].flatten(0, 1), values_NKBD[: self._read].flatten(0, 1)
        queries_XGD = queries_RHD.index_select(0, self._row_N).view(-1, group, dim)
        scores_XGB = torch.bmm(queries_XGD, keys_XBD.transpose(1, 2))
        scores_RHC = scores_XGB.view(-1, BLOCK).index_select(0, by_row).view(rows, heads, -1)
        weights_RHC = torch.add(self._mask_R1C, scores_RHC, alpha=self._scale).softmax(dim=-1)
        weights_XGB = weights_RHC.view(-1, BLOCK).index_select(0, by_block).view(-1, group, BLOCK)
        parts_XGD = torch.bmm(weights_XGB, values_XBD)
        parts_RMX = parts_XGD.view(self._read, -1).index_select(0, self._table_RM.view(-1)).view(rows, self._most, -1)
        return parts_RMX.sum(dim=1).view(rows, heads, dim)

    def _orders(self, heads: int) -> tuple[Tensor, Tensor]:
        """Returns where the scores of a row and head are among those of the blocks, and the other way round."""
        if self._by_row is None or self._by_block is None:
            head_H = torch.arange(heads, device=self._row_N.device)
            self._by_row = (self._table_RM[:, None] * heads + head_H[None, :, None]).flatten()
            self._by_block = ((self._row_N[:, None] * heads + head_H) * self._most + self._place_N[:, None]).flatten()
        return self._by_row, self._by_block


def _in_order(blocks_MKBD: Tensor, end: int) -> Tensor:
    """Returns a request's first ``end`` columns, (K, C, D), of its blocks."""
    kv_heads, dim = blocks_MKBD.shape[1], blocks_MKBD.shape[3]
    return blocks_MKBD.transpose(0, 1).reshape(kv_heads, -1, dim)[:, :end]


def _rounded(blocks: int) -> int:
    """Returns the number of blocks to look at: a power of two up to _STEP, then a multiple of it."""
    power: int = 1 << (blocks - 1).bit_length()
    return power if blocks <= _STEP else -(-blocks // _STEP) * _STEP
