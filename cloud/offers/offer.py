"""The facts about a release that the service needs to serve devices, without torch and without the release's files."""

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from isthmus.proto.errors import InvalidInput

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
    settled_at: float | None = None

    def to_json(self) -> str:
        """Return the offer as ``from_json`` reads it."""
        return json.dumps(asdict(self), sort_keys=True)

    @staticmethod
    def from_json(text: str) -> "Offer":
        """Return the offer of which ``to_json`` made the text. What a later version added is left out."""
        raw = {name: value for name, value in json.loads(text).items() if name in Offer.__dataclass_fields__}
        return Offer(**{**raw, "classes": tuple(raw["classes"]), "ratios": tuple(raw["ratios"])})

    def check_serves(self, other: "Offer") -> None:
        """Check that devices that enrolled with ``other`` can use students of this release.

        A device keeps the classes, the width of features and the preparation of clips of its enrolment. Raises
        InvalidInput, which names the difference.
        """
        for what, mine, its in (
            ("other classes", ", ".join(self.classes), ", ".join(other.classes)),
            ("another width of features", str(self.feature_width), str(other.feature_width)),
            ("another preparation of clips", self.input_spec_json, other.input_spec_json),
        ):
            if mine != its:
                raise InvalidInput(
                    f"release {self.release_hash} has {what} ({mine[:80]}) than the devices that enrolled here "
                    f"({its[:80]}): they could not use its students. Serve it by a cloud of its own, with another "
                    "--state and --database"
                )


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
        settled_at=recipe.personalise.settled_at,
    )
