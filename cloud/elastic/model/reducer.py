"""PURE: the interface of reducers, which remove tokens inside a block for a gamma below 0, and the merging reducer.

A reducer receives a block's tokens between attention and MLP and returns fewer. The other reducer is in pruning.py.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from isthmus.cloud.elastic.model.merging import match, merge, mergeable
from isthmus.cloud.elastic.scheduling.merge_order import DEFAULT_ORDER, MergeOrder


class Reducer(Protocol):
    """Removes tokens. The shapes of results depend only on shapes and counts, so models compile and can be captured."""

    most: int
    """The lowest gamma is minus this."""

    def counts(self, gamma: int) -> tuple[int, ...]:
        """Returns how many tokens are removed at each layer, including the last one (without effect there)."""

    def reduce(
        self, layer: int, tokens_BND: Tensor, keys_BHNd: Tensor, sizes_BN: Tensor | None, count: int
    ) -> tuple[Tensor, Tensor | None]:
        """Removes ``count`` tokens, never a protected one.

        Returns the remaining tokens and how many input tokens each of them represents (None: one each).
        """

    def operations(self, layer: int, tokens: int, count: int) -> int:
        """Returns the multiply-adds per image for the removal of ``count`` of ``tokens``."""


class Merging:
    """Token merging: |gamma| tokens per layer, or the numbers of ``schedules[gamma]``, at most half of the tokens."""

    def __init__(
        self,
        schedules: Mapping[int, Sequence[int]],
        *,
        tokens: int,
        depth: int,
        width: int,
        heads: int,
        protected: int,
        order: MergeOrder = DEFAULT_ORDER,
    ) -> None:
        """Raises ValueError for impossible schedules."""
        self.most = tokens
        self.order: MergeOrder = order
        self.schedules = {gamma: tuple(schedule) for gamma, schedule in schedules.items()}
        self._shape = (tokens, depth, width, heads, protected)
        for gamma, schedule in self.schedules.items():
            if gamma >= 0 or len(schedule) != depth or not all(-tokens <= change <= 0 for change in schedule):
                raise ValueError(
                    f"schedule of gamma {gamma}: {schedule}; it needs a negative gamma and {depth} numbers from "
                    f"{-tokens} to 0"
                )

    def counts(self, gamma: int) -> tuple[int, ...]:
        tokens, depth, _, _, protected = self._shape
        found = []
        for change in self.schedules.get(gamma, (min(gamma, 0),) * depth):
            found.append(mergeable(tokens, -change, protected))
            tokens -= found[-1]
        return tuple(found)

    def reduce(
        self, layer: int, tokens_BND: Tensor, keys_BHNd: Tensor, sizes_BN: Tensor | None, count: int
    ) -> tuple[Tensor, Tensor | None]:
        return merge(tokens_BND, sizes_BN, match(keys_BHNd.mean(dim=1), count, self._shape[4], self.order))

    def operations(self, layer: int, tokens: int, count: int) -> int:
        _, _, width, heads, protected = self._shape
        receiving = -(-(tokens - protected) // 2)
        return receiving * (tokens - protected - receiving) * (width // heads) + receiving * count * width
