"""PURE: decides which soups to keep within a storage budget: the 0-1 knapsack problem, solved exactly."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Item:
    """A soup. ``gain`` is its accuracy above the best single model, ``bytes`` its size."""

    gain: float
    bytes: int


def pack(items: Mapping[str, Item], budget_bytes: float) -> tuple[str, ...]:
    """Returns the names with the largest total gain that fit the budget, in the given order.

    Of sets with equal gain, the smallest is chosen. Item by item, every reachable pair (bytes, gain) is kept that no
    other pair beats in both, so the result is exact for any real gains. There are at most as many pairs as subsets; for
    the numbers of a model (tens) there are a few hundred. Items without gain are not kept.
    Raises ValueError for negative bytes.
    """
    if any(item.bytes < 0 for item in items.values()):
        raise ValueError("an item has negative bytes")
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
    """Returns the labels whose gain is above that of every smaller label. Of equal labels the first one stays."""
    kept: list[tuple[int, float, tuple[str, ...]]] = []
    for label in sorted(labels, key=lambda label: (label[0], -label[1])):
        if not kept or label[1] > kept[-1][1]:
            kept.append(label)
    return kept
