"""Runs the steps of the engine on the model, and draws the tokens."""

from collections.abc import Sequence
from typing import Protocol

import torch

from isthmus.cloud.generation.model.kv import KVCache, KVShape, Span
from isthmus.cloud.generation.model.llama import Llama
from isthmus.cloud.generation.model.padded import PaddedCache
from isthmus.cloud.generation.model.paged import PagedCache
from isthmus.cloud.generation.model.sampler import draw
from isthmus.cloud.generation.model.slots import SlotCache
from isthmus.cloud.generation.model.swap import SwapPool
from isthmus.cloud.generation.scheduling.policy import Limits
from isthmus.cloud.generation.scheduling.step import Step


class Executor(Protocol):
    """Runs steps one at a time, on the thread that calls it."""

    def run(self, step: Step) -> dict[int, int]:
        """Returns the token that each row which draws has drawn. An error fails the whole step."""

    def drop(self, ids: Sequence[int]) -> None:
        """Forgets these requests."""


class ModelExecutor:
    """An executor that runs the model with one layout of the KV cache.

    After an error in a step, what the cache has of the step's requests is not defined; the engine drops them. With
    ``pool``, preempted requests wait there with their keys and values; only slots can be swapped. Only the paged layout
    can share what requests that begin alike have computed.
    """

    def __init__(self, model: Llama, cache: KVCache, pool: SwapPool | None = None) -> None:
        if pool is not None and not isinstance(cache, SlotCache):
            raise ValueError("only the layout 'slots' can be swapped")
        self._model = model
        self._cache = cache
        self._pool = pool

    def drop(self, ids: Sequence[int]) -> None:
        self._cache.drop(ids)
        if self._pool is not None:
            self._pool.drop(ids)

    def close(self) -> None:
        """Ends the pool's thread."""
        if self._pool is not None:
            self._pool.close()

    def _swap(self, step: Step) -> None:
        if not step.swap_out and not step.swap_in:
            return
        assert self._pool is not None and isinstance(self._cache, SlotCache), "the engine swaps if there is a pool"
        for id in step.swap_out:
            self._pool.put(id, *self._cache.taken(id))
        for id in step.swap_in:
            self._cache.place(id, (), *self._pool.take(id))

    def _share(self, step: Step) -> None:
        for id, shared in step.shared:
            assert isinstance(self._cache, PagedCache), "only blocks can be shared"
            self._cache.begin_shared(id, shared.tokens)
            if shared.copy is not None:
                self._cache.copy(*shared.copy)

    def run(self, step: Step) -> dict[int, int]:
        self._swap(step)
        self._share(step)
        spans: list[Span] = []
        ids: list[int] = []
        positions: list[int] = []
        wanted: list[int] = []
        for row in step.rows:
            spans.append(Span(row.id, len(ids), row.first, len(row.tokens), row.blocks))
            ids += row.tokens
            positions += range(row.first, row.first + len(row.tokens))
            if row.draws:
                wanted.append(len(ids) - 1)
        device = self._model.device
        self._cache.begin(spans)
        logits_NV = self._model(
            torch.tensor(ids, device=device),
            torch.tensor(positions, device=device),
            torch.tensor(wanted, dtype=torch.int64, device=device),
            self._cache,
        )
        self._cache.end()
        drawing = [row for row in step.rows if row.draws]
        return {
            row.id: draw(logits_V, row.request.sampling, row.first + len(row.tokens))
            for row, logits_V in zip(drawing, logits_NV.cpu().numpy(), strict=True)
        }


def kv_shape(model: Llama) -> KVShape:
    """Returns what a layout allocates by."""
    config = model.config
    return KVShape(config.layers, config.kv_heads, config.head_dim, model.dtype, model.device)


def make_cache(layout: str, model: Llama, limits: Limits) -> KVCache:
    """Returns an empty cache for the model: "slots", "paged" or "padded". Raises ValueError for another name."""
    shape = kv_shape(model)
    if layout == "slots":
        return SlotCache(shape)
    if layout == "paged":
        return PagedCache(shape, limits.blocks, limits.block_tokens)
    if layout == "padded":
        return PaddedCache(shape)
    raise ValueError(f"no layout {layout!r}; known are slots, paged and padded")
