"""Shards of a public set, searched by this process and on Ray: the same picks as one selection over everything."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from isthmus.cloud.personalise.elsewhere import shards_on_ray
from isthmus.cloud.personalise.elsewhere.shards_on_ray import ShardsOnRay
from isthmus.cloud.personalise.learning import StepDied
from isthmus.distill.selection import Search, Shards, ShardsHere, select_cosine, select_cosine_in_shards
from isthmus.distill.selection.nearest import Nearest
from isthmus.distill.training.probability_shards import (
    MANIFEST,
    CutArray,
    Shard,
    ShardsError,
    open_shards,
    write_shards,
)

SIZES = (700, 1, 4_000, 300, 2_999)
CLASSES = 6


@pytest.fixture(scope="module")
def probabilities_NC() -> np.ndarray:
    rng = np.random.default_rng(4)
    probabilities_NC = rng.dirichlet(np.full(CLASSES, 0.2), sum(SIZES)).astype(np.float16)
    probabilities_NC[5_000:5_500] = probabilities_NC[:500]  # equal samples in several shards
    return probabilities_NC


@pytest.fixture
def folder(tmp_path: Path, probabilities_NC: np.ndarray) -> Path:
    write_shards(tmp_path / "shards", np.split(probabilities_NC, np.cumsum(SIZES)[:-1]))
    return tmp_path / "shards"


@pytest.fixture(params=["here", "ray"])
def shards(request: pytest.FixtureRequest, folder: Path) -> Shards:
    if request.param == "here":
        files = open_shards(folder)
        return ShardsHere([files.shard(number).read() for number in range(len(files.sizes))])
    request.getfixturevalue("ray_cluster")
    return ShardsOnRay(open_shards(folder), cpus=2)


def prototypes() -> np.ndarray:
    return np.random.default_rng(5).dirichlet(np.ones(CLASSES), 40).astype(np.float32)


def test_the_picks_are_those_of_one_selection(shards: Shards, probabilities_NC: np.ndarray) -> None:
    assert tuple(shards.sizes) == SIZES and shards.classes == CLASSES
    wanted = select_cosine(prototypes(), probabilities_NC, 12)
    found = select_cosine_in_shards(prototypes(), shards, 12)
    np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(select_cosine_in_shards(prototypes(), shards, 12), wanted)


def test_more_samples_wanted_than_there_are_takes_all(shards: Shards) -> None:
    found = select_cosine_in_shards(prototypes()[:3], shards, 5_000)
    np.testing.assert_array_equal(np.sort(found), np.arange(sum(SIZES)))


def test_each_shard_is_searched_once_and_floors_rise(shards: Shards) -> None:
    asked: list[int] = []

    def ask(number: int) -> Search:
        asked.append(number)
        return Search(np.eye(CLASSES) * 2.0**26, np.full(CLASSES, 3), np.full(CLASSES, 1e18), np.empty(0, np.int64))

    found = dict(shards.search(ask))
    assert sorted(asked) == sorted(found) == list(range(len(SIZES)))
    assert all(len(index_M) == 0 for kept in found.values() for _, index_M in kept), "nothing is above such a floor"


def test_an_error_of_a_search_is_the_callers(shards: Shards) -> None:
    def ask(number: int) -> Search:
        return Search(np.ones((1, CLASSES + 1)), np.ones(1, np.int64), np.array([-np.inf]), np.empty(0, np.int64))

    with pytest.raises(ValueError):
        list(shards.search(ask))
    assert select_cosine_in_shards(prototypes(), shards, 1).shape == (40,), "and the next search goes on"


def test_ray_repeats_a_search_whose_process_was_killed(
    folder: Path, probabilities_NC: np.ndarray, ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    died, search_on_machine = tmp_path / "died", shards_on_ray.search_on_machine

    def search_and_die(shard: Shard, version: str, search: Search) -> list[Nearest]:
        if shard.path.name == "00002.npy" and not died.exists():
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return search_on_machine(shard, version, search)

    monkeypatch.setattr(shards_on_ray, "search_on_machine", search_and_die)
    found = select_cosine_in_shards(prototypes(), ShardsOnRay(open_shards(folder), cpus=2), 12)
    np.testing.assert_array_equal(found, select_cosine(prototypes(), probabilities_NC, 12))
    assert died.exists()


def test_a_search_that_kills_its_process_every_time_ends(
    folder: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*arguments: object) -> list[Nearest]:
        os.kill(os.getpid(), signal.SIGKILL)
        return []

    monkeypatch.setattr(shards_on_ray, "search_on_machine", die)
    monkeypatch.setattr(shards_on_ray, "RETRIES", 1)
    with pytest.raises(StepDied, match="Ray has lost a search 2 times"):
        select_cosine_in_shards(prototypes(), ShardsOnRay(open_shards(folder), cpus=2), 12)


def test_another_set_or_version_on_the_cluster_is_said(folder: Path, ray_cluster: None) -> None:
    search = Search(np.ones((1, CLASSES)), np.ones(1, np.int64), np.array([-np.inf]), np.empty(0, np.int64))
    with pytest.raises(ShardsError, match="install one version"):
        shards_on_ray.search_on_machine(open_shards(folder).shard(0), "0.0.0", search)
    shards = ShardsOnRay(open_shards(folder), cpus=2)
    (folder / MANIFEST).unlink()
    write_shards(folder, [np.full((SIZES[0], CLASSES), 1 / CLASSES, np.float16)])
    with pytest.raises(ShardsError, match=r"on a machine of the cluster: .* is damaged, or of another set"):
        list(shards.search(lambda number: search))


def test_an_array_cut_into_shards_makes_the_same_picks(
    probabilities_NC: np.ndarray, tmp_path: Path, ray_cluster: None
) -> None:
    np.save(tmp_path / "all.npy", probabilities_NC)
    cut = CutArray.open(tmp_path / "all.npy", 3_000)
    assert tuple(cut.sizes) == (3_000, 3_000, 2_000)
    found = select_cosine_in_shards(prototypes(), ShardsOnRay(cut, cpus=2), 12)
    np.testing.assert_array_equal(found, select_cosine(prototypes(), probabilities_NC, 12))


def test_damaged_shards_are_said(shards: Shards, folder: Path, opened: Callable[[], Iterator[object]]) -> None:
    data = bytearray((folder / "00002.npy").read_bytes())
    data[-1] ^= 1
    (folder / "00002.npy").write_bytes(data)
    with pytest.raises(ShardsError, match=r"00002\.npy is damaged, or of another set: copy it"):
        list(opened())


@pytest.fixture
def opened(request: pytest.FixtureRequest, shards: Shards, folder: Path) -> Callable[[], Iterator[object]]:
    """Reads all shards, as each way of searching does."""
    if isinstance(shards, ShardsOnRay):
        search = Search(np.ones((1, CLASSES)), np.ones(1, np.int64), np.array([-np.inf]), np.empty(0, np.int64))
        return lambda: shards.search(lambda number: search)
    files = open_shards(folder)
    return lambda: (files.shard(number).read() for number in range(len(files.sizes)))
