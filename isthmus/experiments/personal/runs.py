"""The runs of ``isthmus experiment`` paper, people and cost: from options to result files."""

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import typer

from isthmus import __version__
from isthmus.command_line import known, listed, numbers, whole_numbers
from isthmus.data.clip import Listing
from isthmus.data.files import write_atomically
from isthmus.data.groups import read_groups
from isthmus.distill.prepare import (
    begin_release,
    choose_split,
    find_trunks,
    read_data,
    recipe_for,
    release_split,
)
from isthmus.distill.recipes import Recipe
from isthmus.distill.release import Release
from isthmus.distill.student.base import make_student
from isthmus.distill.student.centred import CannotCentre
from isthmus.distill.teacher.teach import cache_teacher_outputs, train_teacher
from isthmus.distill.training.loop import pick_device
from isthmus.distill.training.progress import bars
from isthmus.experiments.personal import cost, paper, people
from isthmus.experiments.personal.cells import cells, study
from isthmus.experiments.personal.cells.cells import SCENARIOS, Cell
from isthmus.experiments.personal.cells.methods import METHODS, named
from isthmus.experiments.personal.cells.pool import cores
from isthmus.experiments.personal.cells.study import Part
from isthmus.experiments.personal.findings import report
from isthmus.experiments.personal.findings.report import Section
from isthmus.experiments.personal.findings.wire import bytes_per_clip
from isthmus.experiments.personal.ladder import run as ladder
from isthmus.experiments.personal.ladder.measure import Row
from isthmus.experiments.personal.ladder.tables import cloud_section, membership
from isthmus.experiments.personal.ladder.tables import sections as ladder_sections
from isthmus.experiments.personal.options import CostOptions, PaperOptions, PeopleOptions


def compare_methods(asked: PaperOptions) -> None:
    """Run the paper's tables and figures, and write the result."""
    scenarios = known(asked.scenarios, SCENARIOS, "--scenarios")
    ladder = () if asked.ladder == "none" else tuple(named(known(asked.ladder, METHODS, "--ladder")))
    clips_per_cluster = whole_numbers(asked.clips_per_cluster, "--clips-per-cluster")
    upload_shares = numbers(asked.upload_shares, "--upload-shares")
    listing = read_data(asked.data, asked.layout)
    opened = _release(
        asked.release or asked.out / "release", listing, asked.preset, listed(asked.private_actors), asked.private_list
    )
    if asked.weights is not None:
        _train_pretrained(opened, asked.weights, range(asked.seeds), asked.device)
    split = release_split(opened)
    choices = paper.Choices(
        clients=tuple(split.clients),
        seeds=tuple(range(asked.seeds)),
        scenarios=scenarios,
        ladder=ladder,
        clips_per_cluster=clips_per_cluster,
        upload_shares=upload_shares,
    )
    folders = study.decoded(opened, listing, dict(split.clients))
    made = _run([Part(opened, folders, paper.asked(choices))], asked.out, asked.workers, asked.device)
    sizes = bytes_per_clip(opened.recipe.feature_width, opened.recipe.ratios)
    found = paper.sections(made, opened.recipe.classes, sizes, _outputs(asked.out, made))
    _write(asked.out, "Personalisation by method, client and seed", [opened], listing, made, found, asked.workers)


def leave_people_out(asked: PeopleOptions) -> None:
    """Make every actor in turn the private user of a release, and write the result.

    The methods of the cloud are cells. What helps on the device (the ladder) is measured on base students' features.
    """
    trunks = find_trunks(asked.sound_trunk, asked.picture_trunk)
    chosen = tuple(named(known(asked.methods, METHODS, "--methods")))
    counts = whole_numbers(asked.classes, "--classes")
    listing = read_data(asked.data, asked.layout)
    actors = people.people(listing)
    groups = read_groups(asked.data, [ref.name for ref in listing.refs])
    folds = tuple(actors[start : start + asked.together] for start in range(0, len(actors), asked.together))
    plan = ladder.Plan(folds, tuple(range(asked.seeds)), counts)
    if trunks is not None:
        measured = ladder.on_trunks(listing, groups, asked.preset, *trunks, plan, asked.out, _say)
        recipe = recipe_for(listing, asked.preset, trunks=trunks[0])
        found = [*ladder_sections(measured.rows), cloud_section(measured.cloud), membership(measured.suspects)]
        _write_people(asked, recipe, [], listing, [], found, measured.rows)
        return
    parts = []
    for left_out in folds:
        folder = asked.out / "folds" / "-".join(left_out) / "release"
        opened = _release(folder, listing, asked.preset, left_out, None)
        folders = study.decoded(opened, listing, dict(release_split(opened).clients))
        cells_asked = tuple(
            each for actor in left_out for each in people.asked(actor, chosen, range(asked.seeds), counts)
        )
        parts.append(Part(opened, folders, cells_asked))
    made = _run(parts, asked.out, asked.workers, asked.device)
    found = people.sections(made, chosen, _outputs(asked.out, made))
    releases = [part.release for part in parts]
    rows = []
    try:
        rows = ladder.of_releases(releases, listing, groups, plan, asked.device, _say)
        found += ladder_sections(rows)
    except CannotCentre as error:
        _say(f"what helps on the device is not measured: {error}")
    _write_people(asked, releases[0].recipe, releases, listing, made, found, rows)


def measure_cost(asked: CostOptions) -> None:
    """Measure the processor time of one personalisation, the paper's way and ours, and write the result."""
    torch.set_num_threads(1)
    listing, opened = read_data(asked.data, asked.layout), Release.open(asked.release)
    split = release_split(opened)
    chosen = known(asked.clients, split.clients, "--clients") if asked.clients else tuple(split.clients)
    folders = study.decoded(opened, listing, {client: split.clients[client] for client in chosen})
    found = cost.measure(
        opened,
        folders,
        seeds=range(asked.seeds),
        plain_rounds=asked.plain_rounds,
        plain_epochs=asked.plain_epochs,
        out=asked.out,
        report=_say,
    )
    made = cost.table(found, cost.cache_compute_s(opened))
    result = {
        "what": "cost of one personalisation",
        "preset": opened.recipe.name,
        "runs": [asdict(run) for run in found],
    }
    write_atomically(asked.out / "result.json", json.dumps(result, indent=1))
    write_atomically(asked.out / "result.md", made.markdown())
    typer.echo(made.markdown())
    typer.echo(f"written: {asked.out / 'result.json'}, {asked.out / 'result.md'}")


def _release(
    root: Path, listing: Listing, preset: str, private_actors: Sequence[str], private_list: Path | None
) -> Release:
    """Open the release at ``root``, or begin it if there is none."""
    if (root / "recipe.json").exists():
        return Release.open(root)
    split = choose_split(listing, private_actors=private_actors, private_list=private_list)
    return begin_release(root, listing, recipe_for(listing, preset), split)


def _train_pretrained(opened: Release, folder: Path, seeds: Sequence[int], device: str) -> None:
    """Train the release's teacher and base students from the weights in ``folder``, unless they are trained.

    Raises ValueError if the folder lacks the file of a trunk.
    """
    files = {
        trunk: folder / f"{trunk}.safetensors" for trunk in (opened.recipe.teacher_trunk, opened.recipe.student_trunk)
    }
    missing = [path.name for path in files.values() if not path.is_file()]
    if missing:
        raise ValueError(f"{folder} lacks {', '.join(missing)}: --weights takes one safetensors file per trunk")
    target = pick_device(device)
    if not opened.teacher_path.exists():
        train_teacher(opened, seed=0, device=target, weights=files[opened.recipe.teacher_trunk])
    cache_teacher_outputs(opened, target)
    for seed in seeds:
        make_student(opened, seed, target, weights=files[opened.recipe.student_trunk])


def _say(line: str) -> None:
    typer.echo(line, err=True)


def _run(parts: Sequence[Part], out: Path, workers: int, device: str) -> list[Cell]:
    with bars() as progress:
        return study.run(
            parts,
            out,
            workers=workers or cores(),
            report=_say,
            progress=progress,
            device=device,
        )


def _outputs(out: Path, made: Sequence[Cell]) -> dict[str, tuple[cells.Outputs, cells.Outputs]]:
    return {cell.asked.name: cells.load_outputs(out / "cells", cell.asked) for cell in made}


def _write_people(
    asked: PeopleOptions,
    recipe: Recipe,
    releases: Sequence[Release],
    listing: Listing,
    made: Sequence[Cell],
    found: Sequence[Section],
    rows: Sequence[Row],
) -> None:
    facts = {"folds": f"{asked.together} people left out together", "seeds": str(asked.seeds)}
    if recipe.pretrained_trunks is not None:
        facts["trunks"] = ", ".join(f"{trunk.name} ({trunk.sha256[:16]})" for trunk in recipe.pretrained_trunks)
    _write(
        asked.out,
        "Leave one person out",
        releases,
        listing,
        made,
        found,
        asked.workers,
        recipe=recipe,
        more_facts=facts,
        people=ladder.by_person(rows),
    )


def _write(
    out: Path,
    title: str,
    releases: Sequence[Release],
    listing: Listing,
    made: Sequence[Cell],
    found: Sequence[Section],
    workers: int,
    *,
    recipe: Recipe | None = None,
    more_facts: Mapping[str, str] = MappingProxyType({}),
    people: Mapping[str, Any] | None = None,
) -> None:
    recipe = recipe or releases[0].recipe
    facts = {
        "data": f"{listing.layout} layout, {len(listing.refs)} clips, {len(listing.damaged)} damaged",
        "preset": recipe.name,
        "releases": ", ".join(release.outputs_key() for release in releases),
        "seeds": ", ".join(map(str, sorted({cell.asked.seed for cell in made}))),
        "cells": str(len(made)),
        **more_facts,
        "machine": f"{platform.machine()}, {workers or cores()} processes of one thread, torch {torch.__version__}",
    }
    result: Mapping[str, Any] = {
        "what": title,
        "version": __version__,
        "facts": facts,
        "recipe": json.loads(recipe.to_json()),
        "cells": [asdict(cell) for cell in made],
        **({} if people is None else {"people": people}),
    }
    write_atomically(out / "result.json", json.dumps(result, indent=1))
    written = report.write(out, title, facts, found)
    typer.echo(report.markdown(title, facts, found))
    typer.echo(f"written: {out / 'result.json'}, {', '.join(map(str, written))}")
