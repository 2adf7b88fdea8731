"""Rows that take public samples in turn: the paper's way, each row all of its samples at once, and round-robin."""

from typing import Final

import numpy as np

from isthmus.distill.selection.interface import (
    Floats,
    Indices,
    Public,
    Selection,
    Wanted,
    Wide,
    check,
    wanted_count,
)
from isthmus.distill.selection.nearest import BLOCK_ROWS, GROUP_ROWS, Pool, best
from isthmus.distill.selection.space import Space, by_both, by_probability

CANDIDATES: Final = 4_000_000
"""Candidates that round-robin keeps at most for all rows together, and at least twice what each row takes."""


def cosine(wanted: Wanted, public: Public, samples_per_row: int, rng: np.random.Generator) -> Selection:
    """The paper's: see ``select_cosine``. Sizes, features and ``rng`` are not used."""
    check(wanted, public, samples_per_row)
    return Selection.of(select_cosine(wanted.prototypes_KC, public.probabilities_NC, samples_per_row))


def select_cosine(
    prototypes_KC: Floats, probabilities_NC: Floats, samples_per_row: int, *, block_rows: int = BLOCK_ROWS
) -> Indices:
    """SelectData: each prototype in turn takes the n most cosine-similar public samples not yet taken.

    Returns min(K * n, N) indices in the order taken, ties to the lower index, whatever ``block_rows``. Similarities are
    told apart down to about 1e-7 (decision 0007); nearer ones are ordered by their rounding, the same everywhere.
    ``probabilities_NC`` may be memory-mapped; at most ``GROUP_ROWS`` x ``block_rows`` similarities exist at a time.
    Raises ValueError for shapes that do not match, non-finite values, or zero rows.
    """
    sizes_K = np.ones(len(prototypes_KC), np.int32)
    wanted = Wanted(prototypes_KC, sizes_K)
    public = Public(probabilities_NC, np.full(len(probabilities_NC), -1, np.int64))
    check(wanted, public, samples_per_row)
    space = by_probability(wanted, public)
    return take_in_turn(space, np.full(len(prototypes_KC), samples_per_row), space.pool(block_rows))


def take_in_turn(space: Space, counts_K: Indices, pool: Pool) -> Indices:
    """Each row in turn takes its count of the most similar free samples, which are marked as taken in ``pool``.

    A row can be robbed of at most what the rows before it in its group take, so as many of its best and its own count
    are all that can matter: one pass over the public set collects them for a group of rows, and the greedy choice is
    then made on these candidates alone. What earlier groups took is left out of the pass.
    """
    picked: list[Indices] = [np.empty(0, np.int64)]
    rows = np.flatnonzero(counts_K)
    for start in range(0, len(rows), GROUP_ROWS):
        group = rows[start : start + GROUP_ROWS]
        candidates = best(space.queries_KV[group], pool, np.cumsum(counts_K[group]))
        for row, (_, index_M) in zip(group, candidates, strict=True):
            free = index_M[~pool.taken_N[index_M]][: counts_K[row]]
            pool.taken_N[free] = True
            picked.append(free)
    return np.concatenate(picked)


def round_robin(wanted: Wanted, public: Public, samples_per_row: int, rng: np.random.Generator) -> Selection:
    """Rows take turns, one sample each, until each has n: min(K n, N) samples, ties to the lower index.

    So a row's n-th sample never costs a later row its first. Likeness is the cosine of probabilities alone; where the
    device sent features it is that times the cosine of features, brought from [-1, 1] to [0, 1] (ours; not in the
    paper). Of a large public set a row then sees as many samples of the greatest sum of the two cosines as all rows
    take together, and orders these by the product. ``rng`` is not used. Raises ValueError as ``cosine``, and for
    features that the public set cannot match.
    """
    check(wanted, public, samples_per_row)
    space = by_probability(wanted, public) if wanted.features_KE is None else by_both(wanted, public)
    classes = wanted.prototypes_KC.shape[1]
    total = wanted_count(wanted, public, samples_per_row)
    return Selection.of(_take_by_turns(space, classes, total, space.pool()))


def _take_by_turns(space: Space, classes: int, total: int, pool: Pool) -> Indices:
    """A row whose candidates run out, or soon will, looks again among what is free: nothing nearer was passed over."""
    rows = len(space.queries_KV)
    keep = min(total, max(2 * -(-total // rows), CANDIDATES // rows))
    candidates: list[list[int]] = [[] for _ in range(rows)]
    seen_K = np.zeros(rows, np.int64)
    picked: list[int] = []

    def look_again() -> None:
        left_K = np.array([len(listed) for listed in candidates]) - seen_K
        poor = np.flatnonzero(left_K <= keep // 4)
        found = best(space.queries_KV[poor], pool, np.full(len(poor), keep))
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


def _by_product(space: Space, row: int, classes: int, similarity_M: Wide, index_M: Indices) -> Indices:
    if space.parts == 1:
        return index_M
    index_M = np.sort(index_M)
    probability_M = space.vectors(index_M)[:, :classes] @ space.queries_KV[row, :classes] / space.unit
    feature_M = space.vectors(index_M)[:, classes:] @ space.queries_KV[row, classes:] / space.unit
    return index_M[np.argsort(-probability_M * (1 + feature_M), kind="stable")]
