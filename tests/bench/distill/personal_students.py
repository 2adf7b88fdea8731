"""Does a student that the cloud distilled for a user help, before and after the device learned the user's offset?

Reads what runs of ``isthmus demo`` left behind: on each device the base student and the personal one, as the product
made, signed and installed them. Both answer the test clips, with and without the offset that the device would learn
from the selection clips. Nothing is trained, so a run takes seconds. An experiment, not part of ``make bench``.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

import numpy as np
import numpy.typing as npt
import typer

from isthmus.data.cache.read import ClipArrays
from isthmus.data.files import write_atomically
from isthmus.data.transforms import evaluation_frames
from isthmus.edge.own_clips.personal import understand
from isthmus.edge.own_clips.window import Window
from isthmus.edge.student.encoder import StudentEncoder
from isthmus.experiments.personal.findings.paired import difference
from isthmus.experiments.personal.findings.tables import Table, points
from isthmus.proto.convert_student import manifest_from_bytes

READINGS: Final = ("own head", "teacher's head", "offset")
COMPARED: Final = (
    ("personal", "own head", "base", "own head"),
    ("personal", "teacher's head", "base", "teacher's head"),
    ("base", "offset", "base", "own head"),
    ("personal", "offset", "base", "offset"),
    ("personal", "offset", "base", "own head"),
)


@dataclass(frozen=True)
class Student:
    """The right answers of one student to the test clips, by reading."""

    right_T: dict[str, npt.NDArray[np.bool_]]


def main(
    demos: Annotated[list[Path], typer.Argument(help="Folders that runs of 'isthmus demo' wrote, one per seed.")],
    out: Annotated[Path, typer.Option(help="JSON file to write to.")],
) -> None:
    """Compare base and personal students of every client, before and after the offset."""
    people = {f"{folder.name} {client}": both for folder in demos for client, both in of_demo(folder).items()}
    shares = {
        person: {f"{who}, {how}": float(each.right_T[how].mean()) for who, each in both.items() for how in READINGS}
        for person, both in people.items()
    }
    changed = {
        person: {how: int((both["base"].right_T[how] != both["personal"].right_T[how]).sum()) for how in READINGS}
        for person, both in people.items()
    }
    rows = [
        (
            f"{who}, {how}, less {other}, {other_how}",
            points(
                difference(
                    {person: each[f"{who}, {how}"] for person, each in shares.items()},
                    {person: each[f"{other}, {other_how}"] for person, each in shares.items()},
                )
            ),
        )
        for who, how, other, other_how in COMPARED
    ]
    columns = list(next(iter(shares.values())))
    each_person = Table(
        "Accuracy, %",
        ("client", *columns),
        tuple((person, *(f"{100 * of[column]:.1f}" for column in columns)) for person, of in shares.items()),
    )
    note = f"{len(people)} people; mean ± standard error over people, bold beyond two of them."
    typer.echo(each_person.markdown() + "\n" + Table("Differences", ("what", "points"), tuple(rows), note).markdown())
    write_atomically(out, json.dumps({"accuracy": shares, "answers whose rightness differs": changed}, indent=1))


def of_demo(folder: Path) -> dict[str, dict[str, Student]]:
    """Return client -> base and personal student. Raises ValueError if a device got no personal one."""
    result = json.loads((folder / "result.json").read_text())
    (release,) = folder.glob("release-*")
    private = [ClipArrays.open(each) for each in (release / "private").iterdir() if each.is_dir()]
    found = {}
    for client in result["clients"]:
        (clips,) = (each for each in private if set(client["clips"]) <= set(each.names))
        tested_T = np.array([clips.names.index(name) for name in client["clips"]])
        own_S = np.setdiff1d(np.arange(len(clips)), tested_T)
        versions = list((folder / "run" / client["name"] / "students" / "versions").iterdir())
        by_kind = {"base" if each.name.startswith("base-") else "personal": each for each in versions}
        if set(by_kind) != {"base", "personal"}:
            raise ValueError(f"{folder}: the device of {client['name']} has no base and personal student")
        found[client["name"]] = {kind: answered(by_kind[kind], clips, own_S, tested_T) for kind in ("base", "personal")}
    return found


def answered(folder: Path, clips: ClipArrays, own_S: npt.NDArray[np.int64], tested_T: npt.NDArray[np.int64]) -> Student:
    """Let a student answer the test clips, as the device does before and after it learned its user."""
    encoder = StudentEncoder(folder, probe=False)
    centred = manifest_from_bytes((folder / "manifest.pb").read_bytes()).centred
    if centred is None:
        raise ValueError(f"{folder.name} has no person model: its release names too few people")
    features = [
        encoder.features(np.array(clips.spectrograms_NFT[row]), evaluation_frames(clips.frames_NKHWC[row], clips.spec))
        for row in range(len(clips))
    ]
    features_MND = np.stack([each.filled() for each in features], axis=1)
    taught_NC, own_NC = encoder.teacher_probabilities(features), encoder.local_probabilities_of(features)
    there_NM = np.ones((len(clips), 2), np.float32)
    names = tuple(clips.names[row] for row in own_S)
    reading = understand("", centred, Window(names, features_MND[:, own_S], there_NM[own_S], own_NC[own_S]))
    told = {
        "own head": own_NC[tested_T],
        "teacher's head": taught_NC[tested_T],
        "offset": reading.answers(features_MND[:, tested_T], there_NM[tested_T], own_NC[tested_T]),
    }
    labels_T = np.asarray(clips.labels_N)[tested_T]
    return Student({how: each.argmax(axis=1) == labels_T for how, each in told.items()})


if __name__ == "__main__":
    typer.run(main)
