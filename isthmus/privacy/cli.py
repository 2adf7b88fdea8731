"""``isthmus privacy``: what someone who holds an upload could learn, attacked, measured and told."""

import json
import logging
from pathlib import Path
from typing import Annotated

import torch
import typer

from isthmus.data.cache.build import CacheFull
from isthmus.data.files import write_atomically
from isthmus.distill.prepare import read_data, release_split
from isthmus.distill.release import Release, ReleaseError
from isthmus.distill.training.checkpoint import CheckpointError
from isthmus.distill.training.loop import TrainingDiverged, pick_device
from isthmus.distill.training.progress import bars
from isthmus.privacy import measure
from isthmus.privacy import report as reports
from isthmus.privacy.uploads import all_modes

app = typer.Typer(
    no_args_is_help=True,
    help="What someone who holds an upload could learn of the clips behind it, by attacking it.",
)


@app.callback()
def group() -> None:
    """What someone who holds an upload could learn."""


@app.command()
def report(
    data: Annotated[Path, typer.Option(help="The data set that the release was begun with.")],
    release: Annotated[Path, typer.Option(help="A release with an AllDistill student for each seed.")],
    out: Annotated[Path, typer.Option(help="Folder of cells, result.json, result.md, pictures and report.html.")],
    seeds: Annotated[str, typer.Option(help="Comma-separated: students, halves of the clips, and all draws.")] = "0",
    clients: Annotated[str, typer.Option(help="Comma-separated; empty: all of the release's split.")] = "",
    floors: Annotated[str, typer.Option(help="Comma-separated smallest numbers of clips behind a row.")] = "3,6,9,12",
    epsilons: Annotated[
        str, typer.Option(help="Comma-separated epsilons of Laplace noise, beside none; empty: none alone.")
    ] = "1,10",
    layout: Annotated[str, typer.Option(help="'auto', 'crema-d' or 'ave'.")] = "auto",
    device: Annotated[str, typer.Option(help="'auto' takes a GPU where there is one.")] = "auto",
    threads: Annotated[int, typer.Option(help="CPU threads of torch; 0 leaves torch's own choice.")] = 0,
) -> None:
    """Attack every upload mode on every client: bring clips back, and tell who was among them.

    The attacker has the public clips, the student and the upload. Can be stopped and run again: finished cells are
    kept, and the figures are those of a run that was never stopped.
    """
    logging.basicConfig(level=logging.WARNING)
    if threads:
        torch.set_num_threads(threads)
    try:
        opened = Release.open(release)
        split = release_split(opened)
        modes = all_modes([int(floor) for floor in _listed(floors)], [float(each) for each in _listed(epsilons)])
        numbers = [int(seed) for seed in _listed(seeds)]
        if not numbers:
            raise ValueError("name at least one seed")
        names = _listed(clients)
        listing = read_data(data, layout)
        with bars() as progress:
            total = len(numbers) * len(names or split.clients) * (len(modes) + 1)
            task = progress.add_task("attacks", total=total, note="cells")
            result = measure.run(
                opened,
                listing,
                split,
                seeds=numbers,
                clients=names,
                modes=modes,
                out=out,
                device=pick_device(device),
                told=lambda line: typer.echo(line, err=True),
                advance=lambda cells: progress.advance(task, cells),
            )
        text = reports.markdown(result)
        write_atomically(out / "result.json", json.dumps(result, indent=1))
        write_atomically(out / "result.md", text)
        write_atomically(out / "report.html", reports.render(result, out))
    except (ReleaseError, CheckpointError, TrainingDiverged, CacheFull, ValueError, OSError) as error:
        typer.echo(f"isthmus privacy: {error}", err=True)
        raise typer.Exit(1) from error
    typer.echo(text)
    typer.echo(f"written: {out / 'report.html'}, result.json, result.md and pictures beside it")


def _listed(text: str) -> list[str]:
    return [each.strip() for each in text.split(",") if each.strip()]
