"""Entropic optimal transport from the client's prototypes to public samples, with little room for near-duplicates.

Axes: K rows, M candidates of each row, U different candidates of all rows together, V width of the vectors compared.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from isthmus.distill.selection.interface import (
    Float64s,
    Indices,
    Public,
    Selection,
    Wanted,
    check,
    wanted_count,
)
from isthmus.distill.selection.nearest import best
from isthmus.distill.selection.quota import largest_remainder
from isthmus.distill.selection.space import Space, by_both, by_probability
from isthmus.distill.selection.turns import take_in_turn

EPSILON: Final = 0.05
"""Weight of the entropy, in units of the cost (1 - cosine, at most 2; at most 4 with features)."""

CANDIDATES: Final = 4_000_000
"""The most pairs of row and candidate, but at least twice each row's share."""

_MOST_STEPS: Final = 200
_CLOSE: Final = 1e-3
_CELL: Final = 1 / 32
"""Samples whose unit vectors fall into the same cell of this width in every value are near-duplicates."""


@dataclass(frozen=True)
class Plan:
    """Mass that each row sends to each of its candidates. ``excess`` is how far the fullest column is over its
    capacity, as a share of it.
    """

    mass_KM: Float64s
    excess: float


def transport(wanted: Wanted, public: Public, samples_per_row: int, rng: np.random.Generator) -> Selection:
    """Pick min(K n, N) samples by optimal transport: the whole client is matched at once, no row before another.

    Each prototype has mass by its size and sends it at cost 1 - cosine of probabilities (plus 1 - cosine of features if
    the device sent them). If S samples are picked, a public sample takes at most 1 / S of all mass. It takes less the
    more near-duplicates it has among the candidates: m of a kind take together as much as sqrt(m). Each row then gets
    its share of S by mass, and pairs are taken by falling mass, ties to the lower index. The order of the rows matters
    only between pairs of equal mass.

    Candidates are each row's 2 S nearest by exact similarity, so that even identical rows have a choice. If a very
    confident teacher makes thousands equal, these are the first of them. If there are so many rows that they exceed
    ``CANDIDATES`` pairs, each has fewer candidates, and takes what it then lacks from the nearest free samples. ``rng``
    is not used. Raises ValueError as ``cosine``, and for features that the public set cannot match. After Cuturi,
    "Sinkhorn distances" (NIPS 2013), with upper bounds on the columns as in Benamou et al., "Iterative Bregman
    projections for regularized transportation problems" (2015), section 4.
    """
    check(wanted, public, samples_per_row)
    total = wanted_count(wanted, public, samples_per_row)
    rows = len(wanted.prototypes_KC)
    space = by_probability(wanted, public) if wanted.features_KE is None else by_both(wanted, public)
    counts_K = largest_remainder(wanted.shares_K, total)
    keep = min(2 * total, len(public), max(2 * -(-total // rows), CANDIDATES // rows))
    pool = space.pool()
    found = best(space.queries_KV, pool, np.full(rows, keep))
    index_KM = np.stack([index_M for _, index_M in found])
    cost_KM = space.parts - np.stack([similarity_M for similarity_M, _ in found]) / space.unit
    candidates_U, column = np.unique(index_KM, return_inverse=True)
    column_KM = column.reshape(index_KM.shape)
    room_U = 1 / (np.sqrt(_alike(space, candidates_U)) * total)
    # Every row's own candidates have room for all mass, so every choice of rows finds room (Hall).
    room_U *= max(1.0, 1 / float(room_U[column_KM].sum(axis=1).min()))
    plan = sinkhorn(cost_KM, column_KM, wanted.shares_K, room_U, epsilon=EPSILON)
    taken = _round(plan.mass_KM, index_KM, counts_K)
    lacking_K = counts_K - np.array([len(picks) for picks in taken])
    picked = np.array([index for picks in taken for index in picks], dtype=np.int64)
    pool.taken_N[picked] = True
    return Selection.of(np.concatenate([picked, take_in_turn(space.queries_KV, lacking_K, pool)]))


def sinkhorn(
    cost_KM: Float64s, column_KM: npt.NDArray[np.intp], mass_K: Float64s, room_U: Float64s, *, epsilon: float
) -> Plan:
    """Return the plan P >= 0 on the given pairs that minimises sum P cost + epsilon sum P log P, with rows summing to
    ``mass_K`` and no column over ``room_U``.

    Each row of ``cost_KM`` holds the costs to its own candidates; ``column_KM`` says which these are. Alternating
    projections: rows are scaled to their mass, and columns that exceed their room are scaled down to it. Each row's
    cheapest cost is subtracted first, which changes no plan and keeps the kernel from vanishing. Rows hold to rounding.
    Columns hold within ``excess``: 0.1 %, unless 200 steps end first (for example if there is too little room).
    """
    kernel_KM = np.exp((cost_KM.min(axis=1, keepdims=True) - cost_KM) / epsilon)
    flat, columns = column_KM.ravel(), len(room_U)
    down_U = np.ones(columns)
    for _ in range(_MOST_STEPS):
        scaled_KM = kernel_KM * down_U[column_KM]
        scaled_KM *= (mass_K / scaled_KM.sum(axis=1))[:, np.newaxis]
        load_U = np.bincount(flat, scaled_KM.ravel(), columns)
        excess = float((load_U / room_U).max()) - 1
        if excess <= _CLOSE:
            break
        # load / down is what the column would get unscaled. It is scaled down to its room, never up.
        down_U = np.minimum(1.0, down_U * room_U / np.maximum(load_U, 1e-300))
    return Plan(scaled_KM, excess)


def _alike(space: Space, candidates_U: Indices) -> Float64s:
    """Return how many of the candidates are near-duplicates of each, itself included."""
    block = 1 << 14
    cells = [
        np.rint(space.vectors(candidates_U[start : start + block]) / (np.sqrt(space.unit) * _CELL)).astype(np.int8)
        for start in range(0, len(candidates_U), block)
    ]
    cells_UV = np.ascontiguousarray(np.concatenate(cells))
    rows_U = cells_UV.view(np.dtype((np.void, cells_UV.shape[1]))).ravel()
    _, kind_U, counts = np.unique(rows_U, return_inverse=True, return_counts=True)
    alike_U: Float64s = counts[kind_U].astype(np.float64)
    return alike_U


def _round(mass_KM: Float64s, index_KM: Indices, counts_K: Indices) -> list[list[int]]:
    """Return per row the samples it gets: pairs by falling mass, if the row still needs one and the sample is free.

    Ties go to the lower index, then to the lower row.
    """
    rows, width = mass_KM.shape
    mass, index, row = mass_KM.ravel(), index_KM.ravel(), np.repeat(np.arange(rows), width)
    order = np.lexsort((row, index, -mass))
    taken: list[list[int]] = [[] for _ in range(rows)]
    left = counts_K.tolist()
    missing = sum(left)
    used: set[int] = set()
    for at, to in zip(row[order].tolist(), index[order].tolist(), strict=True):
        if missing == 0:
            break
        if left[at] and to not in used:
            used.add(to)
            taken[at].append(to)
            left[at] -= 1
            missing -= 1
    return taken
