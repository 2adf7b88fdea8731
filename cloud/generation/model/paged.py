"""The paged layout: one pool of blocks, and a table of blocks per request (Kwon et al. 2023, "PagedAttention").

The engine's allocator prefers runs of neighbouring blocks (``scheduling/blocks.py``). A request whose blocks are one
run is read as a view, as fast as a slot; one in a few runs is put together of them, and one in many is gathered token
by token. Blocks may be in several requests' tables; the engine sees to it that nobody writes to those.
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import Final

import torch
from torch import Tensor

from isthmus.cloud.generation.model.kv import KVCache, KVShape, Span, attend_one, causal, check_follows

_MOST_RUNS: Final = 8
"""Runs up to which a request is put together of views, which are copied as a whole."""


class PagedCache(KVCache):
    """``blocks`` blocks of ``block_tokens`` tokens each are allocated at once."""

    movable = True

    def __init__(self, shape: KVShape, blocks: int, block_tokens: int) -> None:
        self._shape = shape
        self._block_tokens = block_tokens
        self._keys_LKCD = shape.empty(columns=blocks * block_tokens)
        self._values_LKCD = shape.empty(columns=blocks * block_tokens)
        self._stored: dict[int, int] = {}
        self._spans: Sequence[Span] = ()
        self._masks: list[Tensor | None] = []
        self._columns: list[list[slice] | Tensor] = []
        self._written_T = torch.empty(0, dtype=torch.int64)

    def begin(self, spans: Sequence[Span]) -> None:
        device = torch.device(self._shape.device)
        for span in spans:
            check_follows(span, self.tokens(span.id))
            if len(span.blocks) * self._block_tokens < span.end:
                raise ValueError(f"request {span.id}: {len(span.blocks)} blocks do not hold {span.end} tokens")
        self._spans = spans
        self._masks = [causal(span, device) for span in spans]
        self._columns = [self._places(span, device) for span in spans]
        self._written_T = torch.cat([self._written(span, device) for span in spans])

    def attend(self, layer: int, queries_THD: Tensor, keys_TKD: Tensor, values_TKD: Tensor) -> Tensor:
        keys_KCD, values_KCD = self._keys_LKCD[layer], self._values_LKCD[layer]
        keys_KCD.index_copy_(1, self._written_T, keys_TKD.transpose(0, 1))
        values_KCD.index_copy_(1, self._written_T, values_TKD.transpose(0, 1))
        out_THD = torch.empty_like(queries_THD)
        for span, mask, columns in zip(self._spans, self._masks, self._columns, strict=True):
            rows = slice(span.start, span.start + span.count)
            out_THD[rows] = attend_one(queries_THD[rows], _read(keys_KCD, columns), _read(values_KCD, columns), mask)
        return out_THD

    def end(self) -> None:
        for span in self._spans:
            self._stored[span.id] = span.end

    def drop(self, ids: Iterable[int]) -> None:
        for id in ids:
            self._stored.pop(id, None)

    def tokens(self, id: int) -> int:
        return self._stored.get(id, 0)

    def begin_shared(self, id: int, tokens: int) -> None:
        """Notes that a request's first ``tokens`` tokens are in its blocks already, computed by others.

        Raises ValueError for a request that has tokens here.
        """
        if id in self._stored:
            raise ValueError(f"request {id} has {self._stored[id]} tokens in the cache already")
        self._stored[id] = tokens

    def read(self, id: int, blocks: Sequence[int], first: int, end: int) -> tuple[Tensor, Tensor]:
        places = self._indices(blocks, first, end, torch.device(self._shape.device))
        return self._keys_LKCD[:, :, places], self._values_LKCD[:, :, places]

    def place(self, id: int, blocks: Sequence[int], keys_LKPD: Tensor, values_LKPD: Tensor) -> None:
        self.begin_shared(id, keys_LKPD.shape[2])
        places = self._indices(blocks, 0, keys_LKPD.shape[2], torch.device(self._shape.device))
        self._keys_LKCD[:, :, places] = keys_LKPD.to(self._shape.device)
        self._values_LKCD[:, :, places] = values_LKPD.to(self._shape.device)

    def copy(self, source: int, target: int) -> None:
        """Copies one block to another, in all layers."""
        for stored_LKCD in (self._keys_LKCD, self._values_LKCD):
            from_C, to_C = (slice(at * self._block_tokens, (at + 1) * self._block_tokens) for at in (source, target))
            stored_LKCD[:, :, to_C] = stored_LKCD[:, :, from_C]

    def _places(self, span: Span, device: torch.device) -> list[slice] | Tensor:
        """Returns the columns of the request's tokens: a slice per run of blocks, or the indices if they are many."""
        used = span.blocks[: -(-span.end // self._block_tokens)]
        ends = [at for at, (earlier, later) in enumerate(itertools.pairwise(used), 1) if later != earlier + 1]
        if len(ends) >= _MOST_RUNS:
            return self._indices(span.blocks, 0, span.end, device)
        runs = []
        for first, last in itertools.pairwise([0, *ends, len(used)]):
            tokens = min(last * self._block_tokens, span.end) - first * self._block_tokens
            runs.append(slice(used[first] * self._block_tokens, used[first] * self._block_tokens + tokens))
        return runs

    def _written(self, span: Span, device: torch.device) -> Tensor:
        return self._indices(span.blocks, span.first, span.end, device)

    def _indices(self, blocks: Sequence[int], first: int, end: int, device: torch.device) -> Tensor:
        positions = torch.arange(first, end, device=device)
        table = torch.tensor(blocks, dtype=torch.int64, device=device)
        return table[positions // self._block_tokens] * self._block_tokens + positions % self._block_tokens


def _read(stored_KCD: Tensor, columns: list[slice] | Tensor) -> Tensor:
    """Returns these columns, (K, C, D): a view if they are one run."""
    if isinstance(columns, Tensor):
        return stored_KCD[:, columns]
    if len(columns) == 1:
        return stored_KCD[:, columns[0]]
    return torch.cat([stored_KCD[:, each] for each in columns], dim=1)
