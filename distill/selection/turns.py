"""Rows that take public samples in turn: the paper's way, each row all of its samples at once, and round-robin."""

from typing import Final

import numpy as np

from isthmus.distill.selection.interface import (
    Float32s,
    Float64s,
    Indices,
    Public,
    Selection,
    Wanted,
    check,
    wanted_count,
)
from isthmus.distill.selection.nearest import BLOCK_ROWS, GROUP_ROWS, Samples
from isthmus.distill.selection.space import Space, by_both, by_probability

CANDIDATES: Final = 4_000_000
"""The most candidates that round-robin keeps for all rows together, but at least twice what each row takes."""


def cosine(wanted: Wanted, public: Public, samples_per_row: int, rng: np.random.Generator) -> Selection:
    """Select as the paper does: see ``select_cosine``. Sizes, features and ``rng`` are not used."""
    check(wanted, public, samples_per_row)
    return Selection.of(select_cosine(wanted.prototypes_KC, public.probabilities_NC, samples_per_row))


def select_cosine(
    prototypes_KC: Float32s, probabilities_NC: Float32s, samples_per_row: int, *, block_rows: int = BLOCK_ROWS
) -> Indices:
    """Run SelectData: each prototype in turn takes the n most cosine-similar public samples not yet taken.

    Returns min(K * n, N) indices in the order taken, ties to the lower index, whatever ``block_rows``. Similarities are
    separated down to about 1e-7 (decision 0007); closer ones are ordered by their rounding, the same on every machine.
    ``probabilities_NC`` may be memory-mapped; at most ``GROUP_ROWS`` x ``block_rows`` similarities exist at a time.

    Raises ValueError for shapes that do not match, non-finite values, or zero rows.
    """
    sizes_K = np.ones(len(prototypes_KC), np.int32)
    wanted = Wanted(prototypes_KC, sizes_K)
    public = Public(probabilities_NC, np.full(len(probabilities_NC), -1, np.int64))
    check(wanted, public, samples_per_row)
    space = by_probability(wanted, public)
    return take_in_turn(space.queries_KV, np.full(len(prototypes_KC), samples_per_row), space.pool(block_rows))


def take_in_turn(queries_KV: Float64s, counts_K: Indices, pool: Samples) -> Indices:
    """Let each row in turn take its count of the most similar free samples, and mark them as taken in ``pool``.

    A row can lose at most as many samples as the rows before it in its group take. So that many of its best, plus its
    own count, are all that can matter. One pass over the public set collects them for a group of rows, and the greedy
    choice is then made on these candidates alone. The pass leaves out what earlier groups took.
    """
    picked: list[Indices] = [np.empty(0, np.int64)]
    rows = np.flatnonzero(counts_K)
    for start in range(0, len(rows), GROUP_ROWS):
        group = rows[start : start + GROUP_ROWS]
        candidates = pool.best(queries_KV[group], np.cumsum(counts_K[group]))
        for row, (_, index_M) in zip(group, candidates, strict=True):
            free = index_M[~pool.taken_N[index_M]][: counts_K[row]]
            pool.taken_N[free] = True
            picked.append(free)
    return np.concatenate(picked)


def round_robin(wanted: Wanted, public: Public, samples_per_row: int, rng: np.random.Generator) -> Selection:
    """Let rows take turns, one sample each, until each has n: min(K n, N) samples, ties to the lower index.

    A row's n-th sample therefore never costs a later row its first. Similarity is the cosine of probabilities. If the
    device sent features, it is that times the cosine of features, mapped from [-1, 1] to [0, 1] (ours; not in the
    paper). Of a large public set a row then considers the samples with the greatest sum of the two cosines, as many as
    all rows take together, and orders these by the product. ``rng`` is not used. Raises ValueError as ``cosine``, and
    for features that the public set cannot match.
    """
    check(wanted, public, samples_per_row)
    space = by_probability(wanted, public) if wanted.features_KE is None else by_both(wanted, public)
    classes = wanted.prototypes_KC.shape[1]
    total = wanted_count(wanted, public, samples_per_row)
    return Selection.of(_take_by_turns(space, classes, total, space.pool()))


def _take_by_turns(space: Space, classes: int, total: int, pool: Samples) -> Indices:
    """Take turns. A row whose candidates run out, or soon will, searches the free samples again; no nearer one was
    passed over.
    """
    rows = len(space.queries_KV)
    keep = min(total, max(2 * -(-total // rows), CANDIDATES // rows))
    candidates: list[list[int]] = [[] for _ in range(rows)]
    seen_K = np.zeros(rows, np.int64)
    picked: list[int] = []

    def look_again() -> None:
        left_K = np.array([len(listed) for listed in candidates]) - seen_K
        poor = np.flatnonzero(left_K <= keep // 4)
        found = pool.best(space.queries_KV[poor], np.full(len(poor), keep))
        for row, (similarity_M, index_M) in zip(poor, found, strict=True):
            candidates[row] = _by_product(space, int(row), classes, similarity_M, index_M).tolist()
            seen_K[row] = 0

    def next_free(row: int) -> int | None:
        listed, at = candidates[row], int(seen_K[row])
        while at < len(listed) and pool.taken_N[listed[at]]:
            at += 1
        seen_K[row] = at + 1
        return listed[at] if at < len(listed) else None

    while len(picked) < total:
        for row in range(min(rows, total - len(picked))):
            pick = next_free(row)
            if pick is None:
                look_again()
                pick = next_free(row)
            assert pick is not None, "as long as samples are wanted, some are free"
            pool.taken_N[pick] = True
            picked.append(pick)
    return np.array(picked, dtype=np.int64)


def _by_product(space: Space, row: int, classes: int, similarity_M: Float64s, index_M: Indices) -> Indices:
    if space.parts == 1:
        return index_M
    index_M = np.sort(index_M)
    probability_M = space.vectors(index_M)[:, :classes] @ space.queries_KV[row, :classes] / space.unit
    feature_M = space.vectors(index_M)[:, classes:] @ space.queries_KV[row, classes:] / space.unit
    return index_M[np.argsort(-probability_M * (1 + feature_M), kind="stable")]
