"""The ladder's tables: methods by users, and what guards would have said."""

from collections.abc import Callable, Sequence

import numpy as np
from scipy.stats import spearmanr

from isthmus.experiments.personal.findings.report import Section
from isthmus.experiments.personal.findings.tables import Table
from isthmus.experiments.personal.ladder.measure import TWO_POINTS, Over, Row, over_people
from isthmus.experiments.personal.ladder.membership import SIGNALS, Suspect, separation
from isthmus.experiments.personal.ladder.methods import ASKED

_NOTE = (
    "People are the units: a person's seeds are averaged first. Accuracy: mean ± standard deviation over people. Gain "
    "over the base student on the same modalities: mean ± standard error over people, in points; bold beyond two "
    "standard errors. Worse: people who lose more than 2 points, and in brackets those who lose more than twice the "
    "standard error of their own paired clips. Changed: share of answers that differ from the base student's."
)


def sections(rows: Sequence[Row]) -> list[Section]:
    """Return one table per protocol and number of classes, and the guard's."""
    made = []
    for protocol, classes in dict.fromkeys((row.protocol, row.classes) for row in rows):
        own = [row for row in rows if (row.protocol, row.classes) == (protocol, classes)]
        who = "users of all classes" if not classes else f"users of {classes} class{'es' if classes > 1 else ''}"
        made.append(_ladder(own, f"{protocol}, {who}"))
    guards = _guards(rows)
    return [
        Section("What helps one person", tuple(made), text=_NOTE),
        *([Section("The guard", (guards,))] if guards is not None else []),
    ]


def cloud_section(rows: Sequence[Row]) -> Section:
    """Return the tables of selection in the cloud."""
    made = [
        _ladder([row for row in rows if row.classes == count], f"halves, {count or 'all'} classes")
        for count in dict.fromkeys(row.classes for row in rows)
    ]
    text = (
        "Heads learn from all public clips, and picked ones count four times; every method picks equally many. "
        "Ordinary heads answer alone; centred heads answer after the person's offset. One seed."
    )
    return Section("Selection in the cloud, on shared encoders", tuple(made), text=text)


def _ladder(rows: Sequence[Row], title: str) -> Table:
    lines = []
    for method in dict.fromkeys(row.method for row in rows):
        of = over_people([row for row in rows if row.method == method])
        lines.append(
            (
                method,
                f"{100 * of.accuracy:.1f} ± {100 * of.deviation:.1f}",
                gain_text(of),
                f"{100 * of.worse:.0f} % ({100 * of.surely_worse:.0f} %)",
                f"{100 * of.recall:.1f}",
                f"{100 * of.calibration:.1f}",
                f"{100 * of.changed:.0f} %",
            )
        )
    header = ("method", "accuracy, %", "gain, points", "worse", "recall, %", "calibration error, points", "changed")
    people = len({row.person for row in rows})
    clips = np.mean([row.clips for row in rows])
    return Table(f"{title}: {people} people, {clips:.0f} clips to learn from", header, tuple(lines))


def gain_text(of: Over) -> str:
    """Return mean ± standard error in points, in bold beyond two standard errors."""
    text = f"{100 * of.gain:+.1f} ± {100 * of.standard_error:.1f}"
    return f"**{text}**" if abs(of.gain) > 2 * of.standard_error > 0 else text


def _guards(rows: Sequence[Row]) -> Table | None:
    """Return how well each signal knows whether a candidate helps, over people, tasks and seeds."""
    with_signals = [row for row in rows if row.signals]
    if not with_signals:
        return None
    least: dict[str, float] = {"agreement": 0.0, "present": -TWO_POINTS, "confidence": 0.0}
    least |= {f"{count} corrections": 0.0 for count in ASKED}
    lines = []
    for method in dict.fromkeys(row.method for row in with_signals):
        of_method = [row for row in with_signals if row.method == method]
        lines.append(_guarded(method, "(always)", of_method, lambda _: True))
        for name, smallest in least.items():
            known = [row for row in of_method if name in row.signals]
            if known:
                lines.append(_guarded(method, name, known, lambda row, n=name, s=smallest: row.signals[n] >= s))  # type: ignore[misc]
    header = (
        "candidate", "signal", "decisions", "rank correlation with the gain", "right", "refused", "made worse",
        "mean gain, points",
    )  # fmt: skip
    note = (
        "Decisions (people, tasks, seeds; not independent) whether to use a candidate in place of the base student. "
        "Right: used and not worse, or refused and worse. Agreement: of sound and picture, sum_c p_sound p_picture. "
        "Corrections: the mean probability of what the user said of the first corrected clips, asked by margin. Each "
        "signal is after less before, and a candidate is used if it is not negative (present: if it is at least -2 "
        "points). Without 12 own clips nothing is asked."
    )
    return Table("Would a guard have known?", header, tuple(lines), note)


def _guarded(method: str, name: str, rows: Sequence[Row], accepts: Callable[[Row], bool]) -> tuple[str, ...]:
    truth = np.array([row.gain for row in rows])
    values = np.array([row.signals.get(name, 0.0) for row in rows])
    correlation = f"{float(spearmanr(values, truth).statistic):+.2f}" if np.ptp(values) > 0 else ""
    return (
        method, name, str(len(rows)), correlation, *_outcome(np.array([accepts(row) for row in rows]), truth)
    )  # fmt: skip


def membership(folds: Sequence[Sequence[Suspect]]) -> Section:
    """Return how well each signal separates members of the public set from people left out."""
    lines = []
    for number, name in enumerate(SIGNALS):
        each = [
            separation(
                np.array([one.signals[number] for one in fold if one.member]),
                np.array([one.signals[number] for one in fold if not one.member]),
            )
            for fold in folds
        ]
        spread = np.std(each, ddof=1) if len(each) > 1 else 0.0
        lines.append((name, f"{np.mean(each):.2f} ± {spread:.2f}"))
    note = (
        "Area under the curve: share of pairs (member, stranger) that the signal orders rightly; 0.5 tells nothing. "
        "Mean ± standard deviation over folds. The attacker has a person's labelled clips and the manifest. Shift: "
        "length of the person's shift in units of B. Means: distance of their class means from M. Loss: of the centred "
        "heads. Ordinary: loss of the student's ordinary head, which ships without a person model, too."
    )
    table = Table("What the person model tells of its people", ("signal", "AUC"), tuple(lines), note)
    return Section("Membership", (table,))


def _outcome(accepted: np.ndarray, truth: np.ndarray) -> tuple[str, str, str, str]:
    kept = np.where(accepted, truth, 0.0)
    right = accepted == (truth >= 0)
    return (
        f"{100 * right.mean():.0f} %",
        f"{100 * (1 - accepted.mean()):.0f} %",
        f"{100 * (kept < 0).mean():.0f} %",
        f"{100 * kept.mean():+.1f}",
    )
