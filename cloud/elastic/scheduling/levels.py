"""PURE: one whole number for two knobs: gamma, and k, the number of experts that each token uses.

Policies plan over whole numbers. For a model without experts such a number is a gamma. For one with experts it is a
*level*:

    level = gamma - STEP x (experts fewer than the model's usual k)

So with STEP = 10,000, level -5 is gamma -5 with the usual k, and level -20,005 is gamma -5 with two experts fewer. Only
gammas of 0 or below have levels with fewer experts: a batch that has time for prompts has time for its experts. Gamma 0
with the usual k is level 0, so loads and profiles mean the same as without experts.

The alternative was a pair (gamma, k) in every policy, profile, message and file. A policy never computes with gammas,
it only looks up their times and accuracies, so a number does (docs/decisions/0036-experts.md).
"""

from collections.abc import Sequence
from typing import Final

STEP: Final = 10_000
"""Larger than any gamma."""
MAX_EXPERTS: Final = 64
"""Most experts of a layer, and so the most that a token can use."""


def level_of(gamma: int, fewer: int = 0) -> int:
    """Returns the level of a gamma with ``fewer`` experts than usual. Raises ValueError if there is no such level.

    >>> level_of(-5, fewer=2)
    -20005
    """
    if not -STEP < gamma < STEP or not 0 <= fewer < MAX_EXPERTS:
        raise ValueError(f"gamma {gamma} with {fewer} experts fewer: there is no such level")
    if fewer and gamma > 0:
        raise ValueError(f"gamma {gamma} with {fewer} experts fewer: a gamma above 0 runs with the usual experts")
    return gamma - STEP * fewer


def gamma_of(level: int) -> int:
    """Returns the gamma of a level.

    >>> gamma_of(-20005), gamma_of(8)
    (-5, 8)
    """
    return level if level > 0 else -(-level % STEP)


def fewer_of(level: int) -> int:
    """Returns how many experts fewer than usual a level uses.

    >>> fewer_of(-20005), fewer_of(-5)
    (2, 0)
    """
    return 0 if level > 0 else -level // STEP


def levels(gammas: Sequence[int], counts: Sequence[int], usual: int) -> tuple[int, ...]:
    """Returns the levels of all ``gammas`` with each number of experts in ``counts``, ascending.

    ``usual`` is the model's k; 0: it has no experts. Gammas above 0 are there with the usual number alone. Raises
    ValueError for a count above ``usual`` or below 1, and for counts of a model without experts.

    >>> levels((-5, 0, 2), (1, 2), usual=2)
    (-10005, -10000, -5, 0, 2)
    """
    if counts and not usual:
        raise ValueError("this model has no experts, so their number cannot be chosen")
    if any(not 1 <= count <= usual for count in counts):
        raise ValueError(f"experts {list(counts)}: this model uses from 1 to {usual} per token")
    found = {level_of(gamma) for gamma in gammas if gamma > 0 or not counts}
    found |= {level_of(gamma, usual - count) for gamma in gammas for count in counts if gamma <= 0}
    return tuple(sorted(found))


def said(level: int, usual: int) -> str:
    """Returns a level as people read it: its gamma and, if the model has experts, how many of them a token uses.

    >>> said(-20005, usual=4), said(-5, usual=0)
    ('-5, 2 experts', '-5')
    """
    gamma = gamma_of(level)
    if not usual:
        return str(gamma)
    count = usual - fewer_of(level)
    return f"{gamma}, {count} expert{'s' if count != 1 else ''}"
