"""``isthmus data``: check a data set, make a synthetic one, write a split down."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from isthmus.data import splits
from isthmus.data.clip import ClipError, ClipRef, Damage, Listing
from isthmus.data.layouts import ave, crema_d
from isthmus.data.layouts.listing import AUTO, read_listing
from isthmus.data.media.decode import check_decodes
from isthmus.data.progress import progress_bar
from isthmus.data.synthetic.sets import make_ave, make_crema_d
from isthmus.data.transforms import InputSpec

app = typer.Typer(
    help="Check, split and generate data sets in CREMA-D's and AVE's layouts.",
    no_args_is_help=True,
    add_completion=False,
)
make = typer.Typer(
    help="Make a synthetic data set: real files, invented content. Nobody is recorded.", no_args_is_help=True
)
app.add_typer(make, name="make")

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The data set's folder.")]
NewFolder = Annotated[Path, typer.Argument(metavar="DIR", help="A new or empty folder; an interrupted set goes on.")]
Layout = Annotated[str, typer.Option(help="crema-d, ave, or auto to look at the folder.")]
Takes = Annotated[int, typer.Option(help="Clips of each actor and emotion (or events of each category).")]
Seed = Annotated[int, typer.Option(help="The same seed gives the same files.")]
Difficulty = Annotated[float, typer.Option(help="0: clear cues, hardly any noise. 1: faint cues, much noise.")]

SHOWN_DAMAGE: Final = 20
_SHORT_SPEC: Final = InputSpec(stored_px=32, frame_px=32)
"""Enough to see that a clip decodes."""


@dataclass(frozen=True)
class CheckReport:
    """What ``check`` found. ``usable`` are the clips that passed; with no decoding, those whose files exist."""

    listing: Listing
    usable: tuple[ClipRef, ...]
    damaged: tuple[Damage, ...]


def check_clips(listing: Listing, *, decoding: bool, on_clip: Callable[[], None]) -> CheckReport:
    """Tries every clip; ``on_clip`` is called after each. Damaged clips are collected, never raised."""
    usable: list[ClipRef] = []
    damaged = list(listing.damaged)
    for ref in listing.refs:
        try:
            if decoding:
                check_decodes(ref, _SHORT_SPEC)
            usable.append(ref)
        except ClipError as error:
            damaged.append(Damage(error.name, error.reason))
        on_clip()
    return CheckReport(listing, tuple(usable), tuple(damaged))


@app.command()
def check(
    folder: Folder,
    layout: Layout = AUTO,
    decoding: Annotated[
        bool, typer.Option("--decode/--no-decode", help="Decode every clip, or only look at names and lists.")
    ] = True,
    strict: Annotated[bool, typer.Option("--strict", help="End with exit code 1 when anything is damaged.")] = False,
) -> None:
    """Count clips, classes and actors, and name every damaged file with the reason.

    Damaged clips are skipped by training too, so they end the command with an error only under --strict.
    """
    listing = _listing(folder, layout)
    with progress_bar() as bar:
        task = bar.add_task("decoding clips" if decoding else "looking at clips", total=len(listing.refs))
        report = check_clips(listing, decoding=decoding, on_clip=lambda: bar.advance(task))
    _show(report, decoding=decoding)
    if not report.usable:
        _fail(f"{folder} has no usable clip")
    if strict and report.damaged:
        raise typer.Exit(1)


def _show(report: CheckReport, *, decoding: bool) -> None:
    console = Console(highlight=False)
    listing = report.listing
    verb = "decode" if decoding else "are listed (not decoded)"
    console.print(f"Layout {listing.layout}: {len(report.usable)} clips {verb}, {len(report.damaged)} damaged.")
    of_class = Counter(ref.label for ref in report.usable)
    table = Table("class", "label", "clips")
    for label, name in enumerate(listing.classes):
        table.add_row(name, str(label), str(of_class[label]))
    console.print(table)
    actors = Counter(ref.actor for ref in report.usable if ref.actor is not None)
    if actors:
        console.print(
            f"{len(actors)} actors: " + ", ".join(f"{name} ({count})" for name, count in sorted(actors.items()))
        )
    lacking = [f"{ref.name} ({'picture' if ref.audio_path is None else 'sound'} alone)" for ref in listing.incomplete]
    if lacking:
        shown = ", ".join(lacking[:SHOWN_DAMAGE]) + (" ..." if len(lacking) > SHOWN_DAMAGE else "")
        console.print(
            f"{len(lacking)} clips lack one of their files (devices answer them, training leaves them out): {shown}",
            markup=False,
            soft_wrap=True,
        )
    for damage in report.damaged[:SHOWN_DAMAGE]:
        console.print(f"damaged: {damage.name}: {damage.reason}", markup=False, soft_wrap=True)
    if len(report.damaged) > SHOWN_DAMAGE:
        console.print(f"... and {len(report.damaged) - SHOWN_DAMAGE} more damaged")


@make.command("crema-d")
def make_crema_d_command(
    folder: NewFolder,
    actors: Annotated[int, typer.Option(help="Invented people: 1001, 1002, ...")] = 8,
    takes: Takes = 6,
    seed: Seed = 0,
    difficulty: Difficulty = 0.3,
) -> None:
    """Voice-like sound and drawn faces in CREMA-D's layout (AudioWAV/, VideoFlash/), six emotions."""
    try:
        make_crema_d(folder, actors=actors, takes=takes, seed=seed, difficulty=difficulty)
    except (ValueError, OSError) as error:
        _fail(str(error))
    typer.echo(f"{actors * takes * len(crema_d.CLASSES)} synthetic clips in {folder}")


@make.command("ave")
def make_ave_command(
    folder: NewFolder,
    classes: Annotated[int, typer.Option(help="The first so many of AVE's 28 categories.")] = 28,
    takes: Takes = 10,
    seed: Seed = 0,
    difficulty: Difficulty = 0.3,
) -> None:
    """Ten-second videos with annotated events in AVE's layout (AVE/, trainSet.txt, valSet.txt, testSet.txt)."""
    try:
        make_ave(folder, classes=classes, takes=takes, seed=seed, difficulty=difficulty)
    except (ValueError, OSError) as error:
        _fail(str(error))
    typer.echo(f"{classes * takes} synthetic videos in {folder}")


@app.command()
def split(
    folder: Folder,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the split goes, as JSON.")],
    layout: Layout = AUTO,
    actor: Annotated[list[str] | None, typer.Option(help="by-actor: a private actor, one client each; repeat.")] = None,
    published: Annotated[
        Path | None, typer.Option(help="published: the list of private clips (a CSV, or AVE's testSet.txt).")
    ] = None,
    seed: Seed = 0,
) -> None:
    """Say who is public and who is private, and write it down.

    With --actor every named person is a client. With --published the private clips are those of the list. With
    neither, AVE's own testSet.txt is taken, and for CREMA-D a tenth of every class is drawn with --seed.
    """
    if actor and published:
        _fail("--actor and --published exclude each other: give one", code=2)
    listing = _listing(folder, layout)
    try:
        if actor:
            made = splits.by_actor(listing, actor)
        elif published is not None or listing.layout == ave.LAYOUT:
            made = splits.published(listing, published or folder / ave.PRIVATE_LIST)
        else:
            made = splits.by_class(listing, seed=seed)
        output.write_text(made.to_json() + "\n")
    except (ValueError, OSError) as error:
        _fail(str(error))
    clients = ", ".join(f"{client} {len(names)}" for client, names in made.clients.items())
    typer.echo(f"{made.name}: {len(made.public)} public clips; {clients}. Written to {output}")


def _listing(folder: Path, layout: str) -> Listing:
    try:
        return read_listing(folder, layout)
    except (ValueError, OSError) as error:
        _fail(str(error))


def _fail(message: str, code: int = 1) -> NoReturn:
    typer.echo(f"isthmus data: {message}", err=True)
    raise typer.Exit(code)
