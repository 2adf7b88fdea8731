"""The slots layout: each request has its own rows of keys and values, with its own end. No shifting and no padding."""

from collections.abc import Iterable, Sequence
from typing import Final

import torch
from torch import Tensor

from isthmus.cloud.generation.model.kv import KVCache, KVShape, Span, attend_one, causal, check_follows

_STEP: Final = 64
"""Capacities are multiples of this many tokens."""


class _Slot:
    """One request's keys and values, (L, K, capacity, D) each, of which ``used`` columns are stored."""

    def __init__(self, shape: KVShape, capacity: int) -> None:
        self.keys_LKCD = shape.empty(columns=capacity)
        self.values_LKCD = shape.empty(columns=capacity)
        self.used = 0

    def grow(self, shape: KVShape, capacity: int) -> None:
        keys_LKCD, values_LKCD = self.keys_LKCD, self.values_LKCD
        self.keys_LKCD, self.values_LKCD = shape.empty(columns=capacity), shape.empty(columns=capacity)
        self.keys_LKCD[:, :, : self.used] = keys_LKCD[:, :, : self.used]
        self.values_LKCD[:, :, : self.used] = values_LKCD[:, :, : self.used]


class SlotCache(KVCache):
    """Attention runs per request, over a view of its slot. A slot that is too short is copied to one twice as long."""

    movable = True

    def __init__(self, shape: KVShape) -> None:
        self._shape = shape
        self._slots: dict[int, _Slot] = {}
        self._spans: Sequence[Span] = ()
        self._masks: list[Tensor | None] = []

    def begin(self, spans: Sequence[Span]) -> None:
        for span in spans:
            check_follows(span, self.tokens(span.id))
        for span in spans:
            slot = self._slots.get(span.id)
            if slot is None:
                self._slots[span.id] = _Slot(self._shape, _rounded(span.end + _STEP))
            elif slot.keys_LKCD.shape[2] < span.end:
                slot.grow(self._shape, _rounded(2 * span.end))
        self._spans = spans
        self._masks = [causal(span, torch.device(self._shape.device)) for span in spans]

    def attend(self, layer: int, queries_THD: Tensor, keys_TKD: Tensor, values_TKD: Tensor) -> Tensor:
        out_THD = torch.empty_like(queries_THD)
        for span, mask in zip(self._spans, self._masks, strict=True):
            rows = slice(span.start, span.start + span.count)
            slot = self._slots[span.id]
            keys_KCD, values_KCD = slot.keys_LKCD[layer], slot.values_LKCD[layer]
            keys_KCD[:, span.first : span.end] = keys_TKD[rows].transpose(0, 1)
            values_KCD[:, span.first : span.end] = values_TKD[rows].transpose(0, 1)
            out_THD[rows] = attend_one(queries_THD[rows], keys_KCD[:, : span.end], values_KCD[:, : span.end], mask)
        return out_THD

    def end(self) -> None:
        for span in self._spans:
            self._slots[span.id].used = span.end

    def drop(self, ids: Iterable[int]) -> None:
        for id in ids:
            self._slots.pop(id, None)

    def tokens(self, id: int) -> int:
        slot = self._slots.get(id)
        return 0 if slot is None else slot.used

    def read(self, id: int, blocks: Sequence[int], first: int, end: int) -> tuple[Tensor, Tensor]:
        slot = self._slots[id]
        return slot.keys_LKCD[:, :, first:end].clone(), slot.values_LKCD[:, :, first:end].clone()

    def place(self, id: int, blocks: Sequence[int], keys_LKPD: Tensor, values_LKPD: Tensor) -> None:
        if id in self._slots:
            raise ValueError(f"request {id} is in the cache already")
        slot = self._slots[id] = _Slot(self._shape, _rounded(keys_LKPD.shape[2] + _STEP))
        slot.used = keys_LKPD.shape[2]
        slot.keys_LKCD[:, :, : slot.used] = keys_LKPD
        slot.values_LKCD[:, :, : slot.used] = values_LKPD

    @property
    def bytes(self) -> int:
        """Bytes of keys and values, unused ends of slots included."""
        return sum(slot.keys_LKCD.nbytes + slot.values_LKCD.nbytes for slot in self._slots.values())

    def taken(self, id: int) -> tuple[Tensor, Tensor]:
        """Removes a request and returns its keys and values, (L, K, tokens, D) each."""
        slot = self._slots.pop(id)
        return slot.keys_LKCD[:, :, : slot.used], slot.values_LKCD[:, :, : slot.used]


def _rounded(tokens: int) -> int:
    return -(-tokens // _STEP) * _STEP
