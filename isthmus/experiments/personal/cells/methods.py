"""The compared ways to personalise: what the device sends, and how the cloud uses it."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final, Literal

from isthmus.distill.release import Release


class Sent(Enum):
    """What the cloud gets to know about the device's clips, most private first."""

    NOTHING = "nothing"
    PROTOTYPES = "prototypes"
    PROBABILITIES = "probabilities"
    FEATURES = "features of the clusters"
    LABELS = "labels"
    CLIPS = "clips"


@dataclass(frozen=True)
class Method:
    """One way to personalise. ``strategy``: a name in ``STRATEGIES``; empty if nothing is selected.

    A control is not a usable method: it knows what no cloud may know, or ignores the device on purpose.
    ``keep`` and ``heads_on`` are as in the recipe. The paper keeps nothing and trains heads on the selection.
    """

    sent: Sent
    strategy: str
    what: str
    control: bool = False
    keep: float = 0.0
    heads_on: Literal["all", "selection"] = "selection"

    def on(self, release: Release) -> Release:
        """Return the release with this method's recipe."""
        recipe = release.recipe
        config = dataclasses.replace(recipe.personalise, keep=self.keep, heads_on=self.heads_on)
        return release.under(dataclasses.replace(recipe, personalise=config))


METHODS: Final[Mapping[str, Method]] = {
    "all": Method(
        Sent.NOTHING, "", "no personalisation: AllDistill on the whole public set", control=True, heads_on="all"
    ),
    "random": Method(Sent.PROTOTYPES, "random", "as many public clips, at random", control=True),
    "select": Method(Sent.PROBABILITIES, "cosine", "the paper's Select: cosine to each clip's probabilities"),
    "cluster": Method(Sent.PROTOTYPES, "cosine", "the paper's Cluster: cosine to each prototype in turn"),
    "cluster-whole": Method(
        Sent.PROTOTYPES, "cosine", "cluster, heads and compressors on all public clips, as for AVE", heads_on="all"
    ),
    "round-robin": Method(Sent.PROTOTYPES, "round_robin", "prototypes take turns"),
    "quota": Method(Sent.PROTOTYPES, "quota", "class quotas by prior matching, nearest inside each class"),
    "transport": Method(Sent.PROTOTYPES, "transport", "optimal transport from prototypes weighted by size"),
    "density-ratio": Method(Sent.PROTOTYPES, "density_ratio", "weights in the loss instead of a pick"),
    "round-robin+features": Method(Sent.FEATURES, "round_robin", "turns, by probability times feature"),
    "quota+features": Method(Sent.FEATURES, "quota", "class quotas, nearest by feature"),
    "transport+features": Method(Sent.FEATURES, "transport", "optimal transport on probability and feature"),
    "kept": Method(Sent.PROTOTYPES, "cosine", "cluster, half of the base kept, heads on all", keep=0.5, heads_on="all"),
    "kept-transport": Method(
        Sent.PROTOTYPES, "transport", "transport, half of the base kept, heads on all", keep=0.5, heads_on="all"
    ),
    "kept-random": Method(
        Sent.PROTOTYPES, "random", "random, half of the base kept, heads on all", True, keep=0.5, heads_on="all"
    ),
    "oracle": Method(Sent.LABELS, "", "the user's true class counts, filled at random", control=True),
    "own": Method(Sent.CLIPS, "", "upper bound: distilled on the user's own labelled clips", control=True),
}

PAPER: Final = ("all", "random", "select", "cluster")
"""The four methods of the paper's tables."""


def named(names: Sequence[str]) -> dict[str, Method]:
    """Return the methods with these names, in this order. Raises ValueError for an unknown name."""
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise ValueError(f"unknown method {', '.join(unknown)}; known: {', '.join(METHODS)}")
    return {name: METHODS[name] for name in names}
