"""PURE. Choose the public samples on which a device's student is distilled, and weight them.

A strategy maps the device's upload and the public set to a weighted choice. ``STRATEGIES`` holds the strategies that a
recipe may name. ``cosine`` is the paper's (Eq. 5.5, SelectData of Alg. 7); the others are ours.
"""

from typing import Final

from isthmus.distill.selection.controls import class_oracle, everything, random
from isthmus.distill.selection.density import density_ratio
from isthmus.distill.selection.interface import FeatureRows, Public, Selection, Strategy, Wanted
from isthmus.distill.selection.quota import quota
from isthmus.distill.selection.sharded import Search, Shards, ShardsHere, select_cosine_in_shards
from isthmus.distill.selection.transport import transport
from isthmus.distill.selection.turns import cosine, round_robin, select_cosine

STRATEGIES: Final[dict[str, Strategy]] = {
    "cosine": cosine,
    "random": random,
    "all": everything,
    "round_robin": round_robin,
    "quota": quota,
    "transport": transport,
    "density_ratio": density_ratio,
}
"""Strategies by the name that a recipe or a command line may give.

>>> sorted(STRATEGIES)
['all', 'cosine', 'density_ratio', 'quota', 'random', 'round_robin', 'transport']
"""


def add_strategy(name: str, strategy: Strategy) -> None:
    """Make ``strategy`` known under ``name`` to recipes, commands and the cloud's worker of this process.

    Raises ValueError if ``name`` is not an identifier, or already belongs to another strategy. An installed package
    adds its strategies in every process through an extension (``isthmus.extensions``).

    >>> def first(wanted, public, samples_per_row, rng):
    ...     return Selection.of(np.arange(min(samples_per_row, len(public))))
    >>> add_strategy("first", first)
    >>> STRATEGIES.pop("first") is first
    True
    """
    if not name.isidentifier():
        raise ValueError(f"{name!r} cannot name a strategy: use letters, digits and underscores")
    if STRATEGIES.setdefault(name, strategy) is not strategy:
        raise ValueError(f"there is already a strategy named {name!r}: choose another name")


__all__ = [
    "STRATEGIES",
    "FeatureRows",
    "Public",
    "Search",
    "Selection",
    "Shards",
    "ShardsHere",
    "Strategy",
    "Wanted",
    "add_strategy",
    "class_oracle",
    "cosine",
    "density_ratio",
    "everything",
    "quota",
    "random",
    "round_robin",
    "select_cosine",
    "select_cosine_in_shards",
    "transport",
]
