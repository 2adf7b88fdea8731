"""PURE: what takes tokens away inside a block, for a gamma below 0: the interface, and merging behind it.

A reducer sees a block's tokens between attention and MLP and gives fewer back; pruning (pruning.py) is the other one.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from isthmus.cloud.elastic.model.merging import match, merge, mergeable


class Reducer(Protocol):
    """Shapes hang on shapes and counts alone, so what is made of it compiles and can be captured."""

    most: int
    """Down to minus this a gamma may go."""

    def counts(self, gamma: int) -> tuple[int, ...]:
        """How many tokens go at each layer; the last layer's are counted, though nobody would read them."""

    def reduce(
        self, layer: int, tokens_BND: Tensor, keys_BHNd: Tensor, sizes_BN: Tensor | None, count: int
    ) -> tuple[Tensor, Tensor | None]:
        """``count`` tokens fewer, never a protected one, and how many inputs each of the rest stands for (None: one
        each)."""

    def operations(self, layer: int, tokens: int, count: int) -> int:
        """Multiplies (with their adds) that taking ``count`` of ``tokens`` away costs for one image."""


class Merging:
    """Token merging: |gamma| a layer, or as ``schedules[gamma]`` says; at most half of what is there at any layer."""

    def __init__(
        self,
        schedules: Mapping[int, Sequence[int]],
        *,
        tokens: int,
        depth: int,
        width: int,
        heads: int,
        protected: int,
    ) -> None:
        """Raises ValueError for schedules that cannot be."""
        self.most = tokens
        self.schedules = {gamma: tuple(schedule) for gamma, schedule in schedules.items()}
        self._shape = (tokens, depth, width, heads, protected)
        for gamma, schedule in self.schedules.items():
            if gamma >= 0 or len(schedule) != depth or not all(-tokens <= change <= 0 for change in schedule):
                raise ValueError(
                    f"schedule of gamma {gamma}: {schedule}; needed are a negative gamma and {depth} numbers from "
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
        return merge(tokens_BND, sizes_BN, match(keys_BHNd.mean(dim=1), count, self._shape[4]))

    def operations(self, layer: int, tokens: int, count: int) -> int:
        _, _, width, heads, protected = self._shape
        receiving = -(-(tokens - protected) // 2)
        return receiving * (tokens - protected - receiving) * (width // heads) + receiving * count * width
