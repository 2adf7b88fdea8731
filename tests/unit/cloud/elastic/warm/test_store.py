"""The model store: shared tensors are stored once, damage is named, an interrupted write changes nothing."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from isthmus.cloud.elastic.warm import store as store_module
from isthmus.cloud.elastic.warm.store import Common, StoreError, WarmStore

COMMON = Common("two", ("a", "b"))


def tensors(seed: int, shared: float = 1.0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return {"shared": torch.full((50,), shared), "own": torch.randn(40), "scalar": torch.randn(())}


@pytest.fixture
def store(tmp_path: Path) -> WarmStore:
    made = WarmStore.create(tmp_path / "models", COMMON)
    for seed in (1, 2):
        made.save(
            f"m{seed}",
            tensors(seed),
            kind="tuned",
            number=seed,
            heads=3,
            accuracy={0: 0.5},
            pictures=100 + seed,
            seconds=1.5,
        )
    return made


def files(store: WarmStore) -> set[str]:
    return {path.name for path in (store.path / "tensors").iterdir()}


def test_models_come_back_and_share_what_is_equal(store: WarmStore) -> None:
    assert store.names() == ["m1", "m2"]
    for seed in (1, 2):
        loaded = store.load(f"m{seed}")
        assert all(torch.equal(loaded[key], tensor) for key, tensor in tensors(seed).items())
    assert len(files(store)) == 5  # one shared, two of each model's own
    cards = [store.card(name) for name in store.names()]
    assert store.bytes_of(cards) == 4 * (50 + 2 * 41)
    assert cards[0].bytes == 4 * 91
    assert (cards[1].number, cards[1].accuracy, cards[1].kind, cards[1].seconds) == (2, {0: 0.5}, "tuned", 1.5)
    assert ([card.pictures for card in cards], store.profiled().pictures) == ([101, 102], 101)
    path = store.path / "models" / "m1.json"
    path.write_text(path.read_text().replace('"pictures": 101,', ""))
    assert (store.card("m1").pictures, store.profiled().pictures) == (0, 0), "a card of before says nothing of it"
    assert WarmStore.create(store.path, COMMON).common() == COMMON
    with pytest.raises(StoreError, match="another task, reducer or merge order"):
        WarmStore.create(store.path, Common("two", ("a", "b"), "pruning"))
    with pytest.raises(StoreError, match="another task, reducer or merge order"):
        WarmStore.create(store.path, replace(COMMON, merge_order="receiving-first"))


def test_models_that_prune_have_no_order_of_merging(tmp_path: Path) -> None:
    pruning = Common("two", ("a", "b"), "pruning", "receiving-first")
    WarmStore.create(tmp_path, pruning)
    again = WarmStore.create(tmp_path, replace(pruning, merge_order="published"))
    assert again.merge_order() is None and again.common().reducer == "pruning"
    with pytest.raises(StoreError, match="another task, reducer or merge order"):
        WarmStore.create(tmp_path, replace(pruning, classes=("a", "c")))


def test_types_and_shapes_are_part_of_what_is_hashed(store: WarmStore) -> None:
    flat = torch.zeros(4)
    store.save("z", {"a": flat, "b": flat.view(2, 2), "c": flat.bfloat16()}, kind="soup", number=0, heads=1)
    loaded = store.load("z")
    assert (loaded["b"].shape, loaded["c"].dtype) == ((2, 2), torch.bfloat16)
    with pytest.raises(StoreError, match="cannot be stored"):
        store.save("i", {"a": torch.zeros(2, dtype=torch.int64)}, kind="soup", number=0, heads=1)


def own_file(store: WarmStore, name: str) -> Path:
    return store.path / "tensors" / f"{store.card(name).tensors['own'].hash}.safetensors"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:60]), "is truncated"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\x07"), "does not hold the weights"),
        (lambda path: path.write_bytes(bytes(5_000)), "not a safetensors file"),
    ],
)
def test_a_bad_file_is_named_and_the_other_models_load(store: WarmStore, damage: object, said: str) -> None:
    path = own_file(store, "m1")
    damage(path)  # type: ignore[operator]
    with pytest.raises(StoreError, match=rf"{path.name}.*{said}"):
        store.load("m1")
    assert store.load("m2")["own"].shape == (40,)
    good, bad = store.usable()
    assert "m2" in good
    assert ("m1" in bad) == (said in ("is missing", "is truncated"))
    store.save("m1", tensors(1), kind="tuned", number=1, heads=3)
    assert torch.equal(store.load("m1")["own"], tensors(1)["own"])  # saved again it is whole again


def test_a_foreign_file_under_a_models_name_is_named(store: WarmStore) -> None:
    own_file(store, "m1").write_bytes(own_file(store, "m2").read_bytes())
    with pytest.raises(StoreError, match="does not hold the weights"):
        store.load("m1")


def test_an_interrupted_write_leaves_the_model_of_before(store: WarmStore, monkeypatch: pytest.MonkeyPatch) -> None:
    written = store_module.write_atomically
    calls = []

    def dies(path: Path, content: bytes) -> None:
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        written(path, content)

    monkeypatch.setattr(store_module, "write_atomically", dies)
    with pytest.raises(KeyboardInterrupt):
        store.save("m1", tensors(9), kind="tuned", number=1, heads=3)
    monkeypatch.undo()
    assert torch.equal(store.load("m1")["own"], tensors(1)["own"])
    assert store.collect() > 0  # a leftover of the interrupted write
    assert len(files(store)) == 5
    assert store.collect() == 0


def test_what_nobody_names_any_more_is_collected(store: WarmStore) -> None:
    store.remove("m1")
    store.remove("m1")
    store.collect()
    assert store.names() == ["m2"]
    assert len(files(store)) == 3
    assert torch.equal(store.load("m2")["own"], tensors(2)["own"])


def test_damaged_cards_are_said(store: WarmStore, tmp_path: Path) -> None:
    card = store.path / "models" / "m1.json"
    whole = json.loads(card.read_text())
    for change in (
        {"format": 9},
        {"name": "m2"},
        {"tensors": {"a": {"hash": "../x", "dtype": "float32", "shape": []}}},
    ):
        card.write_text(json.dumps({**whole, **change}))
        with pytest.raises(StoreError, match="m1"):
            store.card("m1")
        assert set(store.usable()[1]) == {"m1"}
        with pytest.raises(StoreError):
            store.collect()
    card.write_text("{")
    with pytest.raises(StoreError, match=r"m1\.json is damaged"):
        store.card("m1")
    for name in ("../m1", "", "A", "a/b"):
        with pytest.raises(StoreError, match="is not a valid name of a model"):
            store.card(name)
    with pytest.raises(StoreError, match="no model 'm7'"):
        store.card("m7")
    with pytest.raises(StoreError, match="no warmed models"):
        WarmStore(tmp_path / "nowhere").common()
