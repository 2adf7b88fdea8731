"""The gain from knowing how often each class occurs to a user, computed from finished cells.

Nothing is trained: the device's own function (edge/own_clips/habits.py) corrects the outputs that cells keep. Users of
few classes are simulated: only a person's clips of some classes, drawn at random, are used for selection and test.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from isthmus.data.label_shift import adapted
from isthmus.edge.own_clips.habits import learn, pseudo_clips
from isthmus.experiments.personal.cells.cells import Cell, Outputs
from isthmus.experiments.personal.cells.methods import METHODS
from isthmus.experiments.personal.findings.paired import by_group, difference
from isthmus.experiments.personal.findings.report import Section
from isthmus.experiments.personal.findings.tables import Table, pick, points

Pair = tuple[Outputs, Outputs]
"""(on the selection clips, on the test clips)."""
Shares = npt.NDArray[np.float64]

DRAWS: Final = 20
"""Draws of simulated users per person and number of classes."""
LEAST_CLIPS: Final = (6, 3)
"""Fewest selection clips, and fewest test clips, of a simulated user."""


@dataclass(frozen=True)
class User:
    """Outputs of one student on one user's clips, and the class shares of its heads' training clips."""

    selection_local_NC: npt.NDArray[np.float32]
    selection_taught_NC: npt.NDArray[np.float32]
    selection_labels_N: npt.NDArray[np.int64]
    test_local_NC: npt.NDArray[np.float32]
    test_labels_N: npt.NDArray[np.int64]
    trained_C: Shares

    def only(self, classes: npt.NDArray[np.int64]) -> "User":
        chosen_N, tested_N = np.isin(self.selection_labels_N, classes), np.isin(self.test_labels_N, classes)
        return User(
            self.selection_local_NC[chosen_N],
            self.selection_taught_NC[chosen_N],
            self.selection_labels_N[chosen_N],
            self.test_local_NC[tested_N],
            self.test_labels_N[tested_N],
            self.trained_C,
        )

    def right(self, prior_C: Shares | None) -> float:
        """Return the local head's accuracy on the test clips, corrected with ``prior_C`` (None: uncorrected)."""
        answers_NC = self.test_local_NC
        if prior_C is not None:
            answers_NC = adapted(answers_NC, prior_C, self.trained_C)
        return float((answers_NC.argmax(axis=1) == self.test_labels_N).mean())

    def habits(self, *, times: float = 1.0, held_back: float | None = None, taught: bool = False) -> Shares:
        """Return the habits as the device learns them, or with other numbers of pseudo-clips (``times``,
        ``held_back``), or from the teacher's head."""
        seen_NC = self.selection_taught_NC if taught else self.selection_local_NC
        if held_back is None:
            held_back = times * pseudo_clips(seen_NC)
        return np.array(learn("", seen_NC, self.trained_C.tolist(), held_back=held_back).shares)

    def truth(self) -> Shares:
        counts_C = np.bincount(self.selection_labels_N, minlength=len(self.trained_C))
        shares_C: Shares = counts_C / counts_C.sum()
        return shares_C


READINGS: Final[Mapping[str, Callable[[User], Shares]]] = {
    "habits (the default)": lambda user: user.habits(),
    "a third of the pseudo-clips": lambda user: user.habits(times=1 / 3),
    "three times the pseudo-clips": lambda user: user.habits(times=3),
    "one pseudo-clip a clip, however sure": lambda user: user.habits(held_back=1),
    "from the teacher's head": lambda user: user.habits(taught=True),
    "(the true shares of the selection clips)": lambda user: user.truth(),
}


def habits_part(cells: Sequence[Cell], outputs: Mapping[str, Any], who: str = "") -> list[Section]:
    """Return the section about habits, if there is a student without personalisation to compare with. ``who``: the
    users, for its title. Users of few classes are not simulated again."""
    own = [cell for cell in pick(cells, scenario="sensitive") if cell.asked.name in outputs]
    users = {cell.asked: user_of(cell, own, outputs[cell.asked.name]) for cell in own}
    known = {asked: user for asked, user in users.items() if user is not None}
    base = {(asked.client, asked.seed): user for asked, user in known.items() if asked.method == "all"}
    if not base:
        return []
    text = (
        "A device estimates from its own answers to its selection clips how often each class occurs to its user, "
        "without a label, and corrects its answers with it. Nothing about it leaves the device."
    )
    tables = [_as_they_are(known)]
    if any(cell.masks_read for cell in own):
        tables.append(_by_mask(own))
    if not who:
        tables.append(_of_few_classes(base))
    return [Section(f"The user's habits{who}", tuple(tables), text=text)]


def user_of(cell: Cell, cells: Sequence[Cell], outputs: Pair) -> User | None:
    """Return the user. None if the heads were not trained on all public clips, so that their class shares are unknown
    (distill/student/measure.py), or if no cell keeps these shares."""
    everything = pick(cells, client=cell.asked.client, seed=cell.asked.seed, method="all")
    if not everything or METHODS[cell.asked.method].heads_on != "all":
        return None
    shares_C = np.array(everything[0].selected_per_class, np.float64)
    seen, unseen = outputs
    return User(
        seen.new_local_NC,
        seen.new_taught_NC,
        seen.labels_N,
        unseen.new_local_NC,
        unseen.labels_N,
        shares_C / shares_C.sum(),
    )


def _as_they_are(users: Mapping[Any, User]) -> Table:
    """Return a table: every person with all of their clips, by method."""
    plain = {asked: user.right(None) for asked, user in users.items()}
    read = {asked: user.right(user.habits()) for asked, user in users.items()}

    def of(method: str, values: Mapping[Any, float]) -> dict[str, float]:
        return by_group({(a.client, a.seed): value for a, value in values.items() if a.method == method})

    base = of("all", plain)
    rows = []
    for method in dict.fromkeys(asked.method for asked in users):
        without, knowing = of(method, plain), of(method, read)
        gain, over = difference(knowing, without), difference(knowing, base)
        rows.append(
            (
                method,
                f"{100 * np.mean(list(without.values())):.1f}",
                f"{100 * np.mean(list(knowing.values())):.1f}",
                points(gain),
                f"{gain.better} / {gain.worse}",
                points(over),
            )
        )
    header = ("method", "without", "with habits", "difference", "better / worse", "minus the base student without")
    note = f"Accuracy in %, means over {len(base)} people; differences with their standard error over people."
    return Table("Every person as they are", header, tuple(rows), note)


def _by_mask(cells: Sequence[Cell]) -> Table:
    """Return a table: the gain if every clip lacks its sound, or its picture, or nothing."""
    read = [cell for cell in cells if cell.masks_read]
    masks = list(read[0].masks)
    rows = []
    for method in dict.fromkeys(cell.asked.method for cell in read):
        row = [method]
        for mask in masks:
            own = pick(read, method=method)
            without = by_group({(c.asked.client, c.asked.seed): c.masks[mask] for c in own})
            knowing = by_group({(c.asked.client, c.asked.seed): c.masks_read[mask] for c in own})
            gain = points(difference(knowing, without))
            row.append(f"{100 * np.mean(list(without.values())):.1f}, {gain}")
        rows.append(tuple(row))
    note = (
        "Accuracy in % without habits, and the gain from habits with its standard error over people. Habits are "
        "learned from selection clips that have both."
    )
    return Table("Clips that lack one modality", ("method", *(f"{mask} captured" for mask in masks)), tuple(rows), note)


def _of_few_classes(base: Mapping[tuple[str, int], User]) -> Table:
    """Return a table: gain of each correction for the student without personalisation, for users of 1, 2, ... and all
    classes."""
    classes = len(next(iter(base.values())).trained_C)
    drawn = {count: _drawn(base, count) for count in range(1, classes + 1)}
    counts = [count for count, users in drawn.items() if users]
    if not counts:
        counts_note = "No person has enough clips for this division."
        return Table("Simulated users of few classes", ("reading",), (), counts_note)
    without = {count: _by_person(drawn[count], None) for count in counts}
    rows = [("(without)", *(f"{100 * np.mean(list(without[count].values())):.1f}" for count in counts))]
    for name, reading in READINGS.items():
        row = [name]
        for count in counts:
            found = difference(_by_person(drawn[count], reading), without[count])
            row.append(f"{points(found)}, {found.better} / {found.worse}")
        rows.append(tuple(row))
    header = ("reading", *(f"{count} {'class' if count == 1 else 'classes'}" for count in counts))
    note = (
        "Accuracy in % of the base student, then the gain of each correction: mean ± standard error over people, and "
        f"how many people it makes better / worse on average. At most {DRAWS} draws of classes per person and "
        "seed; the last column has people as they are."
    )
    return Table("Simulated users of few classes", header, tuple(rows), note)


def _drawn(base: Mapping[tuple[str, int], User], count: int) -> dict[tuple[str, int, int], User]:
    """Return each person as up to DRAWS users of ``count`` classes. Draws with too few clips are left out."""
    users: dict[tuple[str, int, int], User] = {}
    for place, ((client, seed), user) in enumerate(sorted(base.items(), key=lambda one: one[0])):
        rng = np.random.default_rng((place, count))
        tried = {tuple(sorted(rng.choice(len(user.trained_C), count, replace=False))) for _ in range(DRAWS)}
        for draw, chosen in enumerate(sorted(tried)):
            part = user.only(np.array(chosen))
            if len(part.selection_labels_N) >= LEAST_CLIPS[0] and len(part.test_labels_N) >= LEAST_CLIPS[1]:
                users[client, seed, draw] = part
    return users


def _by_person(
    users: Mapping[tuple[str, int, int], User], reading: Callable[[User], Shares] | None
) -> dict[str, float]:
    """Average over a person's draws and seeds, because only people are independent."""
    right: dict[str, list[float]] = {}
    for (client, _, _), user in users.items():
        right.setdefault(client, []).append(user.right(None if reading is None else reading(user)))
    return {client: float(np.mean(values)) for client, values in right.items()}
