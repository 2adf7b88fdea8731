"""Cells as tables: plain rows of text, which become Markdown and HTML alike."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from isthmus.experiments.personal.cells.cells import Asked, Cell
from isthmus.experiments.personal.findings.paired import Difference, by_group, difference, spread

Value = Callable[[Cell], float]


@dataclass(frozen=True)
class Table:
    """A table. ``note`` is printed below it."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    def markdown(self) -> str:
        lines = [f"### {self.title}", "", f"| {' | '.join(self.header)} |", f"|{' --- |' * len(self.header)}"]
        lines += [f"| {' | '.join(row)} |" for row in self.rows]
        return "\n".join([*lines, *(["", self.note] if self.note else [])]) + "\n"


def plain(cell: Cell) -> float:
    return cell.plain


def pick(cells: Iterable[Cell], **wanted: object) -> list[Cell]:
    """Return the cells whose ``asked`` has these values."""
    return [cell for cell in cells if all(getattr(cell.asked, key) == value for key, value in wanted.items())]


def in_order(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))


def percent(values: Sequence[float]) -> str:
    """Return mean ± standard deviation over seeds, in percent."""
    if not values:
        return ""
    found = spread([100 * value for value in values])
    return f"{found.mean:.1f} ± {found.deviation:.1f}" if found.count > 1 else f"{found.mean:.1f}"


def points(found: Difference) -> str:
    """Return mean ± standard error in percentage points, in bold if it is beyond two standard errors."""
    text = f"{100 * found.mean:+.1f} ± {100 * found.standard_error:.1f}"
    return f"**{text}**" if found.beyond_noise else text


def accuracy_by_method(cells: Sequence[Cell], scenario: str, title: str) -> Table:
    """Return tables 5.2 and 5.4: one row per method, one column per client."""
    own = pick(cells, scenario=scenario)
    clients, methods = in_order(c.asked.client for c in own), in_order(c.asked.method for c in own)
    rows = [
        (method, *(percent([c.plain for c in pick(own, client=client, method=method)]) for client in clients))
        for method in methods
    ]
    rows.append(
        ("(the teacher on the same clips)", *(percent([c.teacher for c in _once(own, client)]) for client in clients))
    )
    header = ("method", *(f"{client} ({_tested(own, client)} clips)" for client in clients))
    return Table(title, header, tuple(rows), "Accuracy in % at ratio 1 in fp32, mean ± standard deviation over seeds.")


def differences(
    cells: Sequence[Cell], scenario: str, against: Sequence[str], title: str, value: Value = plain
) -> Table:
    """Return the difference of each method to each of ``against``, paired over client and seed."""
    own = pick(cells, scenario=scenario)
    of_method = {
        method: {(c.asked.client, c.asked.seed): value(c) for c in pick(own, method=method)}
        for method in in_order(c.asked.method for c in own)
    }
    present = [method for method in against if method in of_method]
    rows = []
    for method, values in of_method.items():
        row = [method]
        for other in present:
            if other == method or not values.keys() & of_method[other].keys():
                row += ["", "", ""]
                continue
            found = difference(values, of_method[other])
            row += [points(found), f"{found.better} / {found.worse}", str(found.needed or "")]
        rows.append(tuple(row))
    header = ["method"]
    for other in present:
        header += [f"less {other}", "better / worse", "pairs needed"]
    note = (
        "Percentage points, mean ± standard error over pairs (client, seed); bold: beyond two standard errors. Pairs "
        "needed: the number that would detect a true difference of this size with 80 % power."
    )
    return Table(title, tuple(header), tuple(rows), note)


def by_person(cells: Sequence[Cell], baseline: str, methods: Sequence[str], title: str) -> Table:
    """Return the leave-one-person-out table. Seeds are averaged first, because only people are independent."""
    means = {
        method: by_group({(c.asked.client, c.asked.seed): c.plain for c in pick(cells, method=method)})
        for method in methods
    }
    people = list(means[baseline])
    rows = [
        (person, str(_tested(cells, person)), *(f"{100 * means[method][person]:.1f}" for method in methods))
        for person in people
    ]
    rows.append(("mean", "", *(f"{100 * sum(means[m].values()) / len(means[m]):.1f}" for m in methods)))
    for other in in_order([baseline, *(m for m in methods if m == "random")]):
        rows.append(
            (
                f"less {other}",
                "",
                *("" if m == other else points(difference(means[m], means[other])) for m in methods),
            )
        )
    rows.append(
        (
            f"worse than {baseline} by over 2 points",
            "",
            *("" if m == baseline else f"{_made_worse(means[m], means[baseline])} of {len(people)}" for m in methods),
        )
    )
    note = f"{len(people)} people; differences: mean ± standard error over people, bold beyond two of them."
    return Table(title, ("person left out", "clips", *methods), tuple(rows), note)


def _made_worse(values: Mapping[str, float], baseline: Mapping[str, float]) -> int:
    return sum(value < baseline[person] - 0.02 - 1e-9 for person, value in values.items())


def teacher_head(cell: Cell) -> float:
    return cell.teacher_head


def both_heads(cells: Sequence[Cell], against: Sequence[str], title: str) -> Table:
    """Return each method by both readings: the student's own head, and the teacher's head on the student's features,
    with which the paper predicts (Eq. 5.1 and 5.6).

    Differences to each of ``against`` are over clients, whose seeds are averaged first.
    """
    methods = in_order(c.asked.method for c in cells)
    present = [method for method in against if method in methods]
    means = {
        (value, method): by_group({(c.asked.client, c.asked.seed): value(c) for c in pick(cells, method=method)})
        for value in (plain, teacher_head)
        for method in methods
    }
    rows = []
    for method in methods:
        row = [method]
        for value in (plain, teacher_head):
            own = means[value, method]
            row.append(f"{100 * sum(own.values()) / len(own):.1f}")
            row += ["" if other == method else points(difference(own, means[value, other])) for other in present]
        rows.append(tuple(row))
    of_teacher = by_group({(c.asked.client, c.asked.seed): c.teacher for c in cells})
    blank = ("",) * len(present)
    share = f"{100 * sum(of_teacher.values()) / len(of_teacher):.1f}"
    rows.append(("(the teacher itself)", "", *blank, share, *blank))
    less = tuple(f"less {other}" for other in present)
    note = (
        f"{len(of_teacher)} clients. Accuracy in %; differences in points, mean ± standard error over clients, bold "
        "beyond two of them."
    )
    return Table(title, ("method", "own head", *less, "teacher's head", *less), tuple(rows), note)


def by_mask(cells: Sequence[Cell], title: str) -> Table:
    """Return accuracy by method if every clip lacks its sound, or its picture, or nothing."""
    masks = list(cells[0].masks)
    rows = [
        (method, *(percent([c.masks[mask] for c in pick(cells, method=method)]) for mask in masks))
        for method in in_order(c.asked.method for c in cells)
    ]
    note = "Accuracy in % at ratio 1, mean ± standard deviation over clients and seeds."
    return Table(title, ("method", *(f"{mask} captured" for mask in masks)), tuple(rows), note)


def by_compression(cells: Sequence[Cell], method: str, bytes_of: Mapping[str, Mapping[str, int]], title: str) -> Table:
    """Return table 5.3 with every number type: accuracy against bytes."""
    own = pick(cells, method=method, scenario="sensitive")
    clients = in_order(c.asked.client for c in own)
    rows = []
    for number_type, by_ratio in bytes_of.items():
        for ratio, size in by_ratio.items():
            values = [c.accuracy[ratio][number_type] for c in own if ratio in c.accuracy]
            loss = difference(
                {i: c.accuracy[ratio][number_type] for i, c in enumerate(own)}, {i: c.plain for i, c in enumerate(own)}
            )
            each = [percent([c.accuracy[ratio][number_type] for c in pick(own, client=x)]) for x in clients]
            rows.append((number_type, ratio, str(size), *each, percent(values), points(loss)))
    header = ("number type", "ratio", "bytes a clip", *clients, "all", "less fp32 ratio 1")
    return Table(title, header, tuple(rows), "Bytes: the inference message with its gRPC prefix.")


def by_setting(cells: Sequence[Cell], key: str, name: str, title: str, too_few: Sequence[Asked] = ()) -> Table:
    """Return figures 5.12 and 5.13 as a table: accuracy by a setting of the upload, by both heads.

    ``too_few``: cells that could not be made, because so few clips give no prototype.
    """
    values = sorted({getattr(asked, key) for asked in (*(c.asked for c in cells), *too_few)})
    clients = in_order(c.asked.client for c in cells)
    rows = []
    for value in values:
        own = pick(cells, **{key: value})
        means = (_mean_or_blank([float(number) for number in numbers], "{:.0f}") for numbers in (
            [c.rows_sent for c in own], [c.selected for c in own], [c.steps for c in own],
        ))  # fmt: skip
        without = {asked.client for asked in too_few if getattr(asked, key) == value}
        rows.append(
            (
                f"{value:g}",
                *means,
                *(
                    "too few clips" if client in without else percent([read(c) for c in pick(own, client=client)])
                    for read in (plain, teacher_head)
                    for client in clients
                ),
            )
        )
    heads = tuple(f"{client}, {head}" for head in ("own head", "teacher's head") for client in clients)
    note = "Means over cells; accuracy in %, mean ± standard deviation over seeds."
    if too_few:
        note += " Too few clips: below the floor of a prototype, so that nothing is sent."
    return Table(title, (name, "rows sent", "selected", "steps", *heads), tuple(rows), note)


def with_offset(cells: Sequence[Cell], title: str) -> Table:
    """Return each method before and after the device learned its user, and against the base student that did so.

    Differences are over clients, whose seeds are averaged first. ``cells`` all have an offset.
    """

    def means(value: Value, method: str) -> dict[str, float]:
        return by_group({(c.asked.client, c.asked.seed): value(c) for c in pick(cells, method=method)})

    rows = []
    for method in in_order(c.asked.method for c in cells):
        plainly, after, base = means(teacher_head, method), means(_offset, method), means(_offset_before, method)
        rows.append(
            (
                method,
                f"{100 * sum(plainly.values()) / len(plainly):.1f}",
                f"{100 * sum(after.values()) / len(after):.1f}",
                points(difference(after, plainly)),
                points(difference(after, base)),
            )
        )
    note = (
        f"{len({c.asked.client for c in cells})} people. Accuracy in % by the teacher's head, and with the user's "
        "offset, which the device learned from the selection clips without labels. Differences in points, mean ± "
        "standard error over people, bold beyond two of them."
    )
    header = ("method", "before the offset", "after it", "after less before", "less the base student after it")
    return Table(title, header, tuple(rows), note)


def _offset(cell: Cell) -> float:
    assert cell.offset is not None
    return cell.offset


def _offset_before(cell: Cell) -> float:
    assert cell.offset_before is not None
    return cell.offset_before


def premise(base: Sequence[Cell], title: str) -> Table:
    """Return the teacher beside its base student on the same clips: distillation needs a teacher that is better.

    ``base`` are cells of the method ``all``, whose student is the base student. Seeds are averaged first.
    """
    by_teacher, taught, own = (
        by_group({(c.asked.client, c.asked.seed): value(c) for c in base}) for value in (_teacher, teacher_head, plain)
    )
    rows: list[tuple[str, ...]] = []
    for client, share in by_teacher.items():
        less = (f"{100 * (share - each[client]):+.1f}" for each in (taught, own))
        rows.append((client, *(f"{100 * each[client]:.1f}" for each in (by_teacher, taught, own)), *less))
    gaps = [difference(by_teacher, each) for each in (taught, own)]
    means = (f"{100 * sum(each.values()) / len(each):.1f}" for each in (by_teacher, taught, own))
    rows.append(("mean", *means, *map(points, gaps)))
    said = (
        "The teacher is above its student by either head: the premise of distillation holds."
        if all(gap.mean > 0 and gap.beyond_noise for gap in gaps)
        else "The teacher is not above its student by both heads beyond noise: **the premise of distillation is not "
        "shown here**. A method that follows the teacher has little to gain."
    )
    header = (
        "client", "teacher, %", "base student, teacher's head", "base student, own head",
        "teacher less student, teacher's head", "own head",
    )  # fmt: skip
    note = f"{said} Same clips, seeds averaged; the mean with its standard error over clients."
    return Table(title, header, tuple(rows), note)


def _teacher(cell: Cell) -> float:
    return cell.teacher


def cost(cells: Sequence[Cell], title: str) -> Table:
    """Return wall seconds by stage and the selection, by method."""
    rows = []
    for method in in_order(c.asked.method for c in cells):
        own = pick(cells, method=method)
        seconds = [f"{spread([c.stage_s[stage] for c in own]).mean:.1f}" for stage in own[0].stage_s]
        rows.append(
            (
                method,
                f"{spread([float(c.selected) for c in own]).mean:.0f}",
                f"{spread([c.effective_samples for c in own]).mean:.0f}",
                f"{spread([float(c.steps) for c in own]).mean:.0f}",
                f"{spread([float(c.upload_bytes) for c in own]).mean:.0f}",
                _mean_or_blank([c.overlap[-1] for c in own if c.overlap], "{:.2f}"),
                _mean_or_blank([c.a_distance["public"] for c in own if "public" in c.a_distance], "{:.2f}"),
                _mean_or_blank([c.a_distance["selection"] for c in own if "selection" in c.a_distance], "{:.2f}"),
                *seconds,
            )
        )
    stages = tuple(f"{stage}, s" for stage in cells[0].stage_s)
    header = (
        "method",
        "selected",
        "effective",
        "steps",
        "bytes up",
        "overlap",
        "A-dist. public",
        "A-dist. selection",
        *stages,
    )
    note = (
        "Means over cells. Effective: Kish's sample size of the weights. Steps: of gradient descent. Overlap: Jaccard "
        "index of the last two rounds' selections. A-dist.: proxy A-distance (0 alike, 2 apart) of the upload to all "
        "public clips and to the selection."
    )
    return Table(title, header, tuple(rows), note)


def _mean_or_blank(values: Sequence[float], form: str) -> str:
    return form.format(sum(values) / len(values)) if values else ""


def _once(cells: Sequence[Cell], client: str) -> list[Cell]:
    """Return one cell per seed, so that values independent of the method count once."""
    return list({c.asked.seed: c for c in cells if c.asked.client == client}.values())


def _tested(cells: Sequence[Cell], client: str) -> int:
    return next(c.test_clips for c in cells if c.asked.client == client)
