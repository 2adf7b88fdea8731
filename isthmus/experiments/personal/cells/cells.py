"""A cell is one measured student: what was asked for, the result, and its two files (JSON and outputs)."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from isthmus.data.files import replaced, write_atomically

Floats = npt.NDArray[np.float32]

SCENARIOS: Final = ("sensitive", "insensitive")
"""Latency-sensitive: half of a client's clips are for selection, the others for testing. Insensitive: all are both."""


@dataclass(frozen=True)
class Asked:
    """What identifies a cell within its release. ``upload_share``: share of the selection clips that is uploaded.
    ``classes``: the client has clips of this many classes only, drawn per seed; 0: of all."""

    client: str
    scenario: str
    method: str
    seed: int
    clips_per_cluster: int = 3
    upload_share: float = 1.0
    classes: int = 0

    @property
    def name(self) -> str:
        few = f".k{self.classes}" if self.classes else ""
        return (
            f"{self.client}.{self.scenario}.{self.method}.s{self.seed}"
            f".c{self.clips_per_cluster}.u{round(100 * self.upload_share)}{few}"
        )


@dataclass(frozen=True)
class Cell:
    """One student measured. Accuracies are shares of ``test_clips``.

    ``accuracy``: ratio -> number type -> accuracy of the student's own heads.
    ``teacher_head``: the teacher head on the student's features. ``teacher``: the teacher itself on the same clips.
    ``before``: the base student of the same seed on the same clips. ``a_distance``: the proxy A-distance of the
    client's upload to the public set and to the selection; absent if too little or nothing was sent.
    ``masks``: what was captured of each clip (both, sound, picture) -> accuracy.
    ``masks_read``: the same, with the habits of the selection clips applied (these have both modalities); empty if the
    heads' class shares are not known.
    ``overlap``: Jaccard index of each round's selection with that of the round before.
    ``steps``: gradient steps of distillation.
    ``offset_before`` and ``offset``: the base student and this one as a device answers that has learned its user from
    the selection clips, without labels; None if the client is not one person, or the public clips name too few people.
    ``of``: the hash of what it was made of, see ``work.made_of``; "" in cells of before it was noted.
    """

    asked: Asked
    selection_clips: int
    test_clips: int
    before: float
    accuracy: Mapping[str, Mapping[str, float]]
    teacher_head: float
    teacher: float
    selected: int
    selected_per_class: Sequence[float]
    effective_samples: float
    rows_sent: int
    smallest_cluster: int
    upload_bytes: int
    overlap: Sequence[float]
    a_distance: Mapping[str, float]
    stage_s: Mapping[str, float]
    losses: Sequence[float]
    masks: Mapping[str, float]
    masks_read: Mapping[str, float] = field(default_factory=dict)
    steps: int = 0
    offset_before: float | None = None
    offset: float | None = None
    of: str = ""

    @property
    def plain(self) -> float:
        """Accuracy without compression in float32: the figure of the paper's Tables 5.2 and 5.4."""
        return self.accuracy["1"]["fp32"]


@dataclass(frozen=True)
class Outputs:
    """Probabilities of the base student ("old") and of the cell's ("new") on the same clips, N x C.

    ``local``: from the student's own head. ``taught``: from the teacher head on the student's features.
    """

    old_local_NC: Floats
    new_local_NC: Floats
    old_taught_NC: Floats
    new_taught_NC: Floats
    labels_N: npt.NDArray[np.int64]


def save(folder: Path, cell: Cell, on_selection: Outputs, on_test: Outputs) -> None:
    """Write the outputs, then the JSON file. If that exists, the cell is done."""
    arrays = {
        f"{where}_{name}": value
        for where, outputs in (("selection", on_selection), ("test", on_test))
        for name, value in vars(outputs).items()
    }
    with replaced(folder / f"{cell.asked.name}.npz") as part, part.open("wb") as file:
        np.savez_compressed(file, **arrays)
    write_atomically(folder / f"{cell.asked.name}.json", json.dumps(asdict(cell), indent=1))


def done(folder: Path, asked: Asked, of: Callable[[], str]) -> bool:
    """Return whether the cell is there, made of the same data, release and student: ``of`` returns their hash.

    A cell of before the hash was noted is taken by its name. One that cannot be read counts as done: ``load`` says what
    to do with it.
    """
    try:
        noted = json.loads((folder / f"{asked.name}.json").read_text()).get("of", "")
    except FileNotFoundError:
        return False
    except (ValueError, AttributeError):
        return True
    return not noted or noted == of()


def load(folder: Path, asked: Asked) -> Cell:
    """Read a cell. Raises ValueError, with the file's name, if it is of another version; delete it to redo it."""
    path = folder / f"{asked.name}.json"
    try:
        return from_json(json.loads(path.read_text()))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no cell of this version ({error}); delete it and run again") from error


def from_json(raw: Mapping[str, Any]) -> Cell:
    return Cell(**{**raw, "asked": Asked(**raw["asked"])})


def load_outputs(folder: Path, asked: Asked) -> tuple[Outputs, Outputs]:
    """Return the outputs of a finished cell (on the selection clips, on the test clips)."""
    with np.load(folder / f"{asked.name}.npz", allow_pickle=False) as arrays:
        selection, test = (
            Outputs(**{name: arrays[f"{where}_{name}"] for name in Outputs.__dataclass_fields__})
            for where in ("selection", "test")
        )
    return selection, test
