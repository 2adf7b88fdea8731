"""Choose from a public set in shards. Each shard is searched where it is, and the picks are those of one whole search.

Axes: K rows, C classes, M samples of one shard, N samples of all shards in their order, V = C width compared.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from isthmus.distill.selection.interface import Float32s, Float64s, Indices, Wanted
from isthmus.distill.selection.nearest import Nearest, Pool, best, merge_nearest, rounded_unit
from isthmus.distill.selection.turns import take_in_turn

Probabilities = npt.NDArray[Any]
"""Class probabilities of samples, float16 or float32, often memory-mapped."""


@dataclass(frozen=True)
class Search:
    """What one shard is searched for: per row its ``keep`` best samples above its floor that are not taken.

    ``queries_KV`` are rounded unit vectors (``nearest``); ``taken_T`` counts from the shard's first sample.
    """

    queries_KV: Float64s
    keep_K: Indices
    floor_K: Float64s
    taken_T: Indices

    def of(self, probabilities_MC: Probabilities) -> list[Nearest]:
        """Search a shard. Indices count from its first sample. Raises ValueError for values that are not numbers."""
        taken_M = np.zeros(len(probabilities_MC), dtype=bool)
        taken_M[self.taken_T] = True
        pool = Pool(lambda rows: rounded_unit(probabilities_MC[rows]), taken_M)
        return best(self.queries_KV, pool, self.keep_K, self.floor_K)


class Shards(Protocol):
    """A public set in shards, and what searches them: this process, or a cluster."""

    @property
    def sizes(self) -> Sequence[int]:
        """The number of samples of each shard."""

    @property
    def classes(self) -> int: ...

    def search(self, asked: Callable[[int], Search]) -> Iterator[tuple[int, list[Nearest]]]:
        """Search every shard once, in any order, and yield (number of the shard, what was found).

        ``asked`` returns a shard's search. It is called as late as possible, on the caller's thread: what other shards
        have found by then raises the floors.
        """


class ShardsHere:
    """Shards that this process can read. They are searched one after another."""

    def __init__(self, shards: Sequence[Probabilities]) -> None:
        """Raises ValueError if there is no shard, or their widths differ."""
        if not shards or len({shard.shape[1:] for shard in shards}) > 1 or shards[0].ndim != 2:
            raise ValueError(f"no shards of one width: {[shard.shape for shard in shards][:4]}")
        self._shards = shards

    @property
    def sizes(self) -> Sequence[int]:
        return [len(shard) for shard in self._shards]

    @property
    def classes(self) -> int:
        return int(self._shards[0].shape[1])

    def search(self, asked: Callable[[int], Search]) -> Iterator[tuple[int, list[Nearest]]]:
        for number, shard in enumerate(self._shards):
            yield number, asked(number).of(shard)


class ShardedSamples:
    """All samples of some shards, for ``turns.take_in_turn``."""

    def __init__(self, shards: Shards) -> None:
        self._shards = shards
        self._starts = np.cumsum([0, *shards.sizes])
        self.taken_N: npt.NDArray[np.bool_] = np.zeros(int(self._starts[-1]), dtype=bool)

    def best(self, queries_KV: Float64s, keep_K: Indices) -> list[Nearest]:
        """Return per row its ``keep`` best free samples, as one search over all of them would.

        Similarities are exact, so that shards merge in any order. Once a row has its number from some shards, others
        are only searched for samples that are at least as similar as its worst one.
        """
        keep_K = np.minimum(keep_K, len(self.taken_N) - np.count_nonzero(self.taken_N))
        kept: list[Nearest] = [(np.empty(0), np.empty(0, np.int64))] * len(queries_KV)

        def asked(number: int) -> Search:
            floors = [
                similarity_M[-1] - 1 if keep and len(similarity_M) == keep else -np.inf
                for (similarity_M, _), keep in zip(kept, keep_K, strict=True)
            ]
            taken_T = np.flatnonzero(self.taken_N[self._starts[number] : self._starts[number + 1]])
            return Search(queries_KV, keep_K, np.array(floors), taken_T)

        for number, found in self._shards.search(asked):
            kept = [
                merge_nearest(one, (similarity_M, index_M + self._starts[number]), int(keep))
                for one, (similarity_M, index_M), keep in zip(kept, found, keep_K, strict=True)
            ]
        return kept


def select_cosine_in_shards(prototypes_KC: Float32s, shards: Shards, samples_per_row: int) -> Indices:
    """Run SelectData over shards: the picks of ``turns.select_cosine`` over all samples in the order of the shards.

    Returns min(K * n, N) indices in the order taken, ties to the lower index. Raises ValueError for shapes that do not
    match, non-finite values, or zero rows, and what the search of a shard raises.
    """
    queries_KC = Wanted(prototypes_KC, np.ones(len(prototypes_KC), np.int32)).prototypes_KC
    if queries_KC.shape[1] != shards.classes:
        raise ValueError(f"prototypes {queries_KC.shape} and shards of {shards.classes} do not share a label set")
    if samples_per_row < 1:
        raise ValueError(f"samples_per_row is {samples_per_row}; it must be at least 1")
    counts_K = np.full(len(queries_KC), samples_per_row)
    return take_in_turn(rounded_unit(queries_KC), counts_K, ShardedSamples(shards))
