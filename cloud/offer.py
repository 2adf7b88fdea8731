"""The facts about a release that the service needs to serve devices, without torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from isthmus.distill.release import Release


@dataclass(frozen=True)
class Offer:
    """What a release offers to devices.

    ``rounds`` is the recipe's default number of rounds; a device may ask for at most ``epochs``.
    ``settled_at``: overlap of two rounds' selections from which no further round is asked for; None: never.
    """

    release_hash: str
    classes: tuple[str, ...]
    input_spec_json: str
    feature_width: int
    ratios: tuple[float, ...]
    rounds: int
    epochs: int
    min_cluster: int
    base_dir: Path
    settled_at: float | None = None


def offer_of(release: "Release") -> Offer:
    """Read the offer from a release. Raises ReleaseError if the release is incomplete."""
    recipe = release.recipe
    return Offer(
        release_hash=release.release_hash,
        classes=recipe.classes,
        input_spec_json=recipe.input.to_json(),
        feature_width=recipe.feature_width,
        ratios=recipe.ratios,
        rounds=recipe.personalise.rounds,
        epochs=recipe.personalise.train.epochs,
        min_cluster=recipe.personalise.min_cluster,
        base_dir=release.base_dir,
        settled_at=recipe.personalise.settled_at,
    )
