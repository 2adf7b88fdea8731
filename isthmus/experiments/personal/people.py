"""Leave one person out: each actor in turn is the private client of a release trained without them."""

from collections.abc import Mapping, Sequence
from typing import Any

from isthmus.data.clip import Listing
from isthmus.experiments.personal.cells.cells import Asked, Cell
from isthmus.experiments.personal.findings import figures, tables
from isthmus.experiments.personal.findings.answers import answers_table
from isthmus.experiments.personal.findings.guarding import guard_part
from isthmus.experiments.personal.findings.habits import habits_part
from isthmus.experiments.personal.findings.report import Section, picture_name
from isthmus.experiments.personal.findings.students import offset_part, premise_part


def people(listing: Listing) -> tuple[str, ...]:
    """Return the data set's actors, sorted. Raises ValueError if there are fewer than three."""
    actors = tuple(sorted({ref.actor for ref in listing.refs if ref.actor is not None}))
    if len(actors) < 3:
        raise ValueError(f"leaving one person out needs three persons or more; this data set names {len(actors)}")
    return actors


def asked(actor: str, methods: Sequence[str], seeds: Sequence[int], classes: Sequence[int] = (0,)) -> tuple[Asked, ...]:
    """What is run. ``classes``: numbers of classes that each person is a user of; 0: all."""
    return tuple(
        Asked(actor, "sensitive", method, seed, classes=count)
        for count in classes
        for seed in seeds
        for method in methods
    )


def sections(cells: Sequence[Cell], methods: Sequence[str], outputs: Mapping[str, Any]) -> list[Section]:
    found: list[Section] = []
    for count in dict.fromkeys(cell.asked.classes for cell in cells):
        own = tables.pick(cells, classes=count)
        who = f", users of {count} {'class' if count == 1 else 'classes'}" if count else ""
        found += [_of_users(own, methods, outputs, who), *premise_part(own, who), *offset_part(own, who)]
        found += [*guard_part(own, outputs, who), *habits_part(own, outputs, who)]
    return found


def _of_users(cells: Sequence[Cell], methods: Sequence[str], outputs: Mapping[str, Any], who: str) -> Section:
    baseline = "all" if "all" in methods else methods[0]
    text = "Each person is the only client of a release: teacher, students and public clips are made without them."
    if who:
        text += " Only their clips of some classes, drawn per person and seed, are used for selection and test."
    return Section(
        f"Leave one person out{who}",
        (
            tables.by_person(cells, baseline, methods, f"Accuracy on each person, % at ratio 1 in fp32{who}"),
            tables.both_heads(cells, ("all", "random"), f"By either head{who}"),
            tables.differences(cells, "sensitive", ("all", "random", "cluster"), f"Paired over persons and seeds{who}"),
            answers_table(cells, outputs, f"Recall and calibration{who}"),
            tables.by_mask(cells, f"Clips that lack one modality{who}"),
            tables.cost(cells, f"Selection and time{who}"),
        ),
        {picture_name("people", who): figures.gain_by_client(cells, [m for m in methods if m != baseline], baseline)},
        text,
    )
