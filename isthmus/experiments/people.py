"""Leave one person out: each actor in turn is the private client of a release that never saw them."""

from collections.abc import Mapping, Sequence
from typing import Any

from isthmus.data.clip import Listing
from isthmus.experiments import figures, tables
from isthmus.experiments.cells import Asked, Cell
from isthmus.experiments.guarding import guard_part
from isthmus.experiments.habits import habits_part
from isthmus.experiments.report import Section


def people(listing: Listing) -> tuple[str, ...]:
    """The data set's actors, sorted. Raises ValueError where there are fewer than three to leave one out of."""
    actors = tuple(sorted({ref.actor for ref in listing.refs if ref.actor is not None}))
    if len(actors) < 3:
        raise ValueError(f"leaving one person out needs three persons or more; this data set names {len(actors)}")
    return actors


def asked(actor: str, methods: Sequence[str], seeds: Sequence[int]) -> tuple[Asked, ...]:
    return tuple(Asked(actor, "sensitive", method, seed) for seed in seeds for method in methods)


def sections(cells: Sequence[Cell], methods: Sequence[str], outputs: Mapping[str, Any]) -> list[Section]:
    baseline = "all" if "all" in methods else methods[0]
    return [
        Section(
            "Leave one person out",
            (
                tables.by_person(cells, baseline, methods, "Accuracy on each person, % at ratio 1 in fp32"),
                tables.differences(cells, "sensitive", ("all", "random", "cluster"), "Paired over persons and seeds"),
                tables.by_mask(cells, "Clips that lack one modality"),
                tables.cost(cells, "What was selected, and what it took"),
            ),
            {"people": figures.gain_by_client(cells, [m for m in methods if m != baseline], baseline)},
            "Each person is the one client of a release whose teacher, students and public clips never saw them.",
        ),
        *guard_part(cells, outputs),
        *habits_part(cells, outputs),
    ]
