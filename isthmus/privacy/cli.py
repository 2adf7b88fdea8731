"""``isthmus privacy``: attack an upload, and report what its holder could learn."""

import json
import logging
from pathlib import Path
from typing import Annotated

import typer

from isthmus.command_line import App, Device, Layout, Threads, listed, numbers, whole_numbers

app = App(
    "isthmus privacy",
    help="Attack what a device would send, and report what it reveals of the clips behind it.",
    extra="demo",
    log_level=logging.WARNING,
)


@app.callback()
def group() -> None:
    """Attack what a device would send, and report what it reveals of the clips behind it."""


@app.command(
    resumes=True, example="isthmus privacy report --data clips/CREMA-D --release release --out privacy --seeds 0,1"
)
def report(
    data: Annotated[Path, typer.Option(help="The data set that the release was begun with.")],
    release: Annotated[Path, typer.Option(help="A release with an AllDistill student for each seed.")],
    out: Annotated[
        Path, typer.Option(help="Folder to write to: cells, result.json, result.md, pictures and report.html.")
    ],
    seeds: Annotated[
        str, typer.Option(help="Seeds, with commas. Each selects a student, halves of the clips and all draws.")
    ] = "0",
    clients: Annotated[str, typer.Option(help="Clients, with commas. Default: all of the release's split.")] = "",
    floors: Annotated[
        str, typer.Option(help="Smallest numbers of clips that a prototype averages, with commas.")
    ] = "3,6,9,12",
    epsilons: Annotated[
        str, typer.Option(help="Epsilons of Laplace noise, with commas, beside no noise. Empty: no noise alone.")
    ] = "1,10",
    layout: Layout = "auto",
    device: Device = "auto",
    threads: Threads = 0,
) -> None:
    """Attack every upload mode on every client: bring clips back, and find out who was among them.

    Needs a release with students, and its data set. The attacker has the public clips, the student and the upload.
    Writes --out. A run that was stopped continues, with the same figures as a run that was never stopped.
    """
    from isthmus.data.files import write_atomically
    from isthmus.distill.prepare import read_data, release_split
    from isthmus.distill.release import Release
    from isthmus.distill.training.loop import pick_device, set_threads
    from isthmus.distill.training.progress import bars
    from isthmus.privacy import measure
    from isthmus.privacy import report as reports
    from isthmus.privacy.uploads import all_modes

    each_seed = whole_numbers(seeds, "--seeds")
    if not each_seed:
        raise typer.BadParameter("name at least one seed", param_hint="'--seeds'")
    modes = all_modes(whole_numbers(floors, "--floors"), numbers(epsilons, "--epsilons"))
    names = listed(clients)
    set_threads(threads)
    opened = Release.open(release)
    split = release_split(opened)
    listing = read_data(data, layout)
    with bars() as progress:
        total = len(each_seed) * len(names or split.clients) * (len(modes) + 1)
        task = progress.add_task("attacks", total=total, note="cells")
        result = measure.run(
            opened,
            listing,
            split,
            seeds=each_seed,
            clients=names,
            modes=modes,
            out=out,
            device=pick_device(device),
            report=lambda line: typer.echo(line, err=True),
            advance=lambda cells: progress.advance(task, cells),
        )
    text = reports.markdown(result)
    write_atomically(out / "result.json", json.dumps(result, indent=1))
    write_atomically(out / "result.md", text)
    write_atomically(out / "report.html", reports.render(result, out))
    typer.echo(text)
    typer.echo(f"written: {out / 'report.html'}, result.json, result.md and pictures beside it")


@app.command(resumes=True, example="isthmus privacy frames --data clips/CREMA-D --release release --out frames.json")
def frames(
    data: Annotated[Path, typer.Option(help="The data set that the release was begun with.")],
    release: Annotated[Path, typer.Option(help="A release with an exported base student.")],
    out: Annotated[Path, typer.Option(help="JSON file to write the result to.")],
    clients: Annotated[str, typer.Option(help="Clients, with commas. Default: all of the release's split.")] = "",
    most: Annotated[int, typer.Option(min=20, help="Public clips that the attacker learns from, at most.")] = 400,
    layout: Layout = "auto",
    threads: Threads = 0,
) -> None:
    """Attack the frames that a device sends when it asks the cloud, at every ratio and number type.

    Needs a release whose base student is exported, and its data set. The attacker has the public clips, the student and
    one frame per private clip. Writes --out, and prints for each setting how often a face or a sound that was drawn
    from a frame is nearer to its own clip than to another of the same class.
    """
    from isthmus.data.files import write_atomically
    from isthmus.distill.prepare import decode, read_data, release_split
    from isthmus.distill.release import Release
    from isthmus.distill.training.loop import set_threads
    from isthmus.distill.training.progress import bars
    from isthmus.privacy.frames import measure

    set_threads(threads)
    opened = Release.open(release)
    split, listing = release_split(opened), read_data(data, layout)
    names = listed(clients) or sorted(split.clients)
    unknown = [name for name in names if name not in split.clients]
    if unknown:
        raise typer.BadParameter(f"no client {', '.join(unknown)} in this release's split", param_hint="'--clients'")
    own = {name: decode(listing, split.clients[name], opened.recipe, opened.root / "private") for name in names}
    with bars() as progress:
        total = min(most, len(opened.public)) + sum(map(len, own.values()))
        task = progress.add_task("encode", total=total, note="clips")
        result = measure(opened, own, most=most, report=typer.echo, advance=lambda clips: progress.advance(task, clips))
    write_atomically(out, json.dumps(result, indent=1) + "\n")
    typer.echo(f"written: {out}")
