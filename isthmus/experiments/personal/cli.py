"""`isthmus experiment paper`, `people` and `cost`: personalisation compared, over methods, clients and seeds."""

import json
import logging
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from isthmus import __version__
from isthmus.data.cache.build import CacheFull
from isthmus.data.clip import Listing
from isthmus.data.files import write_atomically
from isthmus.distill.prepare import begin_release, choose_split, read_data, recipe_for, release_split
from isthmus.distill.recipes import PRESETS
from isthmus.distill.release import Release, ReleaseError
from isthmus.distill.training.checkpoint import CheckpointError
from isthmus.distill.training.loop import TrainingDiverged
from isthmus.distill.training.progress import bars
from isthmus.experiments.personal import cost, paper, people
from isthmus.experiments.personal.cells import cells, study
from isthmus.experiments.personal.cells.cells import SCENARIOS, Cell
from isthmus.experiments.personal.cells.methods import METHODS, PAPER, named
from isthmus.experiments.personal.cells.pool import CellsFailed, cores
from isthmus.experiments.personal.cells.study import Part
from isthmus.experiments.personal.findings import report
from isthmus.experiments.personal.findings.report import Section
from isthmus.experiments.personal.findings.wire import bytes_per_clip
from isthmus.proto.errors import IsthmusError

EXPECTED = (
    ReleaseError,
    CheckpointError,
    TrainingDiverged,
    CacheFull,
    CellsFailed,
    IsthmusError,
    ValueError,
    KeyError,
    OSError,
)

Data = Annotated[Path, typer.Option(help="A data set in CREMA-D's or AVE's published layout.")]
Out = Annotated[Path, typer.Option(help="Folder of cells, result.json, result.md, pictures and report.html.")]
Preset = Annotated[str, typer.Option(help=f"Sizes and schedules of a new release: {', '.join(PRESETS)}.")]
Layout = Annotated[str, typer.Option(help="'auto', 'crema-d' or 'ave'.")]
Seeds = Annotated[int, typer.Option(help="Seeds 0, 1 and so on to this many; the paper's gaps want 5 or more.", min=1)]
Workers = Annotated[int, typer.Option(help="Processes of one thread each; 0: one a core.", min=0)]
Device = Annotated[str, typer.Option(help="Where cells are trained: 'cpu', or 'cuda' with --workers 1.")]

LADDER = tuple(name for name in METHODS if name not in PAPER)


def told(command: Callable[..., None]) -> Callable[..., None]:
    """Turns the errors a user can act on into one line and exit code 1; Ctrl-C says that finished cells are kept."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        logging.basicConfig(level=logging.WARNING)
        try:
            command(*args, **kwargs)
        except EXPECTED as error:
            typer.echo(f"isthmus experiment: {error.args[0] if error.args else error}", err=True)
            raise typer.Exit(1) from error
        except KeyboardInterrupt:
            typer.echo("isthmus experiment: stopped; finished cells are kept, the same command goes on.", err=True)
            raise typer.Exit(130) from None

    return run


@told
def paper_command(
    data: Data,
    out: Out,
    release: Annotated[Path | None, typer.Option(help="A release to use; default: one made in OUT/release.")] = None,
    preset: Preset = "small",
    layout: Layout = "auto",
    private_actors: Annotated[
        str, typer.Option(help="For a new release: actors kept private, one client each (split by person).")
    ] = "",
    private_list: Annotated[
        Path | None, typer.Option(help="For a new release: the published list of private clips.")
    ] = None,
    seeds: Seeds = 5,
    scenarios: Annotated[str, typer.Option(help="Comma-separated: sensitive, insensitive.")] = ",".join(SCENARIOS),
    ladder: Annotated[
        str, typer.Option(help="Methods beside the paper's four, in the latency-sensitive scenario; 'none' for none.")
    ] = ",".join(LADDER),
    clips_per_cluster: Annotated[str, typer.Option(help="Figure 5.12's axis, comma-separated.")] = "3,6,9,12",
    upload_shares: Annotated[
        str, typer.Option(help="Figure 5.13's axis: shares of the selection clips, comma-separated.")
    ] = "0.25,0.5,0.75,1",
    workers: Workers = 0,
    device: Device = "cpu",
) -> None:
    """The paper's Tables 5.2 to 5.4 and Figures 5.6 to 5.15, with the selection ladder and the controls.

    Trains a teacher first where there is none. Every cell (client, scenario, method, seed) is a file: a run that was
    stopped goes on, and more seeds or methods can be added later.
    """
    listing = read_data(data, layout)
    opened = _release(release or out / "release", listing, preset, private_actors, private_list)
    split = release_split(opened)
    choices = paper.Choices(
        clients=tuple(split.clients),
        seeds=tuple(range(seeds)),
        scenarios=_known(scenarios, SCENARIOS),
        ladder=() if ladder == "none" else tuple(named(_listed(ladder))),
        clips_per_cluster=tuple(int(value) for value in _listed(clips_per_cluster)),
        upload_shares=tuple(float(value) for value in _listed(upload_shares)),
    )
    folders = study.decoded(opened, listing, dict(split.clients))
    made = _run([Part(opened, folders, paper.asked(choices))], out, workers, device)
    sizes = bytes_per_clip(opened.recipe.feature_width, opened.recipe.ratios)
    found = paper.sections(made, opened.recipe.classes, sizes, _outputs(out, made))
    _write(out, "Personalisation by method, client and seed", [opened], listing, made, found, workers)


@told
def people_command(
    data: Data,
    out: Out,
    preset: Preset = "small",
    layout: Layout = "auto",
    methods: Annotated[
        str, typer.Option(help=f"Comma-separated, of {', '.join(METHODS)}.")
    ] = "all,random,cluster,kept",
    seeds: Seeds = 1,
    together: Annotated[
        int,
        typer.Option(help="Persons left out of one release together: each costs a teacher's training less.", min=1),
    ] = 1,
    classes: Annotated[
        str, typer.Option(help="Comma-separated: users of how many classes each person is made; 0: of all they have.")
    ] = "0",
    workers: Workers = 0,
    device: Device = "cpu",
) -> None:
    """Leave one person out: every actor in turn is the private user of a release that never saw or heard them."""
    listing = read_data(data, layout)
    actors = people.people(listing)
    chosen = tuple(named(_listed(methods)))
    counts = tuple(int(value) for value in _listed(classes))
    parts = []
    for start in range(0, len(actors), together):
        left_out = actors[start : start + together]
        opened = _release(out / "folds" / "-".join(left_out) / "release", listing, preset, ",".join(left_out), None)
        folders = study.decoded(opened, listing, dict(release_split(opened).clients))
        asked = tuple(each for actor in left_out for each in people.asked(actor, chosen, range(seeds), counts))
        parts.append(Part(opened, folders, asked))
    made = _run(parts, out, workers, device)
    found = people.sections(made, chosen, _outputs(out, made))
    _write(out, "Leave one person out", [part.release for part in parts], listing, made, found, workers)


@told
def cost_command(
    data: Data,
    release: Annotated[Path, typer.Option(help="A release whose teacher is trained.")],
    out: Out,
    layout: Layout = "auto",
    clients: Annotated[str, typer.Option(help="Comma-separated; empty: all of the release's.")] = "",
    seeds: Seeds = 1,
    plain_rounds: Annotated[int, typer.Option(help="Rounds of the plain loop; the paper has 15.", min=1)] = 15,
    plain_epochs: Annotated[int, typer.Option(help="Its epochs; the paper has 150.", min=1)] = 150,
) -> None:
    """Processor time of one personalisation: the paper's loop with the teacher in it, and ours, in one run."""
    torch.set_num_threads(1)
    listing, opened = read_data(data, layout), Release.open(release)
    split = release_split(opened)
    chosen = _known(clients, tuple(split.clients)) if clients else tuple(split.clients)
    folders = study.decoded(opened, listing, {client: split.clients[client] for client in chosen})
    found = cost.measure(
        opened,
        folders,
        seeds=range(seeds),
        plain_rounds=plain_rounds,
        plain_epochs=plain_epochs,
        out=out,
        told=lambda line: typer.echo(line, err=True),
    )
    made = cost.table(found, cost.cache_compute_s(opened))
    result = {
        "what": "cost of one personalisation",
        "preset": opened.recipe.name,
        "runs": [asdict(run) for run in found],
    }
    write_atomically(out / "result.json", json.dumps(result, indent=1))
    write_atomically(out / "result.md", made.markdown())
    typer.echo(made.markdown())
    typer.echo(f"written: {out / 'result.json'}, {out / 'result.md'}")


def _release(root: Path, listing: Listing, preset: str, private_actors: str, private_list: Path | None) -> Release:
    """The release at ``root``, begun where there is none."""
    if (root / "recipe.json").exists():
        return Release.open(root)
    split = choose_split(listing, private_actors=_listed(private_actors), private_list=private_list)
    return begin_release(root, listing, recipe_for(listing, preset), split)


def _run(parts: Sequence[Part], out: Path, workers: int, device: str) -> list[Cell]:
    with bars() as progress:
        return study.run(
            parts,
            out,
            workers=workers or cores(),
            told=lambda line: typer.echo(line, err=True),
            progress=progress,
            device=device,
        )


def _outputs(out: Path, made: Sequence[Cell]) -> dict[str, tuple[cells.Outputs, cells.Outputs]]:
    return {cell.asked.name: cells.load_outputs(out / "cells", cell.asked) for cell in made}


def _write(
    out: Path,
    title: str,
    releases: Sequence[Release],
    listing: Listing,
    made: Sequence[Cell],
    found: Sequence[Section],
    workers: int,
) -> None:
    recipe = releases[0].recipe
    facts = {
        "data": f"{listing.layout} layout, {len(listing.refs)} clips, {len(listing.damaged)} damaged",
        "preset": recipe.name,
        "releases": ", ".join(release.outputs_key() for release in releases),
        "seeds": ", ".join(map(str, sorted({cell.asked.seed for cell in made}))),
        "cells": str(len(made)),
        "machine": f"{platform.machine()}, {workers or cores()} processes of one thread, torch {torch.__version__}",
    }
    result: Mapping[str, Any] = {
        "what": title,
        "version": __version__,
        "facts": facts,
        "recipe": json.loads(recipe.to_json()),
        "cells": [asdict(cell) for cell in made],
    }
    write_atomically(out / "result.json", json.dumps(result, indent=1))
    written = report.write(out, title, facts, found)
    typer.echo(report.markdown(title, facts, found))
    typer.echo(f"written: {out / 'result.json'}, {', '.join(map(str, written))}")


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _known(text: str, known: Sequence[str]) -> tuple[str, ...]:
    chosen = tuple(_listed(text))
    wrong = [each for each in chosen if each not in known]
    if wrong or not chosen:
        raise ValueError(f"{', '.join(wrong) or 'nothing'} is none of {', '.join(known)}")
    return chosen
