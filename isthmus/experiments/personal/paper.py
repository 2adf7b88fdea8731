"""The paper's tables 5.2 to 5.4 and figures 5.6 to 5.15 on one release: both scenarios, every method, every control."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from isthmus.experiments.personal.cells.cells import SCENARIOS, Asked, Cell
from isthmus.experiments.personal.cells.methods import METHODS, PAPER
from isthmus.experiments.personal.findings import figures, tables
from isthmus.experiments.personal.findings.answers import answers_table
from isthmus.experiments.personal.findings.guarding import guard_part
from isthmus.experiments.personal.findings.habits import habits_part
from isthmus.experiments.personal.findings.knee import knee
from isthmus.experiments.personal.findings.report import Section, picture_name
from isthmus.experiments.personal.findings.students import offset_part, premise_part

SERVED = "cluster"
"""The method whose upload the settings of figures 5.12 and 5.13 vary, and whose student is compressed in Table 5.3."""

WHOLE = "cluster-whole"
"""The same, with heads and compressors trained on the whole public set, as the paper does for AVE."""


@dataclass(frozen=True)
class Choices:
    """What is run. ``ladder``: methods beyond the paper's, in the latency-sensitive scenario only."""

    clients: tuple[str, ...]
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    scenarios: tuple[str, ...] = SCENARIOS
    ladder: tuple[str, ...] = tuple(name for name in METHODS if name not in PAPER)
    clips_per_cluster: tuple[int, ...] = (3, 6, 9, 12)
    upload_shares: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)


def asked(choices: Choices) -> tuple[Asked, ...]:
    """Return every cell once, those of the paper's tables first."""
    found: dict[Asked, None] = {}
    for scenario in choices.scenarios:
        for seed in choices.seeds:
            found |= {Asked(client, scenario, method, seed): None for client in choices.clients for method in PAPER}
    for seed in choices.seeds:
        for client in choices.clients:
            found |= {Asked(client, "sensitive", method, seed): None for method in choices.ladder}
            found |= {
                Asked(client, "sensitive", SERVED, seed, clips_per_cluster=clips): None
                for clips in choices.clips_per_cluster
            }
            found |= {
                Asked(client, "sensitive", SERVED, seed, upload_share=share): None for share in choices.upload_shares
            }
    return tuple(found)


def sections(
    cells: Sequence[Cell],
    classes: Sequence[str],
    bytes_of: Mapping[str, Mapping[str, int]],
    outputs: Mapping[str, Any],
    too_few: Sequence[Asked] = (),
) -> list[Section]:
    """Return tables and pictures in the paper's order. ``outputs``: cell name -> outputs (see guarding).

    ``too_few``: cells that could not be made, because their share of the clips is too few for a prototype.
    """
    found: list[Section] = []
    standard = [c for c in cells if c.asked.clips_per_cluster == 3 and c.asked.upload_share == 1.0]
    for scenario in SCENARIOS:
        own = tables.pick(standard, scenario=scenario)
        if not own:
            continue
        methods = tables.in_order(c.asked.method for c in own)
        named = f"latency-{scenario}"
        found.append(
            Section(
                f"Tables 5.2 and 5.4, {named}",
                (
                    tables.accuracy_by_method(own, scenario, f"Accuracy by method, {named}"),
                    tables.both_heads(own, ("all", "random"), f"By either head, {named}"),
                    tables.differences(own, scenario, ("all", "random", SERVED), f"Paired differences, {named}"),
                    tables.differences(
                        own,
                        scenario,
                        ("all", "random", SERVED),
                        f"Paired differences by the teacher's head, {named}",
                        tables.teacher_head,
                    ),
                    answers_table(own, outputs, f"Recall and calibration, {named}"),
                    tables.by_mask(own, f"Clips that lack one modality, {named}"),
                    tables.cost(own, f"Selection and time, {named}"),
                ),
                {
                    f"gain-{scenario}": figures.gain_by_client(own, [m for m in methods if m != "all"], "all"),
                    f"loss-{scenario}": figures.distillation_loss(own, [m for m in methods if m in PAPER]),
                    f"selected-{scenario}": figures.selected_per_class(
                        own, [m for m in methods if m in (*PAPER[1:], "quota", "oracle")], classes
                    ),
                },
                "The pictures are figures 5.6 to 5.11, 5.14 and 5.15 of the paper.",
            )
        )
    for method, what in ((SERVED, ""), (WHOLE, ", modules on the whole public set")):
        compressed = tables.pick(standard, scenario="sensitive", method=method)
        if not compressed:
            continue
        bend = knee(compressed, bytes_of)
        found.append(
            Section(
                f"Table 5.3, with number types{what}",
                (tables.by_compression(compressed, method, bytes_of, f"Accuracy against bytes, {method}"),),
                {picture_name("compression", what): figures.accuracy_against_bytes(compressed, bytes_of, bend)},
                f"The knee (stronger compression loses accuracy beyond noise): ratio {bend[0]}, {bend[1]} "
                f"({bytes_of[bend[1]][bend[0]]} bytes per clip).",
            )
        )
    for key, name, title, label in (
        ("clips_per_cluster", "clips a cluster", "Figure 5.12", "clips per cluster"),
        ("upload_share", "share uploaded", "Figure 5.13", "share of the selection clips uploaded"),
    ):
        other = "upload_share" if key == "clips_per_cluster" else "clips_per_cluster"
        usual = {"upload_share": 1.0, "clips_per_cluster": 3}[other]
        own = tables.pick(cells, scenario="sensitive", method=SERVED, **{other: usual})
        without = [each for each in too_few if getattr(each, other) == usual]
        if len({getattr(each, key) for each in (*(c.asked for c in own), *without)}) > 1:
            table = tables.by_setting(own, key, name, f"Accuracy by {label}", without)
            found.append(Section(title, (table,), {key: figures.accuracy_by(own, key, label)}))
    found += [*premise_part(standard), *offset_part(standard)]
    return [*found, *guard_part(standard, outputs), *habits_part(standard, outputs)]
