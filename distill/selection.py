"""Which public samples a device's student is distilled on (spec 1, section 6; Eq. 5.5, SelectData of Alg. 7).

Pure: numpy in, indices out. Axes: K prototype rows, N public samples, C classes, B one block of public samples.
"""

from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Wide = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

BLOCK_ROWS: Final = 2048
"""Public samples per block: 300 rows of similarities to a block are 5 MB, so that they stay in cache."""

_SCALE: Final = float(1 << 26)
"""Unit vectors are rounded to multiples of 2**-26, finer than the float32 they come from. Products of two are then
integers of at most 52 bits, and a float64 sum of them is exact: equal samples get equal similarities wherever they
stand and in whatever order the matrix product adds, so that ties and blocks change nothing."""


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

    Returns min(K * n, N) indices in the order taken, ties to the lower index, whatever ``block_rows``.
    ``probabilities_NC`` may be memory-mapped; at most K x ``block_rows`` similarities exist at a time.
    Raises ValueError for shapes that do not match, non-finite values, or zero rows.

    A row can be robbed of at most k * n samples by the k rows before it, so its n(k + 1) best are all that can matter:
    one pass over the public set collects them, and the greedy choice is then made on these candidates alone.
    """
    _check(prototypes_KC, probabilities_NC, samples_per_row)
    rows, samples = len(prototypes_KC), len(probabilities_NC)
    keep = np.minimum(samples_per_row * np.arange(1, rows + 1), samples)
    candidates = _best_candidates(_rounded_unit(prototypes_KC), probabilities_NC, keep, block_rows)
    taken = np.zeros(samples, dtype=bool)
    picked: list[Indices] = []
    for candidates_M in candidates:
        free = candidates_M[~taken[candidates_M]][:samples_per_row]
        taken[free] = True
        picked.append(free)
    return np.concatenate(picked)


def _best_candidates(
    queries_KC: Wide, probabilities_NC: Floats, keep_K: npt.NDArray[np.int64], block_rows: int
) -> list[Indices]:
    """Per row its ``keep`` most similar samples, best first, ties to the lower index.

    A sample becomes a candidate of a row only above the row's floor, the similarity of its worst kept candidate. The
    floors rise at every merge; merges come when as many candidates wait as are kept, so their number grows with the
    logarithm of N and what waits stays within the kept plus one block.
    """
    rows = len(queries_KC)
    similarities = np.empty(rows * min(block_rows, len(probabilities_NC)))
    kept: list[tuple[Wide, Indices]] = [(np.empty(0), np.empty(0, np.int64)) for _ in range(rows)]
    waiting: list[tuple[Indices, Indices, Wide]] = []
    floor_K = np.full(rows, -np.inf)
    room = 2 * int(keep_K.sum())
    count = 0
    for start in range(0, len(probabilities_NC), block_rows):
        block_BC = _rounded_unit(probabilities_NC[start : start + block_rows])
        similarities_KB = similarities[: rows * len(block_BC)].reshape(rows, len(block_BC))
        np.matmul(queries_KC, block_BC.T, out=similarities_KB)
        flat = np.flatnonzero(similarities_KB > floor_K[:, np.newaxis])
        row, column = np.divmod(flat, len(block_BC))
        waiting.append((row, column + start, similarities_KB.ravel()[flat]))
        count += len(flat)
        if count >= room:
            kept, waiting, count = _merge(kept, waiting, keep_K), [], 0
            full = np.array([len(part[0]) for part in kept]) == keep_K
            floor_K[full] = [kept[index][0][-1] for index in np.flatnonzero(full)]
    if waiting:
        kept = _merge(kept, waiting, keep_K)
    return [indices for _, indices in kept]


def _merge(
    kept: list[tuple[Wide, Indices]], waiting: list[tuple[Indices, Indices, Wide]], keep_K: npt.NDArray[np.int64]
) -> list[tuple[Wide, Indices]]:
    """Per row the ``keep`` best of what was kept and what waits.

    Stable sorts break ties to the lower index: kept candidates come from earlier blocks, and waiting ones stand in
    order of index.
    """
    row = np.concatenate([part[0] for part in waiting])
    by_row = np.argsort(row, kind="stable")
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
