"""The paper's selection is compared with a plain reference, on any input."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from isthmus.distill.selection import nearest, select_cosine, turns

RESOLUTION = 1e-7
"""Similarities closer than this may be taken in either order: the grid of 2**-26 cannot separate them (0007)."""


def assert_follows_the_printed_algorithm(chosen_S, prototypes_KC, probabilities_NC, samples_per_row):
    """SelectData: each row in turn takes the n most similar samples not yet taken; equal samples in order of index."""
    wide_NC = probabilities_NC.astype(np.float64)
    unit_NC = wide_NC / np.linalg.norm(wide_NC, axis=1, keepdims=True)
    left = set(range(len(probabilities_NC)))
    picks = iter(chosen_S.tolist())
    for prototype_C in prototypes_KC.astype(np.float64):
        similarity_N = unit_NC @ (prototype_C / np.linalg.norm(prototype_C))
        for _ in range(min(samples_per_row, len(left))):
            pick = next(picks)
            assert pick in left, "taken twice"
            assert similarity_N[pick] >= max(similarity_N[index] for index in left) - RESOLUTION
            equal = [index for index in left if (probabilities_NC[index] == probabilities_NC[pick]).all()]
            assert pick == min(equal), "equal samples go by index"
            left.remove(pick)
    assert next(picks, None) is None, "more than asked for"


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
    assert_follows_the_printed_algorithm(chosen, prototypes_KC, probabilities_NC, samples_per_row)
    assert chosen.tolist() == exact_reference(prototypes_KC, probabilities_NC, samples_per_row)


@pytest.fixture(params=[(4, 2), (7, 3)], ids=["groups of 2", "groups of 3"])
def small_passes(request, monkeypatch):
    """Make guessed floors, groups of rows and the sieve work on inputs that are small enough for a test."""
    sample, group = request.param
    monkeypatch.setattr(nearest, "_SAMPLE", sample)
    monkeypatch.setattr(nearest, "GROUP_ROWS", group)
    monkeypatch.setattr(turns, "GROUP_ROWS", group)


@given(problem=problems(), block_rows=st.integers(8, 64))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_guessed_floors_and_groups_of_rows_change_nothing(small_passes, problem, block_rows):
    prototypes_KC, probabilities_NC, samples_per_row = problem
    chosen = select_cosine(prototypes_KC, probabilities_NC, samples_per_row, block_rows=block_rows)
    assert_follows_the_printed_algorithm(chosen, prototypes_KC, probabilities_NC, samples_per_row)
    assert chosen.tolist() == exact_reference(prototypes_KC, probabilities_NC, samples_per_row)


def exact_reference(prototypes_KC, probabilities_NC, samples_per_row):
    """The greedy choice on the whole matrix of exact similarities, without blocks, floors or sieve."""
    exact_KN = nearest.rounded_unit(prototypes_KC) @ nearest.rounded_unit(probabilities_NC).T
    taken_N = np.zeros(len(probabilities_NC), bool)
    picked = []
    for exact_N in exact_KN:
        order_N = np.argsort(-exact_N, kind="stable")
        picked += order_N[~taken_N[order_N]][:samples_per_row].tolist()
        taken_N[picked] = True
    return picked


@pytest.mark.parametrize("sharpness", [0.0, 8.0, 14.0, 18.0, 20.0, 40.0])
@pytest.mark.parametrize("clustered", [False, True])
def test_the_sieve_loses_nothing_however_near_one_hot(sharpness, clustered, monkeypatch):
    """From smooth outputs, over differences that float32 cannot distinguish from a tie, to thousands of exact ties."""
    monkeypatch.setattr(nearest, "_SAMPLE", 1_000)
    rng = np.random.default_rng(int(sharpness))
    classes_N = rng.integers(0, 7, 20_000)
    if clustered:  # The sample still represents the whole, or its guess is found to be too high and is dropped.
        classes_N.sort()
    logits_NC = rng.standard_normal((20_000, 7)) + sharpness * np.eye(7)[classes_N]
    probabilities_NC = (np.exp(logits_NC) / np.exp(logits_NC).sum(axis=1, keepdims=True)).astype(np.float32)
    prototypes_KC = np.concatenate([rng.dirichlet(np.ones(7), 20), probabilities_NC[:20]]).astype(np.float32)
    chosen = select_cosine(prototypes_KC, probabilities_NC, 8)
    assert chosen.tolist() == exact_reference(prototypes_KC, probabilities_NC, 8)


def test_a_guess_that_was_too_high_is_made_good(monkeypatch):
    """Every sample that the guess looks at is the row's best; hardly any other is."""
    monkeypatch.setattr(nearest, "_SAMPLE", 1_000)
    probabilities_NC = np.tile(np.float32([0.5, 0.5]), (21_000, 1))
    probabilities_NC[::21] = [1, 0]
    prototypes_KC = np.float32([[1, 0]] * 300)
    chosen = select_cosine(prototypes_KC, probabilities_NC, 10)
    assert chosen.tolist() == exact_reference(prototypes_KC, probabilities_NC, 10)


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
        (np.ones((2, 3), np.float32), np.full((5, 3), np.inf, np.float32), 1),
        (np.ones((2, 3), np.float32), np.ones((5, 3), np.float32), 0),
    ],
)
def test_refuses_what_makes_no_sense(prototypes_KC, probabilities_NC, samples_per_row):
    with pytest.raises(ValueError):
        select_cosine(prototypes_KC, probabilities_NC, samples_per_row)
