"""One student measured is a cell: what it is asked for, what came out, and its two files (JSON and outputs)."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from isthmus.data.files import replaced, write_atomically

Floats = npt.NDArray[np.float32]

SCENARIOS: Final = ("sensitive", "insensitive")
"""Latency-sensitive: half of a client's clips serve selection, the others are told. Insensitive: all serve both."""


@dataclass(frozen=True)
class Asked:
    """Everything that tells a cell from another of the same release. ``upload_share``: of the selection clips.
    ``classes``: the client is a user of so many classes, drawn for each seed, and has clips of no other; 0: of all."""

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

    ``accuracy``: ratio -> number type -> share told right by the student's own heads.
    ``teacher_head``: the teacher head on the student's features. ``teacher``: the teacher itself on the same clips.
    ``before``: the base student of the same seed on the same clips. ``a_distance``: the proxy A-distance of the
    client's upload to the public set and to the selection; absent where nothing was sent or too little.
    ``masks``: what was captured of each clip (both, sound, picture) -> share told right.
    ``masks_read``: the same, answers read under the habits of the selection clips, which have both; empty where the
    heads' class shares are not known.
    ``overlap``: Jaccard index of each round's selection with that of the round before.
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

    @property
    def plain(self) -> float:
        """Accuracy uncompressed in float32: the figure of the paper's Tables 5.2 and 5.4."""
        return self.accuracy["1"]["fp32"]


@dataclass(frozen=True)
class Outputs:
    """Probabilities of the base student ("old") and of the cell's ("new") on the same clips, N x C.

    ``local``: by the student's own head. ``taught``: by the teacher head on the student's features.
    """

    old_local_NC: Floats
    new_local_NC: Floats
    old_taught_NC: Floats
    new_taught_NC: Floats
    labels_N: npt.NDArray[np.int64]


def save(folder: Path, cell: Cell, on_selection: Outputs, on_test: Outputs) -> None:
    """Writes the outputs, then the JSON whose presence says that the cell is done."""
    arrays = {
        f"{where}_{name}": value
        for where, outputs in (("selection", on_selection), ("test", on_test))
        for name, value in vars(outputs).items()
    }
    with replaced(folder / f"{cell.asked.name}.npz") as part, part.open("wb") as file:
        np.savez_compressed(file, **arrays)
    write_atomically(folder / f"{cell.asked.name}.json", json.dumps(asdict(cell), indent=1))


def done(folder: Path, asked: Asked) -> bool:
    return (folder / f"{asked.name}.json").is_file()


def load(folder: Path, asked: Asked) -> Cell:
    """Raises ValueError naming the file where it is no cell of this version; delete it to have it made again."""
    path = folder / f"{asked.name}.json"
    try:
        return from_json(json.loads(path.read_text()))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no cell of this version ({error}); delete it and run again") from error


def from_json(raw: Mapping[str, Any]) -> Cell:
    return Cell(**{**raw, "asked": Asked(**raw["asked"])})


def load_outputs(folder: Path, asked: Asked) -> tuple[Outputs, Outputs]:
    """(on the selection clips, on the test clips) of a finished cell."""
    with np.load(folder / f"{asked.name}.npz", allow_pickle=False) as arrays:
        selection, test = (
            Outputs(**{name: arrays[f"{where}_{name}"] for name in Outputs.__dataclass_fields__})
            for where in ("selection", "test")
        )
    return selection, test
