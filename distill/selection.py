"""Which public samples a device's student is distilled on (spec 1, section 6; Eq. 5.5, SelectData of Alg. 7).

Pure: numpy in, indices out. Axes: K prototype rows, N public samples, C classes, B one block of public samples.
"""

from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]

BLOCK_ROWS: Final = 4096
"""Public samples per block: 300 rows of similarities to a block are 5 MB, so that they stay in cache."""

_ROW_MULTIPLE: Final = 16


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
    candidates = _best_candidates(_normalised(prototypes_KC), probabilities_NC, keep, block_rows)
    taken = np.zeros(samples, dtype=bool)
    picked: list[Indices] = []
    for candidates_M in candidates:
        free = candidates_M[~taken[candidates_M]][:samples_per_row]
        taken[free] = True
        picked.append(free)
    return np.concatenate(picked)


def _best_candidates(
    queries_KC: Floats, probabilities_NC: Floats, keep_K: npt.NDArray[np.int64], block_rows: int
) -> list[Indices]:
    """Per row its ``keep`` most similar samples, best first, ties to the lower index."""
    rows = len(queries_KC)
    # Rows and blocks are padded to full tiles: an element of a matrix product may round differently in a partial tile,
    # and equal samples must get equal similarities wherever they stand.
    padded_KC = np.zeros((-(-rows // _ROW_MULTIPLE) * _ROW_MULTIPLE, queries_KC.shape[1]), dtype=np.float32)
    padded_KC[:rows] = queries_KC
    width = -(-min(block_rows, len(probabilities_NC)) // _ROW_MULTIPLE) * _ROW_MULTIPLE
    block_BC = np.zeros((width, queries_KC.shape[1]), dtype=np.float32)
    similarities_KB = np.empty((len(padded_KC), width), dtype=np.float32)
    best: list[tuple[Floats, Indices]] = [(np.empty(0, np.float32), np.empty(0, np.int64)) for _ in range(rows)]
    waiting: list[list[tuple[Floats, Indices]]] = [[] for _ in range(rows)]
    waiting_count = np.zeros(rows, dtype=np.int64)
    # A sample enters a row's candidates only above the row's floor: the similarity of its worst kept candidate.
    floor_K = np.full(rows, -np.inf, dtype=np.float32)
    for start in range(0, len(probabilities_NC), width):
        block = _normalised(np.asarray(probabilities_NC[start : start + width], dtype=np.float32))
        block_BC[: len(block)] = block
        np.matmul(padded_KC, block_BC.T, out=similarities_KB)
        # A block seldom has anything for a row once the floor has risen; its maximum says so at one pass.
        hopeful = np.flatnonzero(similarities_KB[:rows, : len(block)].max(axis=1) > floor_K)
        for row in hopeful:
            similarities_B = similarities_KB[row, : len(block)]
            above = np.flatnonzero(similarities_B > floor_K[row])
            waiting[row].append((similarities_B[above], above + start))
            waiting_count[row] += len(above)
            if len(best[row][0]) + waiting_count[row] >= 2 * keep_K[row]:
                best[row] = _merge(best[row], waiting[row], int(keep_K[row]))
                waiting[row], waiting_count[row] = [], 0
                floor_K[row] = best[row][0][-1]
    return [_merge(best[row], waiting[row], int(keep_K[row]))[1] for row in range(rows)]


def _merge(best: tuple[Floats, Indices], waiting: list[tuple[Floats, Indices]], keep: int) -> tuple[Floats, Indices]:
    """The ``keep`` best of what was kept and what came since. Both are ordered so that a stable sort breaks ties right:
    kept ones come from earlier blocks, and new ones stand in order of index."""
    similarities = np.concatenate([best[0], *(part[0] for part in waiting)])
    indices = np.concatenate([best[1], *(part[1] for part in waiting)])
    if len(similarities) > 4 * keep:
        # Cheap first cut; everything equal to the last kept value stays, so that ties are broken by the sort.
        cut = np.partition(similarities, len(similarities) - keep)[len(similarities) - keep]
        above = similarities >= cut
        similarities, indices = similarities[above], indices[above]
    order = np.argsort(-similarities, kind="stable")[:keep]
    return similarities[order], indices[order]


def _normalised(rows_RC: Floats) -> Floats:
    norms_R1 = np.sqrt(np.einsum("rc,rc->r", rows_RC, rows_RC))[:, None]
    normalised_RC: Floats = rows_RC / np.maximum(norms_R1, np.float32(1e-12))
    return normalised_RC


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
