"""What a device learns of synthetic people who show all classes or few, without labels: gain over the base student.

Makes a synthetic set with people of whom nothing is public, trains a release on the others as ``isthmus demo`` does,
and lets each of these people be one who shows all classes and one who shows three. The demo has one person of each kind
per seed; here there are enough to choose by. An experiment, not part of ``make bench``.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

import numpy as np
import numpy.typing as npt
import torch
import typer

from isthmus.data.cache.read import ClipArrays
from isthmus.data.files import write_atomically
from isthmus.data.layouts.listing import read_listing
from isthmus.data.splits import by_actor
from isthmus.data.synthetic.sets import MEASURED, Guest, make_crema_d
from isthmus.demo.run import DIFFICULTY, PUBLIC_PEOPLE, PUBLIC_TAKES
from isthmus.distill.prepare import begin_release, decode, recipe_for
from isthmus.distill.release import Release
from isthmus.distill.student.base import base_heads, make_student
from isthmus.distill.student.centred import fit_centred
from isthmus.distill.student.evaluate import bank_probabilities, student_outputs
from isthmus.distill.teacher.teach import cache_teacher_outputs, train_teacher
from isthmus.edge.own_clips.personal import understand
from isthmus.edge.own_clips.window import Window
from isthmus.experiments.personal.findings.tables import Table
from isthmus.proto.messages import Captured, FloatArray
from isthmus.proto.person import Centred

Integers = npt.NDArray[np.int64]

CPU: Final = torch.device("cpu")
SHOWN: Final = {
    "all six": (0, 1, 2, 3, 4, 5),
    "neutral, happy, sad": (0, 1, 2),
    "fearful, disgusted, angry": (3, 4, 5),
    "happy, fearful, angry": (1, 3, 5),
}


@dataclass(frozen=True, eq=False)
class Student:
    """A base student's outputs on the clips of people it has not seen."""

    centred: Centred
    features_MND: FloatArray
    local_NC: FloatArray
    clips: ClipArrays

    def gains(self, shown: Sequence[int], halvings: int) -> tuple[FloatArray, FloatArray]:
        """Return the accuracy before and the gain of each person, (P,), who shows these classes."""
        before, gains = [], []
        labels_N = np.asarray(self.clips.labels_N)
        for actor in sorted(set(self.clips.actors)):
            of_person: list[tuple[float, float]] = []
            for half in range(halvings):
                own_S, test_T = halves(np.array(self.clips.actors) == actor, labels_N, shown, half)
                there = np.ones((len(own_S), 2), np.float32), np.ones((len(test_T), 2), np.float32)
                names = tuple(self.clips.names[row] for row in own_S)
                window = Window(names, self.features_MND[:, own_S], there[0], self.local_NC[own_S])
                answers_TC = understand("", self.centred, window).answers(
                    self.features_MND[:, test_T], there[1], self.local_NC[test_T]
                )
                right = [
                    (each.argmax(axis=1) == labels_N[test_T]).mean() for each in (self.local_NC[test_T], answers_TC)
                ]
                of_person.append((float(right[0]), float(right[1] - right[0])))
            mean = np.mean(of_person, axis=0)
            before.append(mean[0])
            gains.append(mean[1])
        return np.array(before, np.float32), np.array(gains, np.float32)


def halves(
    own_N: npt.NDArray[np.bool_], labels_N: Integers, shown: Sequence[int], seed: int
) -> tuple[Integers, Integers]:
    """Return the rows to learn from and those to test on: half of each class."""
    rng = np.random.default_rng(seed)
    rows = [rng.permutation(np.flatnonzero(own_N & (labels_N == label))) for label in shown]
    return (
        np.sort(np.concatenate([each[: len(each) // 2] for each in rows])),
        np.sort(np.concatenate([each[len(each) // 2 :] for each in rows])),
    )


def trained(folder: Path, seed: int, people: int, takes: int, preset: str) -> Student:
    """Make the set and the release, unless they are there, and return the student's outputs."""
    data = folder / "data"
    guests = [Guest(SHOWN["all six"], takes)] * people
    make_crema_d(
        data,
        actors=PUBLIC_PEOPLE,
        takes=PUBLIC_TAKES,
        seed=seed,
        difficulty=DIFFICULTY,
        people=MEASURED,
        guests=guests,
    )
    listing = read_listing(data)
    private = [f"{1001 + PUBLIC_PEOPLE + number}" for number in range(people)]
    recipe = recipe_for(listing, preset)
    split = by_actor(listing, private)
    release = begin_release(folder / "release", listing, recipe, split)
    train_teacher(release, seed=seed, device=CPU)
    cache_teacher_outputs(release, CPU)
    make_student(release, 0, CPU)
    clips = decode(listing, split.private, recipe, folder / "private")
    outputs = student_outputs(release.student(0), release.teacher_head, clips, CPU)
    local_NC = bank_probabilities(base_heads(release, 0, CPU), outputs, 1.0, Captured.BOTH)
    return Student(_centred(release), np.stack([outputs.audio_ND, outputs.visual_ND]), local_NC, clips)


def _centred(release: Release) -> Centred:
    outputs = student_outputs(release.student(0), release.teacher_head, release.public, CPU)
    features_MND = np.stack([outputs.audio_ND, outputs.visual_ND])
    return fit_centred(features_MND, np.ones((len(release.public), 2)), release.labels(), release.public.actors)


def main(
    folder: Annotated[Path, typer.Argument(help="Folder for the set and the release; what is there is used.")],
    seed: int = 10,
    people: int = 12,
    takes: int = 16,
    halvings: int = 4,
    preset: str = "demo",
    out: Annotated[Path | None, typer.Option(help="Write the results to this JSON file.")] = None,
) -> None:
    """Compare the base student and the device that learned its user, over ``people`` synthetic people."""
    student = trained(folder / f"seed-{seed}", seed, people, takes, preset)
    rows, found = [], {}
    for what, shown in SHOWN.items():
        before_P, gain_P = student.gains(shown, halvings)
        error = gain_P.std(ddof=1) / np.sqrt(people)
        gain = f"{100 * gain_P.mean():+.1f} ± {100 * error:.1f}"
        rows.append((what, f"{100 * before_P.mean():.1f}", gain, f"{(gain_P < -0.02).sum()}"))
        found[what] = {"before": before_P.tolist(), "gain": gain_P.tolist()}
    note = f"{people} people, mean ± standard error over people; worse: who lose more than two points."
    columns = ("classes", "before, %", "gain without labels, points", "worse")
    typer.echo(Table(f"Seed {seed}, preset {preset}", columns, tuple(rows), note).markdown())
    if out is not None:
        write_atomically(out, json.dumps({"seed": seed, "preset": preset, "people": found}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
