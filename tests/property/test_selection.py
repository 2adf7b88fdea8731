"""Selection against a plain reference, on any input."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.distill.selection import STRATEGIES, select_cosine


def greedy_reference(prototypes_KC, probabilities_NC, samples_per_row):
    """SelectData as printed: each row in turn, the n most similar not yet taken, ties to the lower index."""
    taken: list[int] = []
    for prototype_C in prototypes_KC.astype(np.float64):
        similarity_N = [
            float(np.dot(prototype_C, sample_C) / max(np.linalg.norm(prototype_C) * np.linalg.norm(sample_C), 1e-12))
            for sample_C in probabilities_NC.astype(np.float64)
        ]
        order = sorted(range(len(similarity_N)), key=lambda index: (-round(similarity_N[index], 9), index))
        taken += [index for index in order if index not in taken][:samples_per_row]
    return taken


@st.composite
def problems(draw):
    classes = draw(st.integers(2, 7))
    rows = draw(st.integers(1, 6))
    samples = draw(st.integers(1, 60))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    # Few distinct rows on a coarse grid: ties by the dozen, as with near-one-hot outputs.
    levels = rng.integers(0, 4, size=(draw(st.integers(1, 8)), classes)) + 1e-3
    pool = (levels / levels.sum(axis=1, keepdims=True)).astype(np.float32)
    prototypes_KC = pool[rng.integers(0, len(pool), rows)]
    probabilities_NC = pool[rng.integers(0, len(pool), samples)]
    return prototypes_KC, probabilities_NC, draw(st.integers(1, 9))


@given(problems(), st.integers(1, 64))
@settings(max_examples=200, deadline=None)
def test_equals_the_printed_algorithm_whatever_the_blocks(problem, block_rows):
    prototypes_KC, probabilities_NC, samples_per_row = problem
    chosen = select_cosine(prototypes_KC, probabilities_NC, samples_per_row, block_rows=block_rows)
    assert chosen.tolist() == greedy_reference(prototypes_KC, probabilities_NC, samples_per_row)


@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_takes_the_promised_number_without_duplicates(seed, rows, samples_per_row):
    rng = np.random.default_rng(seed)
    prototypes_KC = rng.dirichlet(np.ones(6), rows).astype(np.float32)
    probabilities_NC = rng.dirichlet(np.full(6, 0.1), 100).astype(np.float32)
    for name in ("cosine", "random"):
        chosen = STRATEGIES[name](
            prototypes_KC, np.ones(rows, np.int32), probabilities_NC, samples_per_row, np.random.default_rng(0)
        )
        assert len(chosen) == min(rows * samples_per_row, 100) == len(set(chosen.tolist()))


def test_large_blocks_and_small_blocks_agree_on_real_valued_input():
    rng = np.random.default_rng(1)
    prototypes_KC = rng.dirichlet(np.ones(28), 37).astype(np.float32)
    probabilities_NC = rng.dirichlet(np.full(28, 0.05), 20_000).astype(np.float32)
    probabilities_NC[5_000:9_000] = probabilities_NC[:4_000]  # exact duplicates far apart
    whole = select_cosine(prototypes_KC, probabilities_NC, 10, block_rows=20_000)
    for block_rows in (333, 4_096):
        assert np.array_equal(whole, select_cosine(prototypes_KC, probabilities_NC, 10, block_rows=block_rows))


@pytest.mark.parametrize(
    ("prototypes_KC", "probabilities_NC", "samples_per_row"),
    [
        (np.ones((2, 3), np.float32), np.ones((5, 4), np.float32), 1),
        (np.ones((0, 3), np.float32), np.ones((5, 3), np.float32), 1),
        (np.ones((2, 3), np.float32), np.ones((0, 3), np.float32), 1),
        (np.full((2, 3), np.nan, np.float32), np.ones((5, 3), np.float32), 1),
        (np.ones((2, 3), np.float32), np.ones((5, 3), np.float32), 0),
    ],
)
def test_refuses_what_makes_no_sense(prototypes_KC, probabilities_NC, samples_per_row):
    with pytest.raises(ValueError):
        select_cosine(prototypes_KC, probabilities_NC, samples_per_row)
