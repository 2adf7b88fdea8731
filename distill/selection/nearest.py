"""The nearest public samples of each row, exactly: one pass over a set of any size; equal samples in order of index.

A set that is spread over several machines is searched shard by shard, and the results are merged (``merge_nearest``).

Axes: K rows, N public samples, V width of the vectors compared, B one block of public samples, M candidates.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from isthmus.distill.selection.interface import Float32s, Float64s, Indices, Rows

BLOCK_ROWS: Final = 1024
"""Public samples per block: its similarities to 300 rows are 1.2 MB of float32, so they stay in cache."""

GROUP_ROWS: Final = 512
"""Rows per pass over the public set. Bounds the similarities in memory whatever the number of rows."""

_SAMPLE: Final = 16_384
"""Public samples from which a pass guesses its floors."""

SCALE: Final = float(1 << 26)
"""Unit vectors are rounded to multiples of 2**-26, finer than the float32 they come from. Products of two are then
integers of at most 52 bits, and a float64 sum of them is exact: equal samples get equal similarities at
every position and in every order of addition, so the block size changes neither ties nor results."""

_DENSE: Final = 64
"""If more than one pair in this many passes the float32 sieve, a float64 product of all is cheaper."""


Nearest = tuple[Float64s, Indices]
"""Similarities and indices of a row's nearest samples, best first, ties to the lower index."""


class Samples(Protocol):
    """Samples that rows choose from: a ``Pool``, or one in shards. Only ``taken_N`` changes."""

    @property
    def taken_N(self) -> npt.NDArray[np.bool_]:
        """Which samples are taken."""

    def best(self, queries_KV: Float64s, keep_K: Indices) -> list[Nearest]:
        """Return per row its ``keep`` best free samples; fewer if fewer are free."""


@dataclass(frozen=True)
class Pool:
    """Samples to choose from, and which of them are taken. Only ``taken_N`` changes.

    ``vectors`` reads rows as rounded vectors (B, V) whose products with the queries are exact in float64; ``longest``
    is the largest possible product. For unit vectors (``rounded_unit``) it is ``SCALE`` squared.
    """

    vectors: Callable[[Rows], Float64s]
    taken_N: npt.NDArray[np.bool_]
    longest: float = SCALE**2
    block_rows: int = BLOCK_ROWS

    @property
    def free(self) -> int:
        return len(self.taken_N) - int(np.count_nonzero(self.taken_N))

    def blocks(self) -> Iterator[tuple[Indices, Float64s]]:
        """Yield (index_B, vectors_BV) of the samples not taken, in order."""
        for start in range(0, len(self.taken_N), self.block_rows):
            free_B = ~self.taken_N[start : start + self.block_rows]
            index_B = np.flatnonzero(free_B) + start
            if len(index_B):
                whole = len(index_B) == len(free_B)
                yield index_B, self.vectors(slice(start, start + self.block_rows) if whole else index_B)

    def best(self, queries_KV: Float64s, keep_K: Indices) -> list[Nearest]:
        return best(queries_KV, self, keep_K)


def best(queries_KV: Float64s, pool: Pool, keep_K: Indices, floor_K: Float64s | None = None) -> list[Nearest]:
    """Return per row the similarities and indices of its ``keep`` best free samples, best first, ties to the lower
    index.

    There are fewer if fewer are free. If ``floor_K`` is given, only samples above their row's floor matter, and a row
    may get fewer still. At most ``GROUP_ROWS`` x ``pool.block_rows`` similarities exist at a time, in addition to those
    kept.
    """
    keep_K = np.minimum(keep_K, pool.free)
    if pool.free == 0:
        return [(np.empty(0), np.empty(0, np.int64))] * len(queries_KV)
    floor_K = np.full(len(queries_KV), -np.inf) if floor_K is None else floor_K
    found: list[Nearest] = []
    for start in range(0, len(queries_KV), GROUP_ROWS):
        group = slice(start, start + GROUP_ROWS)
        found += _best_of_group(queries_KV[group], pool, keep_K[group], floor_K[group])
    return found


def merge_nearest(one: Nearest, other: Nearest, keep: int) -> Nearest:
    """Return the ``keep`` best of two searches of one row over different samples, whichever was made first."""
    similarity = np.concatenate([one[0], other[0]])
    index = np.concatenate([one[1], other[1]])
    order = np.lexsort((index, -similarity))[:keep]
    return similarity[order], index[order]


def _best_of_group(queries_KV: Float64s, pool: Pool, keep_K: Indices, floor_K: Float64s) -> list[Nearest]:
    guess_K = np.maximum(_likely_floors(queries_KV, pool, keep_K), floor_K)
    found = _sweep(queries_KV, pool, keep_K, guess_K)
    few = [len(kept[1]) < keep for kept, keep in zip(found, keep_K, strict=True)]
    short = np.flatnonzero(few & (guess_K > floor_K))
    if len(short):
        # A guess was too high. These rows are searched again without one.
        again = _sweep(queries_KV[short], pool, keep_K[short], floor_K[short])
        for row, kept in zip(short, again, strict=True):
            found[row] = kept
    return found


def _likely_floors(queries_KV: Float64s, pool: Pool, keep_K: Indices) -> Float64s:
    """Return a similarity per row that its ``keep`` best probably exceed, and few others, from an evenly spaced sample.

    With a share m of the public set, the keep-th best is near rank keep * m in the sample, with a deviation of about
    its root.
    """
    samples = len(pool.taken_N)
    stride = samples // _SAMPLE | 1
    if stride == 1:
        return np.full(len(queries_KV), -np.inf)
    sample_MV = pool.vectors(np.arange(0, samples, stride)[~pool.taken_N[::stride]])
    similarities_KM = queries_KV @ sample_MV.T
    expected_K = keep_K / stride
    rank_K = np.ceil(expected_K + 3 * np.sqrt(expected_K) + 3).astype(np.int64)
    # One less, so that a tie with the guess is above it.
    floors = [
        float(np.partition(row_M, -rank)[-rank]) - 1 if rank <= len(row_M) else -np.inf
        for row_M, rank in zip(similarities_KM, rank_K, strict=True)
    ]
    return np.array(floors)


def _sweep(queries_KV: Float64s, pool: Pool, keep_K: Indices, floor_K: Float64s) -> list[Nearest]:
    """Make one pass: return per row its ``keep`` best above its floor, best first, ties to the lower index; fewer if
    there are.

    At every merge a row's floor rises to its worst kept candidate. A merge runs when as many candidates wait as are
    kept. The number of merges therefore grows with the logarithm of N, and at most the kept number plus one block of
    candidates wait.
    """
    rows = len(queries_KV)
    sieve = _Sieve(queries_KV, pool.longest)
    kept: list[Nearest] = [(np.empty(0), np.empty(0, np.int64)) for _ in range(rows)]
    waiting: list[tuple[Indices, Indices, Float64s]] = []
    floor_K = floor_K.copy()
    room = 2 * int(keep_K.sum())
    count = 0
    for index_B, block_BV in pool.blocks():
        row, column, similarity = sieve.above(block_BV, floor_K)
        waiting.append((row, index_B[column], similarity))
        count += len(row)
        if count >= room:
            kept, waiting, count = _merge(kept, waiting, keep_K), [], 0
            full = np.array([len(part[0]) for part in kept]) == keep_K
            floor_K[full] = [kept[index][0][-1] for index in np.flatnonzero(full)]
    if waiting:
        kept = _merge(kept, waiting, keep_K)
    return kept


class _Sieve:
    """Pairs of a row and a sample whose exact similarity exceeds the row's floor.

    A float32 product finds all possible pairs, and the few that pass are computed exactly. If near-one-hot samples
    crowd at the floors, closer than float32 can separate, the product is taken of the difference between a sample and
    its corner (the one-hot vector of its largest class) instead: small numbers have small errors. If many pass that
    too, all are computed exactly.
    """

    def __init__(self, queries_KV: Float64s, longest: float) -> None:
        self._queries_KV = queries_KV
        self._longest = longest
        self._narrow_KV = queries_KV.astype(np.float32)
        self._corners = False

    def above(self, block_BV: Float64s, floor_K: Float64s) -> tuple[Indices, Indices, Float64s]:
        """Return (row, column, exact similarity) of each such pair, by row."""
        most = len(self._queries_KV) * len(block_BV) // _DENSE
        flat: Indices | None = None
        if np.isfinite(floor_K).all():
            if not self._corners:
                flat = np.flatnonzero(self._likely(block_BV, floor_K))
                self._corners = len(flat) > most
            if self._corners:  # Vectors of several parts have no corner.
                single = self._longest == SCALE**2
                flat = np.flatnonzero(self._likely_by_corner(block_BV, floor_K)) if single else None
        if flat is not None and len(flat) <= most:
            row, column = np.divmod(flat, len(block_BV))
            similarity = np.einsum("mv,mv->m", self._queries_KV[row], block_BV[column])
            sound = similarity > floor_K[row]
            return row[sound], column[sound], similarity[sound]
        similarity_KB = self._queries_KV @ block_BV.T
        flat = np.flatnonzero(similarity_KB > floor_K[:, np.newaxis])
        row, column = np.divmod(flat, len(block_BV))
        return row, column, similarity_KB.ravel()[flat]

    def _likely(self, block_BV: Float64s, floor_K: Float64s) -> npt.NDArray[np.bool_]:
        """Return the pairs that may exceed their floor: float32 vectors and sums err by at most (V + 2) 2**-24 of the
        product of the lengths.
        """
        margin = (block_BV.shape[1] + 6) * 2.0**-24 * self._longest
        similarity_KB = self._narrow_KV @ block_BV.astype(np.float32).T
        likely_KB: npt.NDArray[np.bool_] = similarity_KB > (floor_K - margin).astype(np.float32)[:, np.newaxis]
        return likely_KB

    def _likely_by_corner(self, block_BV: Float64s, floor_K: Float64s) -> npt.NDArray[np.bool_]:
        """Return the pairs that may exceed their floor, by their distance from a corner.

        With s = corner + d: q.s > floor exactly if q.d + (q.corner - floor) > 0, in one product of 2C columns. Float32
        errs by at most (2C + 4) 2**-24 (|q||d| + |q.corner - floor|). If the second term exceeds the first, it decides
        the sign, so twice the first bounds what can be missed. With d = 0, an exact tie, no pair passes.
        """
        samples, classes = block_BV.shape
        corner_B = (np.arange(samples), block_BV.argmax(axis=1))
        lacks_BC = block_BV.copy()
        lacks_BC[corner_B] -= SCALE
        right_BE = np.zeros((samples, 2 * classes), np.float32)
        right_BE[:, :classes] = lacks_BC
        right_BE[:, classes:][corner_B] = 1
        left_KE = np.concatenate(
            [self._narrow_KV, (self._queries_KV * SCALE - floor_K[:, np.newaxis]).astype(np.float32)], axis=1
        )
        length_B = np.sqrt(np.einsum("bc,bc->b", lacks_BC, lacks_BC))
        margin_B = (4 * classes + 10) * 2.0**-24 * SCALE * length_B
        likely_KB: npt.NDArray[np.bool_] = left_KE @ right_BE.T > -margin_B.astype(np.float32)
        return likely_KB


def _merge(
    kept: list[Nearest],
    waiting: list[tuple[Indices, Indices, Float64s]],
    keep_K: npt.NDArray[np.int64],
) -> list[Nearest]:
    """Return per row the ``keep`` best of the kept and the waiting candidates.

    Stable sorts break ties to the lower index: kept candidates are from earlier blocks, and waiting ones are in order
    of index.
    """
    row = np.concatenate([part[0] for part in waiting])
    by_row = np.argsort(row.astype(np.uint16), kind="stable")  # 16-bit keys are sorted in linear time.
    index = np.concatenate([part[1] for part in waiting])[by_row]
    similarity = np.concatenate([part[2] for part in waiting])[by_row]
    bounds = np.searchsorted(row[by_row], np.arange(len(kept) + 1))
    merged = []
    for number, (similarities, indices) in enumerate(kept):
        new = slice(bounds[number], bounds[number + 1])
        similarities = np.concatenate([similarities, similarity[new]])
        indices = np.concatenate([indices, index[new]])
        keep = int(keep_K[number])
        if len(similarities) > 4 * keep:
            # A cheap first cut; everything equal to the last kept value stays, so that the sort breaks the ties.
            above = similarities >= np.partition(similarities, -keep)[-keep]
            similarities, indices = similarities[above], indices[above]
        order = np.argsort(-similarities, kind="stable")[:keep]
        merged.append((similarities[order], indices[order]))
    return merged


def rounded_unit(rows_RV: Float32s | Float64s, scale: float = SCALE) -> Float64s:
    """Return each row at length ``scale``, rounded to whole numbers. Raises ValueError for non-finite values."""
    wide_RV = rows_RV.astype(np.float64)
    norms_R = np.sqrt((wide_RV * wide_RV).sum(axis=1))
    if not np.isfinite(norms_R).all():
        raise ValueError("the public set holds values that are not numbers")
    wide_RV *= (scale / np.maximum(norms_R, 1e-12))[:, np.newaxis]
    rounded_RV: Float64s = np.rint(wide_RV, out=wide_RV)
    return rounded_RV
