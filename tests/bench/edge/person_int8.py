"""What a device learns of its user with an int8 student, against float32: people of trained releases as units.

    python -m tests.bench.edge.person_int8 runs/*/release --data DATA --out person-int8.json

The person model is fitted on float32 features of public clips and travels with the student. For each release the base
student is exported in both number types. Each private person's clips are halved per class, the device learns the person
without labels from one half and answers the other. The last candidate has a person model that was fitted on int8
features. An experiment, not part of ``make bench``.
"""

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

import numpy as np
import numpy.typing as npt
import torch
import typer

from isthmus.data.cache.read import ClipArrays
from isthmus.data.groups import Groups, read_groups
from isthmus.distill.models.heads import HeadBank
from isthmus.distill.release import Release
from isthmus.distill.selection import Selection
from isthmus.distill.student.base import base_heads
from isthmus.distill.student.centred import fit_centred
from isthmus.distill.student.evaluate import StudentOutputs, bank_probabilities
from isthmus.distill.student.export import AUDIO_ENCODER, VISUAL_ENCODER, export_student
from isthmus.distill.student.int8 import encoded_by, quantise_student
from isthmus.edge.own_clips.personal import understand
from isthmus.edge.own_clips.window import Window
from isthmus.proto.messages import FloatArray
from isthmus.proto.person import Centred
from tests.bench.edge.few_classes import halves
from tests.bench.edge.int8 import private_clips
from tests.bench.harness import Report

CPU: Final = torch.device("cpu")
CANDIDATES: Final = (
    "float32, base",
    "int8, base",
    "float32, learned",
    "int8, learned",
    "int8, learned, person model fitted in int8",
)


@dataclass(frozen=True, eq=False)
class Seen:
    """What a device sees of clips: features (M, N, D) and the local head's answers (N, C)."""

    features_MND: FloatArray
    local_NC: FloatArray

    def learned(self, centred: Centred, own_S: npt.NDArray[np.int64], test_T: npt.NDArray[np.int64]) -> FloatArray:
        """Return the answers (T, C) after the user was learned from ``own_S`` without labels."""
        names, both = tuple(map(str, own_S)), np.ones((len(own_S), 2), np.float32)
        reading = understand("", centred, Window(names, self.features_MND[:, own_S], both, self.local_NC[own_S]))
        there_TM = np.ones((len(test_T), 2), np.float32)
        return reading.answers(self.features_MND[:, test_T], there_TM, self.local_NC[test_T])


def seen(outputs: StudentOutputs, heads: HeadBank) -> Seen:
    local_NC = bank_probabilities(heads, outputs, heads.local_ratio)
    return Seen(np.stack([outputs.audio_ND, outputs.visual_ND]), local_NC)


def of_clips(
    clips: ClipArrays, groups: Groups, by_kind: Mapping[str, Seen], models: Mapping[str, Centred], halvings: int
) -> dict[str, list[float]]:
    """Return each candidate's accuracy (mean over ``halvings``) per person of the clips."""
    labels_N, found = np.asarray(clips.labels_N), {name: list[float]() for name in CANDIDATES}
    for actor in sorted(set(clips.actors)):
        kept = groups.distinct([name for name, whose in zip(clips.names, clips.actors, strict=True) if whose == actor])
        own_N = np.isin(np.array(clips.names), kept)
        shown = np.unique(labels_N[own_N])
        of_person = []
        for seed in range(halvings):
            own_S, test_T = halves(own_N, labels_N, shown.tolist(), seed)
            exact, small = by_kind["fp32"], by_kind["int8"]
            answers = (
                exact.local_NC[test_T],
                small.local_NC[test_T],
                exact.learned(models["fp32"], own_S, test_T),
                small.learned(models["fp32"], own_S, test_T),
                small.learned(models["int8"], own_S, test_T),
            )
            of_person.append([float((each.argmax(axis=1) == labels_N[test_T]).mean()) for each in answers])
        for name, value in zip(CANDIDATES, np.mean(of_person, axis=0), strict=True):
            found[name].append(float(value))
    return found


def measured(release: Release, data: Path | None, folder: Path, halvings: int) -> tuple[str, dict[str, list[float]]]:
    """Return what the export says of int8, and each candidate's accuracies by private person (none if refused)."""
    public, labels_N = release.public, release.labels()
    heads = base_heads(release, 0, CPU)
    exact, small = folder / "fp32", folder / "int8"
    export_student(release, release.student(0), heads, exact)
    shutil.copytree(exact, small)
    made, _ = quantise_student(release, small, heads, Selection.whole(len(public.names)))
    found = {name: list[float]() for name in CANDIDATES}
    if not made.used:
        return str(made), found
    files = {kind: (path / AUDIO_ENCODER, path / VISUAL_ENCODER) for kind, path in (("fp32", exact), ("int8", small))}
    models = {}
    for kind, (audio, visual) in files.items():
        features_MND = seen(encoded_by(audio, visual, release, public), heads).features_MND
        models[kind] = fit_centred(features_MND, np.ones((len(public), 2)), labels_N, public.actors)
    for clips in private_clips(release):
        by_kind = {kind: seen(encoded_by(*of, release, clips), heads) for kind, of in files.items()}
        groups = read_groups(data, clips.names) if data else Groups({})
        for name, values in of_clips(clips, groups, by_kind, models, halvings).items():
            found[name] += values
    return str(made), found


def main(
    releases: Annotated[list[Path], typer.Argument(help="Trained releases with private people.")],
    data: Annotated[Path | None, typer.Option(help="Their data set: its manifest says which clips are alike.")] = None,
    halvings: int = 4,
    out: Annotated[Path | None, typer.Option(help="Write the results to this JSON file.")] = None,
) -> None:
    """Compare learning a user with float32 and int8 students."""
    report = Report("person_int8", {"releases": [str(path) for path in releases], "halvings": halvings})
    found = {name: list[float]() for name in CANDIDATES}
    for root in releases:
        with tempfile.TemporaryDirectory() as name:
            told, of_release = measured(Release.open(root), data, Path(name), halvings)
        report.notes.append(f"{root.parent.name}/{root.name}: {told}")
        for candidate, values in of_release.items():
            found[candidate] += values
    for candidate, values in found.items():
        report.rows.append({"what": candidate, "accuracy by person": values, **_summary(values)})
    for better, worse in ((2, 0), (3, 1), (4, 1), (1, 0), (3, 2), (4, 3)):
        pair = CANDIDATES[better], CANDIDATES[worse]
        differences = [one - other for one, other in zip(found[pair[0]], found[pair[1]], strict=True)]
        report.rows.append({"what": f"{pair[0]} − {pair[1]}", **_summary(differences)})
    report.finish(
        {
            "what": lambda row: str(row["what"]),
            "people": lambda row: str(row["people"]),
            "mean ± standard error over people, %": lambda row: f"{row['mean']:.1f} ± {row['error']:.1f}",
        },
        out,
    )


def _summary(values: Sequence[float]) -> dict[str, float]:
    """Return the mean in per cent and its standard error over people; NaN if there are too few."""
    rows = 100 * np.array(values)
    error = rows.std(ddof=1) / np.sqrt(len(rows)) if len(rows) > 1 else np.nan
    return {"people": len(rows), "mean": float(rows.mean()) if len(rows) else np.nan, "error": float(error)}


if __name__ == "__main__":
    typer.run(main)
