"""Selection over shards makes the picks of one selection over everything, whatever the shards and their order."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from isthmus.distill.selection import Search, ShardsHere, nearest, select_cosine, select_cosine_in_shards, turns
from isthmus.distill.selection.nearest import Nearest
from tests.property.distill.test_selection import exact_reference


class Shuffled(ShardsHere):
    """Searches shards in an order of its own, several begun before the first has ended, as a cluster does."""

    def __init__(self, shards: list[np.ndarray], order: list[int], at_once: int) -> None:
        super().__init__(shards)
        self._order, self._at_once = order, at_once

    def search(self, asked: Callable[[int], Search]) -> Iterator[tuple[int, list[Nearest]]]:
        for start in range(0, len(self._order), self._at_once):
            begun = [(number, asked(number)) for number in self._order[start : start + self._at_once]]
            for number, search in reversed(begun):
                yield number, search.of(self._shards[number])


@st.composite
def problems(draw: st.DrawFn) -> tuple[np.ndarray, list[np.ndarray], int, list[int], int]:
    classes, rows, samples = draw(st.integers(2, 6)), draw(st.integers(1, 7)), draw(st.integers(1, 60))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    levels = rng.integers(0, 4, size=(draw(st.integers(1, 8)), classes)) + 1e-3
    dtype = draw(st.sampled_from([np.float16, np.float32]))
    pool = (levels / levels.sum(axis=1, keepdims=True)).astype(dtype)
    probabilities_NC = pool[rng.integers(0, len(pool), samples)]
    prototypes_KC = pool[rng.integers(0, len(pool), rows)].astype(np.float32)
    cuts = sorted(draw(st.sets(st.integers(1, samples), max_size=6)) - {samples})
    shards = np.split(probabilities_NC, cuts)
    order = draw(st.permutations(range(len(shards))))
    return prototypes_KC, shards, draw(st.integers(1, 9)), order, draw(st.integers(1, 4))


@pytest.fixture(params=[(4, 2), (16_384, 512)], ids=["groups of 2", "groups of 512"])
def passes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make guessed floors and groups of rows work on inputs that are small enough for a test."""
    sample, group = request.param
    monkeypatch.setattr(nearest, "_SAMPLE", sample)
    monkeypatch.setattr(nearest, "GROUP_ROWS", group)
    monkeypatch.setattr(turns, "GROUP_ROWS", group)


@given(problem=problems())
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_shards_in_any_order_make_the_picks_of_the_whole(passes: None, problem) -> None:
    prototypes_KC, shards, samples_per_row, order, at_once = problem
    whole_NC = np.concatenate(shards)
    wanted = exact_reference(prototypes_KC, whole_NC, samples_per_row)
    assert select_cosine(prototypes_KC, whole_NC, samples_per_row).tolist() == wanted
    assert select_cosine_in_shards(prototypes_KC, ShardsHere(shards), samples_per_row).tolist() == wanted
    shuffled = Shuffled(shards, order, at_once)
    assert select_cosine_in_shards(prototypes_KC, shuffled, samples_per_row).tolist() == wanted


@pytest.mark.parametrize("sharpness", [0.0, 8.0, 18.0, 40.0])
@pytest.mark.parametrize("clustered", [False, True])
def test_shards_lose_nothing_however_near_one_hot(
    sharpness: float, clustered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clustered: a shard holds one class, so that what one shard found says nothing about the next."""
    monkeypatch.setattr(nearest, "_SAMPLE", 500)
    rng = np.random.default_rng(int(sharpness))
    classes_N = rng.integers(0, 7, 20_000)
    if clustered:
        classes_N.sort()
    logits_NC = rng.standard_normal((20_000, 7)) + sharpness * np.eye(7)[classes_N]
    probabilities_NC = (np.exp(logits_NC) / np.exp(logits_NC).sum(axis=1, keepdims=True)).astype(np.float16)
    prototypes_KC = np.concatenate([rng.dirichlet(np.ones(7), 20), probabilities_NC[:20]]).astype(np.float32)
    shards = np.split(probabilities_NC, [1, 3_000, 9_999, 15_000])
    wanted = exact_reference(prototypes_KC, probabilities_NC, 8)
    assert select_cosine_in_shards(prototypes_KC, ShardsHere(shards), 8).tolist() == wanted
    assert select_cosine_in_shards(prototypes_KC, Shuffled(shards, [3, 0, 4, 1, 2], 2), 8).tolist() == wanted


def test_what_shards_have_found_spares_work_in_the_next() -> None:
    rng = np.random.default_rng(0)
    shards = np.split(rng.dirichlet(np.full(5, 0.3), 12_000).astype(np.float32), 6)
    found: list[int] = []

    class Counting(ShardsHere):
        def search(self, asked: Callable[[int], Search]) -> Iterator[tuple[int, list[Nearest]]]:
            for number, kept in super().search(asked):
                found.append(sum(len(index_M) for _, index_M in kept))
                yield number, kept

    prototypes_KC = rng.dirichlet(np.ones(5), 30).astype(np.float32)
    select_cosine_in_shards(prototypes_KC, Counting(shards), 10)
    assert found[0] == 10 * 30 * 31 // 2, "the first has no floor"
    assert found[1] > found[2] > found[3] > found[5] and found[5] < 0.3 * found[0], "about 1/5 is expected"


def test_what_makes_no_sense_is_refused() -> None:
    shards = ShardsHere([np.ones((5, 3), np.float32)])
    for prototypes_KC, samples_per_row in (
        (np.ones((2, 4), np.float32), 1),
        (np.ones((0, 3), np.float32), 1),
        (np.full((2, 3), np.nan, np.float32), 1),
        (np.ones((2, 3), np.float32), 0),
    ):
        with pytest.raises(ValueError):
            select_cosine_in_shards(prototypes_KC, shards, samples_per_row)
    with pytest.raises(ValueError, match="not numbers"):
        select_cosine_in_shards(np.ones((2, 3), np.float32), ShardsHere([np.full((5, 3), np.inf, np.float32)]), 1)
    for wrong in ([], [np.ones((5, 3)), np.ones((5, 4))], [np.ones(5)]):
        with pytest.raises(ValueError, match="no shards of one width"):
            ShardsHere(wrong)
