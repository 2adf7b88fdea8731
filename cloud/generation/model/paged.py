"""The paged layout: one pool of blocks, and a table of blocks per request (Kwon et al. 2023, "PagedAttention").

The engine's allocator prefers runs of neighbouring blocks (``scheduling/blocks.py``). A request whose blocks are one
run is read as a view, as fast as a slot; only a request in several runs is gathered.
"""

import itertools
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from isthmus.cloud.generation.model.kv import KVCache, KVShape, Span, attend_one, causal, check_follows


class PagedCache(KVCache):
    """``blocks`` blocks of ``block_tokens`` tokens each are allocated at once."""

    def __init__(self, shape: KVShape, blocks: int, block_tokens: int) -> None:
        self._shape = shape
        self._block_tokens = block_tokens
        self._keys_LKCD = shape.empty(columns=blocks * block_tokens)
        self._values_LKCD = shape.empty(columns=blocks * block_tokens)
        self._stored: dict[int, int] = {}
        self._spans: Sequence[Span] = ()
        self._masks: list[Tensor | None] = []
        self._columns: list[slice | Tensor] = []
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
            out_THD[rows] = attend_one(queries_THD[rows], keys_KCD[:, columns], values_KCD[:, columns], mask)
        return out_THD

    def end(self) -> None:
        for span in self._spans:
            self._stored[span.id] = span.end

    def drop(self, ids: Iterable[int]) -> None:
        for id in ids:
            self._stored.pop(id, None)

    def tokens(self, id: int) -> int:
        return self._stored.get(id, 0)

    def _places(self, span: Span, device: torch.device) -> slice | Tensor:
        """Returns the columns of the request's tokens: one slice if its blocks are one run, else their indices."""
        used = span.blocks[: -(-span.end // self._block_tokens)]
        if all(later == earlier + 1 for earlier, later in itertools.pairwise(used)):
            start = used[0] * self._block_tokens
            return slice(start, start + span.end)
        return self._indices(span.blocks, 0, span.end, device)

    def _written(self, span: Span, device: torch.device) -> Tensor:
        return self._indices(span.blocks, span.first, span.end, device)

    def _indices(self, blocks: Sequence[int], first: int, end: int, device: torch.device) -> Tensor:
        positions = torch.arange(first, end, device=device)
        table = torch.tensor(blocks, dtype=torch.int64, device=device)
        return table[positions // self._block_tokens] * self._block_tokens + positions % self._block_tokens
