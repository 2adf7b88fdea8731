"""Soups: the paper's weights, sharper ones, never worse than the best member, and averages that are averages."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from isthmus.cloud.warmup.soup import CHUNK, Shares, average, ensemble, greedy, normalised, sharpened

ACCURACIES = st.dictionaries(st.sampled_from("abcdef"), st.floats(0.01, 1), min_size=1, max_size=6)


def test_the_papers_weights_are_accuracies_over_their_sum() -> None:
    assert normalised({"a": 0.9, "b": 0.6}) == pytest.approx({"a": 0.6, "b": 0.4})
    with pytest.raises(ValueError, match="cannot be weights"):
        normalised({"a": 0.0})


def test_a_lower_temperature_is_sharper() -> None:
    accuracies = {"a": 0.9, "b": 0.88, "c": 0.2}
    mild, sharp = sharpened(accuracies, 0.1), sharpened(accuracies, 0.01)
    assert sharp["a"] > mild["a"] > 1 / 3
    assert "c" not in sharp  # too small to be read for
    assert sum(sharp.values()) == pytest.approx(1)
    with pytest.raises(ValueError, match="temperature"):
        sharpened(accuracies, 0.0)


def test_the_greedy_soup_takes_what_does_not_hurt() -> None:
    def evaluate(shares: Shares) -> float:
        return 0.95 if set(shares) == {"a", "b"} else 0.1

    assert greedy({"a": 0.9, "b": 0.8, "c": 0.7}, evaluate) == ({"a": 0.5, "b": 0.5}, 0.95)
    assert greedy({"a": 0.9, "b": 0.8}, lambda _: 0.3) == ({"a": 1.0}, 0.9)


@given(ACCURACIES, st.randoms(use_true_random=False))
def test_no_soup_is_kept_that_profiles_worse_than_its_best_member(accuracies: dict[str, float], random: object) -> None:
    found: dict[tuple[tuple[str, float], ...], float] = {}

    def evaluate(shares: Shares) -> float:
        key = tuple(sorted(shares.items()))
        assert key not in found, "asked twice"
        assert len(shares) > 1
        found[key] = random.random()  # type: ignore[attr-defined]
        return found[key]

    soup = ensemble(7, accuracies, evaluate)
    assert soup.accuracy == max([*accuracies.values(), *found.values()])
    assert soup.gain >= 0
    assert accuracies[soup.best_member] == max(accuracies.values())
    assert sum(soup.shares.values()) == pytest.approx(1)
    assert (soup.method == "best") == (len(soup.shares) == 1)


def state(seed: int, shared: torch.Tensor) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {"shared": shared, "large": torch.randn(3, CHUNK), "small": torch.randn(5), "scalar": torch.randn(())}


def test_an_average_is_the_average_and_what_is_shared_stays_shared() -> None:
    shared = torch.randn(4)
    states = {name: state(seed, shared) for seed, name in enumerate("abc")}
    before = {key: tensor.clone() for key, tensor in states["a"].items()}
    mixed = average(states, {"a": 0.5, "b": 0.3, "c": 0.2})
    for key in before:
        wanted = 0.5 * states["a"][key] + 0.3 * states["b"][key] + 0.2 * states["c"][key]
        torch.testing.assert_close(mixed[key], wanted)
        assert torch.equal(states["a"][key], before[key])
    assert mixed["shared"] is shared
    written = mixed["large"].data_ptr()
    again = average(states, {"a": 0.2, "b": 0.3, "c": 0.5}, into=mixed)
    assert again["large"].data_ptr() == written and again["shared"] is shared
    wanted = 0.2 * states["a"]["large"] + 0.3 * states["b"]["large"] + 0.5 * states["c"]["large"]
    torch.testing.assert_close(again["large"], wanted)
    assert average(states, {"b": 1.0})["large"] is states["b"]["large"]


def test_an_average_is_never_written_over_a_model() -> None:
    alike = torch.ones(6)
    states = {"a": {"w": alike}, "b": {"w": alike}, "c": {"w": torch.zeros(6)}}
    mixed = average(states, {"a": 0.5, "b": 0.5})
    assert mixed["w"] is alike
    again = average(states, {"a": 0.5, "c": 0.5}, into=mixed)
    assert torch.equal(again["w"], torch.full((6,), 0.5))
    assert torch.equal(alike, torch.ones(6)) and torch.equal(states["c"]["w"], torch.zeros(6))


def test_models_that_do_not_match_are_refused() -> None:
    one, other = {"w": torch.zeros(2)}, {"w": torch.zeros(3)}
    with pytest.raises(ValueError, match="w differs"):
        average({"a": one, "b": other}, {"a": 0.5, "b": 0.5})
    with pytest.raises(ValueError, match="cannot be averaged"):
        average({"a": one, "b": {**one, "v": torch.zeros(1)}}, {"a": 0.5, "b": 0.5})
    with pytest.raises(ValueError, match="sum to"):
        average({"a": one, "b": one}, {"a": 0.5, "b": 0.4})
    with pytest.raises(ValueError, match="at least one model"):
        ensemble(3, {}, lambda _: 0.0)
