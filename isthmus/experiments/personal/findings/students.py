"""Students beside their teacher, and before and after the device learned its user."""

from collections.abc import Sequence

from isthmus.experiments.personal.cells.cells import Cell
from isthmus.experiments.personal.findings import tables
from isthmus.experiments.personal.findings.report import Section


def premise_part(cells: Sequence[Cell], who: str = "") -> list[Section]:
    """Return the teacher beside its student; nothing without cells of the base student."""
    base = tables.pick(cells, scenario="sensitive", method="all")
    return [Section(f"Teacher and student{who}", (tables.premise(base, f"On the same clips{who}"),))] if base else []


def offset_part(cells: Sequence[Cell], who: str = "") -> list[Section]:
    """Return each method before and after the device learned its user; nothing if clients are not single persons."""
    own = [cell for cell in tables.pick(cells, scenario="sensitive") if cell.offset is not None]
    title = f"Distillation and offset{who}"
    return [Section(title, (tables.with_offset(own, f"Before and after the offset{who}"),))] if own else []
