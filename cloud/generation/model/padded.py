"""The padded layout: all rows write to one common column, so a step of decodes is one masked call (BATON, Alg. 1).

A newcomer of P tokens is computed in a slot of its own, at its true positions. With its first decode it joins the
rows: its keys and values are laid right-aligned before the common column C. If P > C, the rows are shifted by P - C
first. Columns at the front that no row uses any more are left out of attention, and removed when they are the most.

Where we differ: BATON pads newcomers and recomputes positions; here positions live in the rotated keys, so a row means
the same wherever it lies, and its answers are those of the request alone.
"""

from collections.abc import Iterable, Sequence
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from isthmus.cloud.generation.model.kv import KVCache, KVShape, Span, check_follows
from isthmus.cloud.generation.model.slots import SlotCache

_ROOM: Final = 128
"""Columns by which the rows are extended at a time."""


class PaddedCache(KVCache):
    """Rows B are added as requests join, and reused when they leave. ``_seen_BC`` is true where a row has a token."""

    def __init__(self, shape: KVShape) -> None:
        self._shape = shape
        self._prefilling = SlotCache(shape)
        self._rows: dict[int, int] = {}
        self._stored: dict[int, int] = {}
        self._free: list[int] = []
        self._column = 0
        self._keys_LBKCD = shape.empty(0, columns=0)
        self._values_LBKCD = shape.empty(0, columns=0)
        self._seen_BC = torch.zeros(0, 0, dtype=torch.bool, device=shape.device)
        self._front = 0
        self._chunks: list[Span] = []
        self._decodes: list[Span] = []
        self._chunk_rows_T = self._decode_rows_T = self._decode_rows_B = torch.empty(0, dtype=torch.int64)

    def begin(self, spans: Sequence[Span]) -> None:
        for span in spans:
            check_follows(span, self.tokens(span.id))
        self._decodes = [span for span in spans if span.count == 1 and span.first > 0]
        chunks = [span for span in spans if span.count > 1 or span.first == 0]
        if any(span.id in self._rows for span in chunks):
            raise ValueError("a request that decodes was given a chunk; the padded layout adds one token at a time")
        for span in self._decodes:
            if span.id not in self._rows:
                self._join(span.id)
        if self._decodes:
            self._trim()
            self._make_room(self._column + 1)
            rows = [self._rows[span.id] for span in self._decodes]
            self._decode_rows_B = torch.tensor(rows, device=self._shape.device)
            self._seen_BC[self._decode_rows_B, self._column] = True
            self._front = int(self._seen_BC.any(dim=0).int().argmax())
        device = self._shape.device
        self._decode_rows_T = torch.tensor([span.start for span in self._decodes], dtype=torch.int64, device=device)
        indices = [index for span in chunks for index in range(span.start, span.start + span.count)]
        self._chunk_rows_T = torch.tensor(indices, dtype=torch.int64, device=device)
        self._chunks, start = [], 0
        for span in chunks:
            self._chunks.append(Span(span.id, start, span.first, span.count))
            start += span.count
        self._prefilling.begin(self._chunks)

    def attend(self, layer: int, queries_THD: Tensor, keys_TKD: Tensor, values_TKD: Tensor) -> Tensor:
        out_THD = torch.empty_like(queries_THD)
        if self._chunks:
            at = self._chunk_rows_T
            out_THD[at] = self._prefilling.attend(layer, queries_THD[at], keys_TKD[at], values_TKD[at])
        if self._decodes:
            at = self._decode_rows_T
            out_THD[at] = self._decoded(layer, queries_THD[at], keys_TKD[at], values_TKD[at])
        return out_THD

    def _decoded(self, layer: int, queries_THD: Tensor, keys_TKD: Tensor, values_TKD: Tensor) -> Tensor:
        """All rows in one call, also those that do not run in this step: their results are not used."""
        heads, dim = queries_THD.shape[1:]
        seen = slice(self._front, self._column + 1)
        keys_BKCD, values_BKCD = self._keys_LBKCD[layer], self._values_LBKCD[layer]
        keys_BKCD[self._decode_rows_B, :, self._column] = keys_TKD
        values_BKCD[self._decode_rows_B, :, self._column] = values_TKD
        rows, kv_heads = keys_BKCD.shape[:2]
        queries_BKGD = queries_THD.new_zeros(rows, kv_heads, heads // kv_heads, dim)
        queries_BKGD[self._decode_rows_B] = queries_THD.view(-1, kv_heads, heads // kv_heads, dim)
        out_BKGD = functional.scaled_dot_product_attention(
            queries_BKGD,
            keys_BKCD[:, :, seen],
            values_BKCD[:, :, seen],
            attn_mask=self._seen_BC[:, None, None, seen],
        )
        return out_BKGD[self._decode_rows_B].reshape(-1, heads, dim)

    def end(self) -> None:
        self._prefilling.end()
        for span in self._decodes:
            self._stored[span.id] = span.end
        self._column += bool(self._decodes)

    def drop(self, ids: Iterable[int]) -> None:
        for id in ids:
            self._prefilling.drop([id])
            self._stored.pop(id, None)
            row = self._rows.pop(id, None)
            if row is not None:
                self._free.append(row)
                self._seen_BC[row] = False
                # What is never read must still be a number: attention multiplies it by zero.
                self._keys_LBKCD[:, row] = 0
                self._values_LBKCD[:, row] = 0
        if not self._rows:
            self._column = self._front = 0

    def tokens(self, id: int) -> int:
        return self._stored[id] if id in self._stored else self._prefilling.tokens(id)

    def _join(self, id: int) -> None:
        """Lays a prefilled request right-aligned before the common column."""
        keys_LKPD, values_LKPD = self._prefilling.taken(id)
        length = keys_LKPD.shape[2]
        self._trim()
        if length > self._column:
            self._shift(length - self._column)
        if not self._free:
            self._add_row()
        row = self._rows[id] = self._free.pop()
        self._stored[id] = length
        columns = slice(self._column - length, self._column)
        self._keys_LBKCD[:, row, :, columns] = keys_LKPD
        self._values_LBKCD[:, row, :, columns] = values_LKPD
        self._seen_BC[row, columns] = True
        self._front = min(self._front, columns.start)

    def _shift(self, by: int) -> None:
        """Moves all rows ``by`` columns to the right."""
        self._make_room(self._column + by)
        for stored in (self._keys_LBKCD, self._values_LBKCD):
            stored[:, :, :, by : self._column + by] = stored[:, :, :, : self._column].clone()
            stored[:, :, :, :by] = 0
        self._seen_BC[:, by : self._column + by] = self._seen_BC[:, : self._column].clone()
        self._seen_BC[:, :by] = False
        self._column += by
        self._front += by

    def _trim(self) -> None:
        """Moves all rows to the left end if most columns lie unused before them."""
        front = self._front
        if front <= self._keys_LBKCD.shape[3] // 2:
            return
        used = slice(front, self._column)
        for stored in (self._keys_LBKCD, self._values_LBKCD):
            stored[:, :, :, : self._column - front] = stored[:, :, :, used].clone()
        self._seen_BC[:, : self._column - front] = self._seen_BC[:, used].clone()
        self._seen_BC[:, self._column - front :] = False
        self._column -= front
        self._front = 0

    def _make_room(self, columns: int) -> None:
        if columns > self._keys_LBKCD.shape[3]:
            self._resize(len(self._seen_BC), columns + _ROOM)

    def _add_row(self) -> None:
        rows = len(self._seen_BC)
        self._resize(rows + 1, max(_ROOM, self._keys_LBKCD.shape[3]))
        self._free.append(rows)

    def _resize(self, rows: int, columns: int) -> None:
        old_rows, old_columns = self._seen_BC.shape
        keys_LBKCD, values_LBKCD, seen_BC = self._keys_LBKCD, self._values_LBKCD, self._seen_BC
        self._keys_LBKCD = self._shape.empty(rows, columns=columns).zero_()
        self._values_LBKCD = self._shape.empty(rows, columns=columns).zero_()
        self._seen_BC = seen_BC.new_zeros(rows, columns)
        self._keys_LBKCD[:, :old_rows, :, :old_columns] = keys_LBKCD
        self._values_LBKCD[:, :old_rows, :, :old_columns] = values_LBKCD
        self._seen_BC[:old_rows, :old_columns] = seen_BC
