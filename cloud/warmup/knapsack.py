"""PURE: which soups to keep under a storage budget: the 0-1 knapsack, solved exactly."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Item:
    """``gain``: what keeping it adds (accuracy over the best single model). ``bytes``: what it takes."""

    gain: float
    bytes: int


def pack(items: Mapping[str, Item], budget_bytes: float) -> tuple[str, ...]:
    """The names of most total gain whose bytes fit the budget, in the order given; of equal gain the fewest bytes.

    Keeps, item by item, every reachable (bytes, gain) that no other beats in both, so it is exact for any real gains;
    there are at most as many as subsets, and for the numbers of a model (tens) a few hundred. What gains nothing is
    not kept. Raises ValueError for negative bytes.
    """
    if any(item.bytes < 0 for item in items.values()):
        raise ValueError("an item of negative bytes")
    frontier: list[tuple[int, float, tuple[str, ...]]] = [(0, 0.0, ())]
    for name, item in items.items():
        if item.gain <= 0:
            continue
        added = [
            (taken + item.bytes, gain + item.gain, (*names, name))
            for taken, gain, names in frontier
            if taken + item.bytes <= budget_bytes
        ]
        frontier = _undominated([*frontier, *added])
    return max(frontier, key=lambda label: (label[1], -label[0]))[2]


def _undominated(labels: list[tuple[int, float, tuple[str, ...]]]) -> list[tuple[int, float, tuple[str, ...]]]:
    """Gains strictly rise with bytes; of equals the first made stays."""
    kept: list[tuple[int, float, tuple[str, ...]]] = []
    for label in sorted(labels, key=lambda label: (label[0], -label[1])):
        if not kept or label[1] > kept[-1][1]:
            kept.append(label)
    return kept
