"""Models in memory: the bound holds at every moment, and no switch waits for a load that was announced."""

import random
import threading
import time
import weakref
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from isthmus.cloud.elastic.warm.residency import Residency
from isthmus.cloud.elastic.warm.store import Card, Common, StoreError, WarmStore

NAMES = [f"m{index}" for index in range(6)]
OWN, SHARED = 3_000, 1_000
WAIT_S = 120.0


class Alive:
    """The bytes of all tensors that a residency was given and that somebody still holds: measured, not accounted."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.bytes = self.peak = 0

    def placed(self, tensor: Tensor) -> Tensor:
        size = tensor.numel() * tensor.element_size()
        with self._lock:
            self.bytes += size
            self.peak = max(self.peak, self.bytes)
        weakref.finalize(tensor, self._gone, size)
        return tensor

    def _gone(self, size: int) -> None:
        with self._lock:
            self.bytes -= size


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> WarmStore:
    made = WarmStore.create(tmp_path_factory.mktemp("warm") / "models", Common("two", ("a", "b")))
    for index, name in enumerate(NAMES):
        own = torch.full((OWN // 4,), float(index))
        made.save(name, {"own": own, "shared": torch.ones(SHARED // 4)}, kind="tuned", number=index, heads=1)
    return made


def residency(
    store: WarmStore, limit_bytes: int | None, alive: Alive | None = None, rest: float = 0.0
) -> Residency[dict[str, Tensor]]:
    def build(_: Card, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(tensors)

    cards = {name: store.card(name) for name in NAMES}
    placed = alive.placed if alive else lambda tensor: tensor
    return Residency(store, cards, build, limit_bytes=limit_bytes, placed=placed, rest=rest)


def test_two_hundred_switches_stay_within_the_bound_and_wait_for_nothing_announced(store: WarmStore) -> None:
    alive, limit = Alive(), SHARED + 3 * OWN
    held = residency(store, limit, alive)
    draw = random.Random(0)
    current = 0
    held.announce(held.fitting(NAMES[:3]))
    assert held.wait(WAIT_S)
    for _ in range(200):
        current = min(max(current + draw.choice((-1, 1)), 0), len(NAMES) - 1)
        near = sorted(range(len(NAMES)), key=lambda index: (abs(index - current), index))
        loads = held.loads
        with held.using(NAMES[current]) as model:
            assert held.loads == loads, "waited for a load"
            assert model is not None, "announced, and not there"
            assert float(model["own"][0]) == current
            del model
        held.announce(held.fitting([NAMES[index] for index in near]))
        assert held.wait(WAIT_S)  # the batch that runs meanwhile takes longer than a load
        assert held.bytes <= limit
        assert len(held.resident()) == 3
    assert alive.peak <= limit
    assert held.peak_bytes <= limit
    assert held.loads > 50
    held.close()
    assert alive.bytes == 0


def test_a_load_in_progress_keeps_nobody_waiting(store: WarmStore) -> None:
    began, go_on = threading.Event(), threading.Event()

    def build(card: Card, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if float(tensors["own"][0]) == 1:
            began.set()
            assert go_on.wait(WAIT_S)
        return dict(tensors)

    held = Residency(store, {name: store.card(name) for name in NAMES}, build)
    held.announce(["m0", "m1"])
    assert began.wait(WAIT_S)
    with held.using("m0") as there, held.using("m1") as loading:
        assert there is not None
        assert loading is None
    go_on.set()
    assert held.wait(WAIT_S)
    held.close()


def test_what_is_not_there_is_none_at_once_and_a_model_in_use_stays(store: WarmStore) -> None:
    alive, limit = Alive(), SHARED + OWN
    held = residency(store, limit, alive)
    with held.using("m0") as model:
        assert model is None
    held.announce(["m0"])
    assert held.wait(WAIT_S)
    with held.using("m0") as model:
        held.announce(["m1"])
        assert not held.wait(0.1)  # no room while m0 is in use
        assert held.resident() == ("m0",)
        assert model is not None
        del model
    assert held.wait(WAIT_S)
    assert held.resident() == ("m1",)
    assert alive.peak <= limit
    held.close()


def test_the_one_used_longest_ago_makes_room(store: WarmStore) -> None:
    held = residency(store, SHARED + 2 * OWN)
    held.announce(["m0", "m1"])
    assert held.wait(WAIT_S)
    with held.using("m0"):
        pass
    held.announce(["m2"])
    assert held.wait(WAIT_S)
    assert set(held.resident()) == {"m0", "m2"}
    held.close()


def test_more_than_fits_does_not_displace_what_is_wanted_sooner(store: WarmStore) -> None:
    held = residency(store, SHARED + 2 * OWN)
    assert held.fitting(NAMES) == ("m0", "m1")
    held.announce(NAMES)
    assert not held.wait(0.3)
    assert set(held.resident()) == {"m0", "m1"}
    assert held.loads == 2
    held.close()


def test_the_loader_rests_after_a_load_unless_somebody_waits(store: WarmStore) -> None:
    held = residency(store, None, rest=1e9)
    held.announce(NAMES[:2])
    assert held.wait(WAIT_S)
    assert held.loads == 2
    held.announce(NAMES[:3])
    time.sleep(0.2)
    assert NAMES[2] not in held.resident(), "it rests for a billion times what the load before took"
    assert held.wait(WAIT_S)
    assert NAMES[2] in held.resident()
    held.close()


def test_a_damaged_model_is_told_and_the_others_load(tmp_path: Path) -> None:
    made = WarmStore.create(tmp_path / "models", Common("two", ("a", "b")))
    for index, name in enumerate(NAMES):
        made.save(name, {"own": torch.full((10,), float(index))}, kind="tuned", number=index, heads=1)
    held = residency(made, None)
    path = tmp_path / "models" / "tensors" / f"{made.card('m2').tensors['own'].hash}.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"abcd")
    held.announce(NAMES)
    assert held.wait(WAIT_S)
    assert set(held.broken) == {"m2"} and "does not hold the weights" in held.broken["m2"]
    assert set(held.resident()) == set(NAMES) - {"m2"}
    held.close()


def test_a_bound_that_holds_no_model_is_refused_with_one_that_does(store: WarmStore) -> None:
    with pytest.raises(StoreError, match=f"give at least {OWN + SHARED}"):
        residency(store, OWN)
