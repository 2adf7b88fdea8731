"""Run the ladder: each fold's base, the constants its public people choose, and every method on people left out."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from isthmus.data.cache.keys import digest
from isthmus.data.cache.read import ClipArrays
from isthmus.data.clip import Listing
from isthmus.data.files import write_atomically
from isthmus.data.groups import Groups
from isthmus.distill.models.pretrained import PretrainedTrunk
from isthmus.distill.prepare import decode, recipe_for
from isthmus.distill.recipes import Recipe
from isthmus.distill.release import Release
from isthmus.distill.student.centred import CannotCentre, fit_centred
from isthmus.experiments.personal.findings.scores import Scores
from isthmus.experiments.personal.ladder import bases, cloud, nested
from isthmus.experiments.personal.ladder.bases import Base
from isthmus.experiments.personal.ladder.measure import Row, device_rows, measured, running_rows
from isthmus.experiments.personal.ladder.membership import Suspect, suspect
from isthmus.experiments.personal.ladder.methods import Constants, Known
from isthmus.experiments.personal.ladder.person import Integers, Person
from isthmus.proto.person import Centred

FEWEST_PEOPLE: Final = 5
"""Public people from whom a person model is fitted here: fewer than a cloud takes, to see what they are worth."""

Report = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What is measured: ``folds`` of people left out together, seeds, and numbers of classes (0: all)."""

    folds: tuple[tuple[str, ...], ...]
    seeds: tuple[int, ...]
    class_counts: tuple[int, ...]


@dataclass(frozen=True)
class Found:
    """``rows``: the methods of the device. ``cloud``: selection in the cloud, on the first seed. ``suspects``: per
    fold, every person as an attacker on the person model sees them."""

    rows: list[Row]
    cloud: list[Row]
    suspects: list[list[Suspect]]


def on_trunks(
    listing: Listing,
    groups: Groups,
    preset: str,
    trunks: tuple[PretrainedTrunk, PretrainedTrunk],
    files: tuple[Path, Path],
    plan: Plan,
    out: Path,
    report: Report,
) -> Found:
    """Measure people on pretrained trunks. Clips go through the trunks once, for all folds and seeds."""
    recipe = recipe_for(listing, preset, trunks=trunks)
    clips = decode(listing, [ref.name for ref in listing.refs], recipe, out / "clips")
    rows_MNW = bases.trunk_rows(clips, trunks, files, out / "trunks.npz")
    rows: list[Row] = []
    for left_out in plan.folds:
        folder = out / "folds" / "-".join(left_out)
        public_N, rows_of_person = bases.rows_of(clips, groups, left_out)
        for seed in plan.seeds:
            rows += _kept(
                folder / _name("rows", seed, bases.key(clips, public_N, recipe), plan.class_counts),
                lambda folder=folder, public_N=public_N, rows_of_person=rows_of_person, seed=seed: _of_fold(  # type: ignore[misc]
                    bases.on_trunks(folder, recipe, clips, public_N, rows_MNW, seed), groups, rows_of_person, seed, plan
                ),
            )
            report(f"ladder: {'-'.join(left_out)}, seed {seed}")
    of_device = on_device(out, recipe, clips, groups, plan, report)
    running = as_it_runs(out, recipe, clips, groups, plan, report)
    of_cloud = in_cloud(out, recipe, clips, groups, plan, report)
    return Found(of_device + running + rows, of_cloud, suspects(out, recipe, clips, groups, plan))


def on_device(out: Path, recipe: Recipe, clips: ClipArrays, groups: Groups, plan: Plan, report: Report) -> list[Row]:
    """Measure what the device itself answers on the bases on trunks."""

    def made(base: Base, people: list[Person], seed: int) -> list[Row]:
        known = _known(base)
        return [row for person in people for row in device_rows(person, known, seed, plan.class_counts)]

    return _on_bases(out, "device", recipe, clips, groups, plan, made, report)


def as_it_runs(out: Path, recipe: Recipe, clips: ClipArrays, groups: Groups, plan: Plan, report: Report) -> list[Row]:
    """Measure, on the bases on trunks, a device that goes on learning from what it has answered."""

    def made(base: Base, people: list[Person], seed: int) -> list[Row]:
        known = _known(base)
        return [row for person in people for row in running_rows(person, known, seed, plan.class_counts)]

    return _on_bases(out, "running", recipe, clips, groups, plan, made, report)


def in_cloud(out: Path, recipe: Recipe, clips: ClipArrays, groups: Groups, plan: Plan, report: Report) -> list[Row]:
    """Measure selection in the cloud on the bases on trunks, on the first seed."""

    def made(base: Base, people: list[Person], seed: int) -> list[Row]:
        known = _known(base)
        return [row for person in people for row in cloud.of_person(base, person, known, seed, (0,))]

    first = Plan(plan.folds, plan.seeds[:1], (0,))
    return _on_bases(out, "cloud", recipe, clips, groups, first, made, report)


def _on_bases(
    out: Path,
    what: str,
    recipe: Recipe,
    clips: ClipArrays,
    groups: Groups,
    plan: Plan,
    made: Callable[[Base, list[Person], int], list[Row]],
    report: Report,
) -> list[Row]:
    """Make the rows of every fold and seed from its kept base, unless their file is there."""
    rows: list[Row] = []
    for left_out in plan.folds:
        folder = out / "folds" / "-".join(left_out)
        public_N, rows_of_person = bases.rows_of(clips, groups, left_out)
        key = bases.key(clips, public_N, recipe)
        for seed in plan.seeds:
            base = bases.kept(folder, recipe, clips, public_N, seed)
            people = [base.person(name, rows_N) for name, rows_N in rows_of_person.items()]
            rows += _kept(folder / _name(what, seed, key, plan.class_counts), partial(made, base, people, seed))
            report(f"{what}: {'-'.join(left_out)}, seed {seed}")
    return rows


def suspects(out: Path, recipe: Recipe, clips: ClipArrays, groups: Groups, plan: Plan) -> list[list[Suspect]]:
    """Return, per fold on trunks, every person as an attacker on the fold's person model sees them (seed 0)."""
    found = []
    for left_out in plan.folds:
        public_N, rows_of_person = bases.rows_of(clips, groups, left_out)
        base = bases.kept(out / "folds" / "-".join(left_out), recipe, clips, public_N, plan.seeds[0])
        made = _person_model(base)
        members = _public_people(clips, public_N, groups)
        found.append(
            [
                suspect(base.person(name, rows_N), name in members, made)
                for name, rows_N in (members | rows_of_person).items()
            ]
        )
    return found


def of_releases(
    releases: Sequence[Release], listing: Listing, groups: Groups, plan: Plan, device: str, report: Report
) -> list[Row]:
    """Measure people on the students of trained releases, one per fold."""
    rows: list[Row] = []
    for release, left_out in zip(releases, plan.folds, strict=True):
        clips = decode(listing, [ref.name for ref in listing.refs], release.recipe, release.root / "all")
        public_N, rows_of_person = bases.rows_of(clips, groups, left_out)
        trained_on = set(release.public.names)
        public_N = np.array([row for row in public_N if clips.names[row] in trained_on], np.int64)
        key = bases.key(clips, public_N, release.recipe)
        for seed in plan.seeds:
            base = partial(bases.of_release, release, clips, public_N, seed, torch.device(device))
            rows += _kept(
                release.root / "ladder" / _name("rows", seed, key, plan.class_counts),
                lambda base=base, people=rows_of_person, seed=seed: _of_fold(base(), groups, people, seed, plan),  # type: ignore[misc]
            )
            report(f"ladder: {'-'.join(left_out)}, seed {seed}")
    return rows


def by_person(rows: Sequence[Row]) -> dict[str, Any]:
    """Return person -> "protocol, classes" -> method -> seed -> scores: all that the tables are made of."""
    found: dict[str, Any] = {}
    for row in rows:
        task = f"{row.protocol}, {row.classes or 'all'} classes"
        of_seed = found.setdefault(row.person, {}).setdefault(task, {}).setdefault(row.method, {})
        of_seed.setdefault(str(row.seed), []).append(
            {
                "test_clips": row.test_clips,
                **{name: round(value, 4) for name, value in asdict(row.scores).items()},
                **{f"signal {name}": round(value, 4) for name, value in row.signals.items()},
            }
        )
    return found


def _of_fold(base: Base, groups: Groups, rows_of_person: dict[str, Integers], seed: int, plan: Plan) -> list[Row]:
    known = _known(base)
    try:
        constants = nested.choose(base, _public_people(base.clips, base.public_N, groups), plan.class_counts, seed)
    except CannotCentre:
        constants = Constants()  # too few public people to leave some of them out
    return [
        row
        for name, rows_N in rows_of_person.items()
        for row in measured(base.person(name, rows_N), known, constants, seed, plan.class_counts)
    ]


def _known(base: Base) -> Known:
    counts_C = np.bincount(np.asarray(base.clips.labels_N)[base.public_N], minlength=len(base.clips.classes))
    return Known(_person_model(base), (counts_C / counts_C.sum()).astype(np.float32))


def _person_model(base: Base) -> Centred:
    public_N = base.public_N
    labels_N = np.asarray(base.clips.labels_N)[public_N]
    actors = [base.clips.actors[row] for row in public_N]
    return fit_centred(
        base.features_MND[:, public_N], np.ones((len(public_N), 2)), labels_N, actors, fewest=FEWEST_PEOPLE
    )


def _public_people(clips: ClipArrays, public_N: Integers, groups: Groups) -> dict[str, Integers]:
    of: dict[str, list[str]] = {}
    for row in public_N:
        of.setdefault(clips.actors[row], []).append(clips.names[row])
    row_of = {name: row for row, name in enumerate(clips.names)}
    return {actor: np.array([row_of[name] for name in groups.distinct(names)], np.int64) for actor, names in of.items()}


def _name(what: str, seed: int, key: str, class_counts: Sequence[int]) -> str:
    """Return the name of a file of rows. Other clips, another preset and other numbers of classes have other rows."""
    return f"{what}-{seed}-{digest([key, *map(str, class_counts)])[:12]}.json"


def _kept(path: Path, make: Callable[[], list[Row]]) -> list[Row]:
    """Return the rows of a fold and seed, from their file if they were measured before."""
    if path.exists():
        return [Row(**{**raw, "scores": Scores(**raw["scores"])}) for raw in json.loads(path.read_text())]
    rows = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps([asdict(row) for row in rows]))
    return rows
