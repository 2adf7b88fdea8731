"""Which public samples a device's student is distilled on (spec 1, section 6; Eq. 5.5, SelectData of Alg. 7).

Pure: numpy in, indices out. Axes: K prototype rows, N public samples, C classes, B one block of public samples.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Wide = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

BLOCK_ROWS: Final = 1024
"""Public samples per block: its similarities to 300 rows are 1.2 MB of float32, so that they stay in cache."""

GROUP_ROWS: Final = 512
"""Prototypes per pass over the public set. Bounds the candidates in memory whatever the number of prototypes."""

_SAMPLE: Final = 16_384
"""Public samples from which a pass guesses its floors."""

_SCALE: Final = float(1 << 26)
"""Unit vectors are rounded to multiples of 2**-26, finer than the float32 they come from. Products of two are then
integers of at most 52 bits, and a float64 sum of them is exact: equal samples get equal similarities wherever they
stand and in whatever order the matrix product adds, so that ties and blocks change nothing."""

_DENSE: Final = 64
"""Where a float32 sieve lets through more than one pair in this many, a float64 product of all is cheaper."""


class Strategy(Protocol):
    """(prototypes_KC, sizes_K, probabilities_NC, n, rng) -> sorted-by-pick indices_S, no duplicates."""

    def __call__(
        self,
        prototypes_KC: Floats,
        sizes_K: npt.NDArray[np.int32],
        probabilities_NC: Floats,
        samples_per_row: int,
        rng: np.random.Generator,
    ) -> Indices: ...


def select_cosine(
    prototypes_KC: Floats, probabilities_NC: Floats, samples_per_row: int, *, block_rows: int = BLOCK_ROWS
) -> Indices:
    """SelectData: each prototype in turn takes the n most cosine-similar public samples not yet taken.

    Returns min(K * n, N) indices in the order taken, ties to the lower index, whatever ``block_rows``. Similarities are
    told apart down to about 1e-7 (decision 0007); nearer ones are ordered by their rounding, the same everywhere.
    ``probabilities_NC`` may be memory-mapped; at most ``GROUP_ROWS`` x ``block_rows`` similarities exist at a time.
    Raises ValueError for shapes that do not match, non-finite values, or zero rows.

    A row can be robbed of at most k * n samples by the k rows before it in its group, so its n(k + 1) best are all
    that can matter: one pass over the public set collects them for a group of rows, and the greedy choice is then
    made on these candidates alone. What earlier groups took is left out of the pass.
    """
    _check(prototypes_KC, probabilities_NC, samples_per_row)
    queries_KC = _rounded_unit(prototypes_KC)
    public = _Public(probabilities_NC, block_rows, np.zeros(len(probabilities_NC), dtype=bool))
    picked: list[Indices] = []
    for start in range(0, len(queries_KC), GROUP_ROWS):
        group_KC = queries_KC[start : start + GROUP_ROWS]
        keep_K = np.minimum(samples_per_row * np.arange(1, len(group_KC) + 1), public.free)
        for candidates_M in _best_candidates(group_KC, public, keep_K):
            free = candidates_M[~public.taken_N[candidates_M]][:samples_per_row]
            public.taken_N[free] = True
            picked.append(free)
    return np.concatenate(picked)


@dataclass(frozen=True)
class _Public:
    """The public set and which of it earlier rows took."""

    probabilities_NC: Floats
    block_rows: int
    taken_N: npt.NDArray[np.bool_]

    @property
    def free(self) -> int:
        return len(self.taken_N) - int(np.count_nonzero(self.taken_N))

    def blocks(self) -> Iterator[tuple[Indices, Wide]]:
        """(index_B, rounded unit vectors_BC) of the samples not taken, in order."""
        for start in range(0, len(self.taken_N), self.block_rows):
            block_BC = self.probabilities_NC[start : start + self.block_rows]
            index_B = np.flatnonzero(~self.taken_N[start : start + self.block_rows])
            if len(index_B) < len(block_BC):
                block_BC = block_BC[index_B]
            if len(index_B):
                yield index_B + start, _rounded_unit(block_BC)


def _best_candidates(queries_KC: Wide, public: _Public, keep_K: Indices) -> list[Indices]:
    """Per row its ``keep`` most similar free samples, best first, ties to the lower index."""
    found = _sweep(queries_KC, public, keep_K, _likely_floors(queries_KC, public, keep_K))
    short = np.flatnonzero([len(indices) < keep for indices, keep in zip(found, keep_K, strict=True)])
    if len(short):
        # A guess was too high. These rows go again without one.
        again = _sweep(queries_KC[short], public, keep_K[short], np.full(len(short), -np.inf))
        for row, indices in zip(short, again, strict=True):
            found[row] = indices
    return found


def _likely_floors(queries_KC: Wide, public: _Public, keep_K: Indices) -> Wide:
    """A similarity per row that its ``keep`` best probably exceed, and few others: from every so-manyth sample.

    With a share m of the public set, the keep-th best stands near rank keep * m in the sample, give or take its root.
    """
    samples = len(public.taken_N)
    stride = samples // _SAMPLE | 1
    if stride == 1:
        return np.full(len(queries_KC), -np.inf)
    sample_MC = _rounded_unit(public.probabilities_NC[::stride][~public.taken_N[::stride]])
    similarities_KM = queries_KC @ sample_MC.T
    expected_K = keep_K / stride
    rank_K = np.ceil(expected_K + 3 * np.sqrt(expected_K) + 3).astype(np.int64)
    # One less, so that what ties with the guess is above it.
    floors = [
        float(np.partition(row_M, -rank)[-rank]) - 1 if rank <= len(row_M) else -np.inf
        for row_M, rank in zip(similarities_KM, rank_K, strict=True)
    ]
    return np.array(floors)


def _sweep(queries_KC: Wide, public: _Public, keep_K: Indices, floor_K: Wide) -> list[Indices]:
    """One pass: per row its ``keep`` best above its floor, best first, ties to the lower index; fewer if there are.

    The floors rise at every merge to the row's worst kept candidate; merges come when as many candidates wait as are
    kept, so their number grows with the logarithm of N and what waits stays within the kept plus one block.
    """
    rows = len(queries_KC)
    sieve = _Sieve(queries_KC)
    kept: list[tuple[Wide, Indices]] = [(np.empty(0), np.empty(0, np.int64)) for _ in range(rows)]
    waiting: list[tuple[Indices, Indices, Wide]] = []
    floor_K = floor_K.copy()
    room = 2 * int(keep_K.sum())
    count = 0
    for index_B, block_BC in public.blocks():
        row, column, similarity = sieve.above(block_BC, floor_K)
        waiting.append((row, index_B[column], similarity))
        count += len(row)
        if count >= room:
            kept, waiting, count = _merge(kept, waiting, keep_K), [], 0
            full = np.array([len(part[0]) for part in kept]) == keep_K
            floor_K[full] = [kept[index][0][-1] for index in np.flatnonzero(full)]
    if waiting:
        kept = _merge(kept, waiting, keep_K)
    return [indices for _, indices in kept]


class _Sieve:
    """Pairs of a row and a sample whose exact similarity exceeds the row's floor.

    A float32 product finds all that can, and the few it lets through are computed exactly. Where near-one-hot samples
    crowd at the floors, closer than float32 tells apart, the product is taken of what a sample lacks to its corner
    (the one-hot vector of its largest class) instead: small numbers with small errors. Where that too lets through
    many, all are computed exactly.
    """

    def __init__(self, queries_KC: Wide) -> None:
        self._queries_KC = queries_KC
        self._narrow_KC = queries_KC.astype(np.float32)
        self._corners = False

    def above(self, block_BC: Wide, floor_K: Wide) -> tuple[Indices, Indices, Wide]:
        """(row, column, exact similarity) of each such pair, by row."""
        most = len(self._queries_KC) * len(block_BC) // _DENSE
        if np.isfinite(floor_K).all():
            if not self._corners:
                flat = np.flatnonzero(self._likely(block_BC, floor_K))
                self._corners = len(flat) > most
            if self._corners:
                flat = np.flatnonzero(self._likely_by_corner(block_BC, floor_K))
            if len(flat) <= most:
                row, column = np.divmod(flat, len(block_BC))
                similarity = np.einsum("mc,mc->m", self._queries_KC[row], block_BC[column])
                sound = similarity > floor_K[row]
                return row[sound], column[sound], similarity[sound]
        similarity_KB = self._queries_KC @ block_BC.T
        flat = np.flatnonzero(similarity_KB > floor_K[:, np.newaxis])
        row, column = np.divmod(flat, len(block_BC))
        return row, column, similarity_KB.ravel()[flat]

    def _likely(self, block_BC: Wide, floor_K: Wide) -> npt.NDArray[np.bool_]:
        """Float32 vectors and sums err by at most (C + 2) 2**-24 of the product of the lengths."""
        margin = (block_BC.shape[1] + 6) * 2.0**-24 * _SCALE**2
        similarity_KB = self._narrow_KC @ block_BC.astype(np.float32).T
        likely_KB: npt.NDArray[np.bool_] = similarity_KB > (floor_K - margin).astype(np.float32)[:, np.newaxis]
        return likely_KB

    def _likely_by_corner(self, block_BC: Wide, floor_K: Wide) -> npt.NDArray[np.bool_]:
        """With s = corner + d: q.s > floor exactly where q.d + (q.corner - floor) > 0, in one product of 2C columns.

        Float32 errs by at most (2C + 4) 2**-24 (|q||d| + |q.corner - floor|). Where the second term exceeds the first
        it decides the sign, so twice the first bounds what can be missed; with d = 0, an exact tie, nothing is let by.
        """
        samples, classes = block_BC.shape
        corner_B = (np.arange(samples), block_BC.argmax(axis=1))
        lacks_BC = block_BC.copy()
        lacks_BC[corner_B] -= _SCALE
        right_BE = np.zeros((samples, 2 * classes), np.float32)
        right_BE[:, :classes] = lacks_BC
        right_BE[:, classes:][corner_B] = 1
        left_KE = np.concatenate(
            [self._narrow_KC, (self._queries_KC * _SCALE - floor_K[:, np.newaxis]).astype(np.float32)], axis=1
        )
        length_B = np.sqrt(np.einsum("bc,bc->b", lacks_BC, lacks_BC))
        margin_B = (4 * classes + 10) * 2.0**-24 * _SCALE * length_B
        likely_KB: npt.NDArray[np.bool_] = left_KE @ right_BE.T > -margin_B.astype(np.float32)
        return likely_KB


def _merge(
    kept: list[tuple[Wide, Indices]], waiting: list[tuple[Indices, Indices, Wide]], keep_K: npt.NDArray[np.int64]
) -> list[tuple[Wide, Indices]]:
    """Per row the ``keep`` best of what was kept and what waits.

    Stable sorts break ties to the lower index: kept candidates come from earlier blocks, and waiting ones stand in
    order of index.
    """
    row = np.concatenate([part[0] for part in waiting])
    by_row = np.argsort(row.astype(np.uint16), kind="stable")  # Of 16 bits: sorted in linear time.
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


def _rounded_unit(rows_RC: Floats) -> Wide:
    wide_RC = rows_RC.astype(np.float64)
    norms_R = np.sqrt((wide_RC * wide_RC).sum(axis=1))
    if not np.isfinite(norms_R).all():
        raise ValueError("the public set holds values that are not numbers")
    wide_RC *= (_SCALE / np.maximum(norms_R, 1e-12))[:, np.newaxis]
    rounded_RC: Wide = np.rint(wide_RC, out=wide_RC)
    return rounded_RC


def _check(prototypes_KC: Floats, probabilities_NC: Floats, samples_per_row: int) -> None:
    if prototypes_KC.ndim != 2 or probabilities_NC.ndim != 2 or prototypes_KC.shape[1] != probabilities_NC.shape[1]:
        raise ValueError(
            f"prototypes {prototypes_KC.shape} and public {probabilities_NC.shape} do not share a label set"
        )
    if len(prototypes_KC) == 0 or len(probabilities_NC) == 0:
        raise ValueError("nothing to select with, or nothing to select from")
    if samples_per_row < 1:
        raise ValueError(f"samples_per_row is {samples_per_row}; it must be at least 1")
    if not np.isfinite(prototypes_KC).all():
        raise ValueError("prototypes hold values that are not numbers")


def cosine(
    prototypes_KC: Floats,
    sizes_K: npt.NDArray[np.int32],
    probabilities_NC: Floats,
    samples_per_row: int,
    rng: np.random.Generator,
) -> Indices:
    """The paper's: see ``select_cosine``. ``sizes_K`` and ``rng`` are not used."""
    return select_cosine(prototypes_KC, probabilities_NC, samples_per_row)


def random(
    prototypes_KC: Floats,
    sizes_K: npt.NDArray[np.int32],
    probabilities_NC: Floats,
    samples_per_row: int,
    rng: np.random.Generator,
) -> Indices:
    """The control: as many public samples as ``cosine`` would take, drawn without regard to the device."""
    count = min(len(prototypes_KC) * samples_per_row, len(probabilities_NC))
    return np.sort(rng.choice(len(probabilities_NC), size=count, replace=False)).astype(np.int64)


def everything(
    prototypes_KC: Floats,
    sizes_K: npt.NDArray[np.int32],
    probabilities_NC: Floats,
    samples_per_row: int,
    rng: np.random.Generator,
) -> Indices:
    """The whole public set."""
    return np.arange(len(probabilities_NC), dtype=np.int64)


STRATEGIES: Final[dict[str, Strategy]] = {"cosine": cosine, "random": random, "all": everything}
