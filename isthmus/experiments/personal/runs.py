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
from isthmus.data.groups import Groups, read_groups
from isthmus.data.made_by import made_by
from isthmus.data.splits import apart
from isthmus.distill.models.trunk import weights_file
from isthmus.distill.prepare import (
    FoundTrunks,
    begin_release,
    beside,
    choose_split,
    find_trunks,
    read_data,
    recipe_for,
    release_split,
)
from isthmus.distill.recipes import Recipe
from isthmus.distill.release import Release
from isthmus.distill.student.centred import CannotCentre
from isthmus.distill.training.progress import bars
from isthmus.experiments.personal import cost, paper, people
from isthmus.experiments.personal.cells import cells, study
from isthmus.experiments.personal.cells.cells import SCENARIOS, Asked, Cell
from isthmus.experiments.personal.cells.methods import METHODS, named
from isthmus.experiments.personal.cells.pool import cores
from isthmus.experiments.personal.cells.study import Part
from isthmus.experiments.personal.findings import answers, report
from isthmus.experiments.personal.findings.report import Section
from isthmus.experiments.personal.findings.wire import bytes_per_clip
from isthmus.experiments.personal.ladder import run as ladder
from isthmus.experiments.personal.ladder.measure import Row
from isthmus.experiments.personal.ladder.tables import cloud_section, membership
from isthmus.experiments.personal.ladder.tables import sections as ladder_sections
from isthmus.experiments.personal.options import PRESET, CostOptions, PaperOptions, PeopleOptions


def compare_methods(asked: PaperOptions) -> None:
    """Run the paper's tables and figures, and write the result."""
    scenarios = known(asked.scenarios, SCENARIOS, "--scenarios")
    ladder = () if asked.ladder == "none" else tuple(named(known(asked.ladder, METHODS, "--ladder")))
    clips_per_cluster = whole_numbers(asked.clips_per_cluster, "--clips-per-cluster")
    upload_shares = numbers(asked.upload_shares, "--upload-shares")
    if not all(0 < share <= 1 for share in upload_shares) or not all(clips >= 1 for clips in clips_per_cluster):
        raise ValueError("--upload-shares takes numbers above 0 and up to 1, and --clips-per-cluster numbers from 1 on")
    listing = read_data(asked.data, asked.layout)
    groups = read_groups(asked.data, [ref.name for ref in listing.refs])
    made_by(asked.out, _say)
    root = asked.release or asked.out / "release"
    opened = _release(root, listing, groups, asked, listed(asked.private_actors), asked.private_list)
    clients = _apart(opened, groups)
    choices = paper.Choices(
        clients=tuple(clients),
        seeds=tuple(range(asked.seeds)),
        scenarios=scenarios,
        ladder=ladder,
        clips_per_cluster=clips_per_cluster,
        upload_shares=upload_shares,
    )
    folders = study.decoded(opened, listing, clients)
    study.check_clips(opened, folders, paper.asked(choices))
    possible, too_few = study.possible(opened, folders, paper.asked(choices))
    for each in too_few:
        _say(f"{each.name}: not run, since its share of the clips is too few for a prototype")
    parts = _teachers(opened, root, possible, folders, asked.own_teachers)
    made = _run(parts, asked)
    sizes, outputs = bytes_per_clip(opened.recipe.feature_width, opened.recipe.ratios), _outputs(asked.out, made)
    found = paper.sections(made, opened.recipe.classes, sizes, outputs, too_few)
    _write(
        asked.out,
        "Personalisation by method, client and seed",
        [part.release for part in parts],
        listing,
        made,
        found,
        asked.workers,
        scores=answers.by_cell(outputs),
    )


def _teachers(
    first: Release, root: Path, cells_asked: Sequence[Asked], folders: dict[str, str], own_teachers: bool
) -> list[Part]:
    """Return the cells as parts: all of one release, or with ``own_teachers`` those of each seed of its own one.

    The other releases stand beside the first and share its decoded clips.
    """
    if not own_teachers:
        return [Part(first, folders, tuple(cells_asked))]
    parts = []
    for seed in sorted({each.seed for each in cells_asked}):
        release = first if seed == 0 else beside(first, root.with_name(f"{root.name}-{seed}"))
        parts.append(Part(release, folders, tuple(each for each in cells_asked if each.seed == seed), seed))
    return parts


def leave_people_out(asked: PeopleOptions) -> None:
    """Make every actor in turn the private user of a release, and write the result.

    The methods of the cloud are cells. What helps on the device (the ladder) is measured on base students' features.
    """
    trunks = find_trunks(asked.sound_trunk, asked.picture_trunk)
    chosen = tuple(named(known(asked.methods, METHODS, "--methods")))
    counts = whole_numbers(asked.classes, "--classes")
    listing = read_data(asked.data, asked.layout)
    actors = people.people(listing)
    if asked.together >= len(actors):
        raise ValueError(f"--together {asked.together} leaves nobody public: this data set names {len(actors)} people")
    groups = read_groups(asked.data, [ref.name for ref in listing.refs])
    folds = tuple(actors[start : start + asked.together] for start in range(0, len(actors), asked.together))
    plan = ladder.Plan(folds, tuple(range(asked.seeds)), counts)
    made_by(asked.out, _say)
    if trunks is not None and asked.student_trunk is None:
        preset = asked.preset or PRESET
        measured = ladder.on_trunks(listing, groups, preset, *trunks, plan, asked.out, _say)
        recipe = recipe_for(listing, preset, trunks=trunks[0])
        found = [*ladder_sections(measured.rows), cloud_section(measured.cloud), membership(measured.suspects)]
        _write_people(asked, recipe, [], listing, [], found, measured.rows, {})
        return
    parts = []
    for left_out in folds:
        folder = asked.out / "folds" / "-".join(left_out) / "release"
        opened = _release(folder, listing, groups, asked, left_out, None, trunks)
        folders = study.decoded(opened, listing, _apart(opened, groups))
        cells_asked = tuple(
            each for actor in left_out for each in people.asked(actor, chosen, range(asked.seeds), counts)
        )
        study.check_clips(opened, folders, cells_asked)
        parts.append(Part(opened, folders, cells_asked))
    made = _run(parts, asked, None if trunks is None else trunks[1])
    outputs = _outputs(asked.out, made)
    found = people.sections(made, chosen, outputs)
    releases = [part.release for part in parts]
    rows = []
    try:
        rows = ladder.of_releases(releases, listing, groups, plan, asked.device, _say)
        found += ladder_sections(rows)
    except CannotCentre as error:
        _say(f"what helps on the device is not measured: {error}")
    _write_people(asked, releases[0].recipe, releases, listing, made, found, rows, answers.by_cell(outputs))


def measure_cost(asked: CostOptions) -> None:
    """Measure the processor time of one personalisation, the paper's way and ours, and write the result."""
    torch.set_num_threads(1)
    listing, opened = read_data(asked.data, asked.layout), Release.open(asked.release)
    split = release_split(opened)
    chosen = known(asked.clients, split.clients, "--clients") if asked.clients else tuple(split.clients)
    folders = study.decoded(opened, listing, {client: split.clients[client] for client in chosen})
    code = made_by(asked.out, _say)
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
        "code": code,
        "preset": opened.recipe.name,
        "runs": [asdict(run) for run in found],
    }
    write_atomically(asked.out / "result.json", json.dumps(result, indent=1))
    write_atomically(asked.out / "result.md", made.markdown())
    typer.echo(made.markdown())
    typer.echo(f"written: {asked.out / 'result.json'}, {asked.out / 'result.md'}")


def _release(
    root: Path,
    listing: Listing,
    groups: Groups,
    asked: PaperOptions | PeopleOptions,
    private_actors: Sequence[str],
    private_list: Path | None,
    trunks: FoundTrunks | None = None,
) -> Release:
    """Open the release at ``root``, or begin it if there is none. No recording and no picture of a new one is public
    and private at once. Raises ValueError if options are given that the release that is there does not have.
    """
    student_trunk = asked.student_trunk if isinstance(asked, PeopleOptions) else None
    if (root / "recipe.json").exists():
        opened = Release.open(root)
        _check_same(opened, listing, groups, asked, private_actors, private_list, trunks, student_trunk)
        return opened
    split = choose_split(listing, private_actors=private_actors, private_list=private_list)
    recipe = recipe_for(
        listing,
        asked.preset or PRESET,
        asked.held_out,
        asked.balance,
        None if trunks is None else trunks[0],
        asked.modality_dropout,
        student_trunk,
    )
    for trunk in (recipe.teacher_trunk, recipe.student_trunk):
        weights_file(asked.weights, trunk)
    return begin_release(root, listing, recipe, apart(split, groups))


def _check_same(
    opened: Release,
    listing: Listing,
    groups: Groups,
    asked: PaperOptions | PeopleOptions,
    private_actors: Sequence[str],
    private_list: Path | None,
    trunks: FoundTrunks | None,
    student_trunk: str | None,
) -> None:
    """Raise ValueError if an option of new releases is given that the release has otherwise: nobody's result may be of
    another release than they asked for."""
    recipe = opened.recipe
    options: dict[str, tuple[object, object]] = {
        "--preset": (asked.preset, recipe.name),
        "--balance": (asked.balance, recipe.teacher.balance),
        "--held-out": (asked.held_out, recipe.teacher.held_out),
        "--modality-dropout": (asked.modality_dropout, recipe.modality_dropout),
        "--student-trunk": (student_trunk, recipe.student_trunk),
        "--sound-trunk and --picture-trunk": (None if trunks is None else trunks[0], recipe.pretrained_trunks),
    }
    other = [option for option, (given, has) in options.items() if given is not None and given != has]
    if private_actors or private_list is not None:
        there = release_split(opened)
        wanted = apart(choose_split(listing, private_actors=private_actors, private_list=private_list), groups)
        if set(wanted.clients) != set(there.clients) or not set(wanted.private) <= set(there.private):
            if isinstance(asked, PeopleOptions):  # the folder is named after the people, so the data must have changed
                raise ValueError(
                    f"{opened.root} was begun with other clips of {', '.join(private_actors)} than the data set has "
                    "now: give another --out to begin anew"
                )
            other.append("--private-actors or --private-list")
    if other:
        named = isinstance(asked, PaperOptions) and asked.release is not None
        raise ValueError(
            f"{opened.root} is a release already, of preset {recipe.name}, and it has other settings than "
            f"{', '.join(other)}: leave these out to use it, or "
            f"{'leave out --release' if named else 'give another --out'} to begin a new one"
        )


def _apart(release: Release, groups: Groups) -> dict[str, tuple[str, ...]]:
    """Return the clips of each client: one per recording and picture, and none that shares one with a public clip.

    Clips of another release that break this are left out, and said to be. Raises ValueError if a client has none left.
    """
    split = release_split(release)
    one_each = set(groups.distinct(split.private))
    public = frozenset(made_of for name in split.public for made_of in groups.made_of(name))
    clients = {
        client: tuple(name for name in names if name in one_each and not groups.made_of(name) & public)
        for client, names in split.clients.items()
    }
    left_out = len(split.private) - sum(map(len, clients.values()))
    if left_out:
        _say(f"{left_out} of {len(split.private)} private clips share a recording or a picture with others: left out")
    empty = [client for client, names in clients.items() if not names]
    if empty:
        raise ValueError(
            f"every clip of {', '.join(empty)} shares a recording or a picture with a public clip: begin a new release"
        )
    return clients


def _say(line: str) -> None:
    typer.echo(line, err=True)


def _run(
    parts: Sequence[Part], asked: PaperOptions | PeopleOptions, trunk_files: tuple[Path, Path] | None = None
) -> list[Cell]:
    with bars() as progress:
        return study.run(
            parts,
            asked.out,
            workers=asked.workers or cores(),
            report=_say,
            progress=progress,
            device=asked.device,
            weights=asked.weights,
            trunk_files=trunk_files,
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
    scores: Mapping[str, Any],
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
        scores=scores,
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
    people: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
    scores: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Write the result.

    ``scores``: name of the cell -> head -> score -> value. ``people``: what was measured on persons beside the cells;
    both are in ``people`` of the file, by person, task, method and seed.
    """
    by_client = answers.by_client(made, scores)
    recipe = recipe or releases[0].recipe
    code = made_by(out, _say)
    facts = {
        "data": f"{listing.layout} layout, {len(listing.refs)} clips, {len(listing.damaged)} damaged",
        "preset": recipe.name,
        "releases": ", ".join(release.outputs_key() for release in releases),
        "seeds": ", ".join(map(str, sorted({cell.asked.seed for cell in made}))),
        "cells": str(len(made)),
        **more_facts,
        "code": "; ".join(code),
        "machine": f"{platform.machine()}, {workers or cores()} processes of one thread, torch {torch.__version__}",
    }
    result: Mapping[str, Any] = {
        "what": title,
        "version": __version__,
        "code": code,
        "facts": facts,
        "recipe": json.loads(recipe.to_json()),
        "cells": [asdict(cell) for cell in made],
        "scores": dict(scores),
        "people": {who: {**by_client.get(who, {}), **people.get(who, {})} for who in {**by_client, **people}},
    }
    write_atomically(out / "result.json", json.dumps(result, indent=1))
    written = report.write(out, title, facts, found)
    typer.echo(report.markdown(title, facts, found))
    typer.echo(f"written: {out / 'result.json'}, {', '.join(map(str, written))}")
