"""The KV cache behind one interface, with what its three layouts share. Layouts: padded, slots and paged.

Keys are kept as rotated by their positions, so a row may be moved without being computed again.

Axes: T tokens of a step, H query heads, K key-value heads, G queries per key-value head (H / K), D values per head,
C columns (positions) of a row, L layers.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

LAYOUTS: Final = ("slots", "paged", "padded")


@dataclass(frozen=True, slots=True)
class Span:
    """The tokens of one request in a step: rows ``start`` to ``start + count`` of the step, from position ``first``.

    ``blocks`` is the request's table of blocks, which only the paged layout reads. It covers the span's last token.
    """

    id: int
    start: int
    first: int
    count: int
    blocks: tuple[int, ...] = ()

    @property
    def end(self) -> int:
        """The number of tokens that the request has in the cache after the step."""
        return self.first + self.count


@dataclass(frozen=True)
class KVShape:
    """What a layout allocates by: the model's layers and heads, and where its values are kept."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype = torch.float32
    device: str | torch.device = "cpu"

    def empty(self, *rows: int, columns: int) -> Tensor:
        """Returns uninitialised room, (layers, *rows, kv_heads, columns, head_dim)."""
        return torch.empty(
            self.layers, *rows, self.kv_heads, columns, self.head_dim, dtype=self.dtype, device=self.device
        )


class KVCache(ABC):
    """Keys and values of the requests that are under way. One thread owns it.

    A step calls ``begin`` once, then ``attend`` once per layer in order, then ``end``. A request's spans follow one
    another without a gap; after ``drop`` it starts again from position 0.
    """

    @abstractmethod
    def begin(self, spans: Sequence[Span]) -> None:
        """Prepares a step: makes room for each span, and looks up what attention needs.

        Raises ValueError for a span that does not follow the tokens that the cache has of its request.
        """

    @abstractmethod
    def attend(self, layer: int, queries_THD: Tensor, keys_TKD: Tensor, values_TKD: Tensor) -> Tensor:
        """Stores the step's keys and values of one layer, and returns the attended values, (T, H, D)."""

    @abstractmethod
    def end(self) -> None:
        """Notes that the step's tokens are stored in all layers."""

    @abstractmethod
    def drop(self, ids: Iterable[int]) -> None:
        """Forgets these requests and frees their room. Unknown ids are ignored."""

    movable = False
    """Whether ``read`` and ``place`` are there, by which a request moves to another cache."""

    def read(self, id: int, blocks: Sequence[int], first: int, end: int) -> tuple[Tensor, Tensor]:
        """Returns copies of a request's keys and values of the tokens ``first`` to ``end``, (L, K, tokens, D) each."""
        raise NotImplementedError(f"{type(self).__name__} cannot be read; the request's tokens are computed again")

    def place(self, id: int, blocks: Sequence[int], keys_LKPD: Tensor, values_LKPD: Tensor) -> None:
        """Stores a request's keys and values, (L, K, tokens, D) each, as if its tokens had been computed here.

        Raises ValueError for a request that is here already.
        """
        raise NotImplementedError(f"{type(self).__name__} takes no request over")

    @abstractmethod
    def tokens(self, id: int) -> int:
        """Returns the number of tokens that the cache has of a request; 0 if it has none."""


def attend_one(queries_THD: Tensor, keys_KCD: Tensor, values_KCD: Tensor, mask_TC: Tensor | None) -> Tensor:
    """Attention of one request's tokens over its own columns, (T, H, D).

    The queries that share a key-value head stand below one another, so keys and values are read once per group and
    never repeated in memory. ``mask_TC`` is true where a token may look; None: everywhere.
    """
    tokens, heads, dim = queries_THD.shape
    kv_heads = len(keys_KCD)
    group = heads // kv_heads
    stacked_KXD = queries_THD.view(tokens, kv_heads, group, dim).permute(1, 2, 0, 3).reshape(1, kv_heads, -1, dim)
    mask = None if mask_TC is None else mask_TC.repeat(group, 1)
    out = functional.scaled_dot_product_attention(stacked_KXD, keys_KCD[None], values_KCD[None], attn_mask=mask)
    return out.view(kv_heads, group, tokens, dim).permute(2, 0, 1, 3).reshape(tokens, heads, dim)


def causal(span: Span, device: torch.device) -> Tensor | None:
    """Returns the mask of a chunk, (count, end): each token sees the ones before it and itself. One token sees all."""
    if span.count == 1:
        return None
    columns_C = torch.arange(span.end, device=device)
    return columns_C[None] <= torch.arange(span.first, span.end, device=device)[:, None]


def check_follows(span: Span, stored: int) -> None:
    """Raises ValueError if the span does not start where the request's stored tokens end."""
    if span.first != stored:
        raise ValueError(f"request {span.id}: tokens from {span.first} on were given, but {stored} are stored")
