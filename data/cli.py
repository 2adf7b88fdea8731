"""``isthmus data``: check a data set, measure its people, make a synthetic one, write a split."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal

import typer

from isthmus.command_line import App, Layout, fail, print_table

if TYPE_CHECKING:
    from isthmus.data.check import CheckReport

app = App("isthmus data", help="Check, split and generate data sets in the layouts of CREMA-D and AVE.", extra="train")
make = App(
    "isthmus data make",
    help="Make a synthetic data set: real media files with invented content. Nobody is recorded.",
    extra="train",
)
app.add(make)

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The data set's folder.")]
NewFolder = Annotated[
    Path, typer.Argument(metavar="DIR", help="A new or empty folder. An interrupted set is continued.")
]
Takes = Annotated[int, typer.Option(help="Clips per actor and emotion, or events per category.")]
Seed = Annotated[int, typer.Option(help="Seed. The same seed gives the same files.")]
Difficulty = Annotated[float, typer.Option(help="From 0 (clear cues, hardly any noise) to 1 (faint cues, much noise).")]

SHOWN_DAMAGE: Final = 20


@app.command(example="isthmus data check clips/CREMA-D --strict")
def check(
    folder: Folder,
    layout: Layout = "auto",
    decoding: Annotated[
        bool, typer.Option("--decode/--no-decode", help="Decode every clip, or look at names and lists alone.")
    ] = True,
    strict: Annotated[bool, typer.Option("--strict", help="End with exit code 1 if any file is damaged.")] = False,
) -> None:
    """Count clips, classes and actors, and name every damaged file with the reason.

    Needs a folder in the layout of CREMA-D or AVE. Writes nothing. Training skips damaged clips too, so they end the
    command with an error only with --strict.
    """
    from isthmus.data.check import check_clips
    from isthmus.data.layouts.listing import read_listing
    from isthmus.data.progress import progress_bar

    listing = read_listing(folder, layout)
    with progress_bar() as bar:
        task = bar.add_task("decoding clips" if decoding else "looking at clips", total=len(listing.refs))
        report = check_clips(listing, decoding=decoding, on_clip=lambda: bar.advance(task))
    _show(report, decoding=decoding)
    if not report.usable:
        fail(f"{folder} has no usable clip")
    if strict and report.damaged:
        raise typer.Exit(1)


def _show(report: "CheckReport", *, decoding: bool) -> None:
    listing = report.listing
    verb = "decode" if decoding else "are listed (not decoded)"
    typer.echo(f"Layout {listing.layout}: {len(report.usable)} clips {verb}, {len(report.damaged)} damaged.")
    of_class = Counter(ref.label for ref in report.usable)
    print_table(
        ("class", "label", "clips"),
        [(name, str(label), str(of_class[label])) for label, name in enumerate(listing.classes)],
    )
    actors = Counter(ref.actor for ref in report.usable if ref.actor is not None)
    if actors:
        typer.echo(f"{len(actors)} actors: " + ", ".join(f"{name} ({count})" for name, count in sorted(actors.items())))
    lacking = [f"{ref.name} ({'picture' if ref.audio_path is None else 'sound'} alone)" for ref in listing.incomplete]
    if lacking:
        shown = ", ".join(lacking[:SHOWN_DAMAGE]) + (" ..." if len(lacking) > SHOWN_DAMAGE else "")
        _say(f"{len(lacking)} clips lack one of their files (devices answer them, training leaves them out): {shown}")
    for damage in report.damaged[:SHOWN_DAMAGE]:
        _say(f"damaged: {damage.name}: {damage.reason}")
    if len(report.damaged) > SHOWN_DAMAGE:
        typer.echo(f"... and {len(report.damaged) - SHOWN_DAMAGE} more damaged")
    for each in listing.left_out[:SHOWN_DAMAGE]:
        _say(f"left out: {each.name}: {each.reason}")
    if len(listing.left_out) > SHOWN_DAMAGE:
        typer.echo(f"... and {len(listing.left_out) - SHOWN_DAMAGE} more left out")


def _say(line: str) -> None:
    """Print a line with names from outside: what a terminal would obey is written out."""
    typer.echo("".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in line))


@app.command(example="isthmus data spread clips/RavFace --output spread.json")
def spread(
    folder: Folder,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON file to write the figures to.")] = None,
    layout: Layout = "auto",
) -> None:
    """Measure how far people lie apart: the variance between persons, relative to that within person and class.

    Needs a data set of at least 4 persons who show every class. Prints a row for sound and one for the picture. The
    features are means and deviations of the spectrogram's bands over time, and histograms of gradients of the frames;
    only the directions that tell classes apart count.
    """
    import json
    from dataclasses import asdict

    from isthmus.data.layouts.listing import read_listing
    from isthmus.data.progress import progress_bar
    from isthmus.data.spread import spread_of

    listing = read_listing(folder, layout)
    with progress_bar() as bar:
        task = bar.add_task("decoding clips", total=len(listing.refs))
        found = spread_of(listing, on_clip=lambda: bar.advance(task))
    if output is not None:
        output.write_text(json.dumps({name: asdict(each) for name, each in found.items()}, indent=1) + "\n")
    print_table(
        ("modality", "between persons", "persons by class", "classes", "persons", "clips"),
        [
            (
                name,
                *(f"{value:.2f}" for value in (each.between, each.habits, each.classes)),
                f"{each.persons}",
                f"{each.clips}",
            )
            for name, each in found.items()
        ],
    )


@make.command("crema-d", resumes=True, example="isthmus data make crema-d clips --actors 4 --takes 2")
def make_crema_d_command(
    folder: NewFolder,
    actors: Annotated[int, typer.Option(help="Number of invented people. Their names are 1001, 1002 and so on.")] = 8,
    takes: Takes = 6,
    seed: Seed = 0,
    difficulty: Difficulty = 0.3,
    people: Annotated[
        Literal["plain", "measured"],
        typer.Option(help="How far people lie apart. 'measured': as far as in RavFace, at a difficulty of 0.5."),
    ] = "plain",
) -> None:
    """Make clips in CREMA-D's layout: six emotions, each with voice-like sound and a drawn face.

    Needs nothing but a folder. Writes AudioWAV/ and VideoFlash/ with one WAV and one FLV file per clip.
    """
    from isthmus.data.layouts.crema_d import CLASSES
    from isthmus.data.synthetic.sets import MEASURED, People, make_crema_d

    apart = MEASURED if people == "measured" else People()
    make_crema_d(folder, actors=actors, takes=takes, seed=seed, difficulty=difficulty, people=apart)
    typer.echo(f"{actors * takes * len(CLASSES)} synthetic clips in {folder}")


@make.command("ave", resumes=True, example="isthmus data make ave videos --classes 4 --takes 3")
def make_ave_command(
    folder: NewFolder,
    classes: Annotated[int, typer.Option(help="Number of categories: the first ones of AVE's 28.")] = 28,
    takes: Takes = 10,
    seed: Seed = 0,
    difficulty: Difficulty = 0.3,
) -> None:
    """Make videos in AVE's layout: ten seconds each, with one annotated event.

    Needs nothing but a folder. Writes AVE/ with one MP4 file per video, and the lists trainSet.txt, valSet.txt and
    testSet.txt.
    """
    from isthmus.data.synthetic.sets import make_ave

    make_ave(folder, classes=classes, takes=takes, seed=seed, difficulty=difficulty)
    typer.echo(f"{classes * takes} synthetic videos in {folder}")


@app.command(example="isthmus data split clips/CREMA-D --actor 1001 --actor 1002 --output split.json")
def split(
    folder: Folder,
    output: Annotated[Path, typer.Option("--output", "-o", help="JSON file to write the split to.")],
    layout: Layout = "auto",
    actor: Annotated[
        list[str] | None, typer.Option(help="A private actor, who becomes one client. Repeat it for more clients.")
    ] = None,
    published: Annotated[
        Path | None, typer.Option(help="Published list of private clips: a CSV file, or AVE's testSet.txt.")
    ] = None,
    seed: Seed = 0,
) -> None:
    """Decide which clips are public and which are private, and write the split.

    Needs a data set. With --actor, every named person is a client. With --published, the clips of the list are private.
    With neither, AVE's own testSet.txt is used, and for CREMA-D a tenth of every class is drawn with --seed.
    """
    from isthmus.data import splits
    from isthmus.data.layouts import ave
    from isthmus.data.layouts.listing import read_listing

    if actor and published:
        raise typer.BadParameter("it excludes --published: give one of them", param_hint="'--actor'")
    listing = read_listing(folder, layout)
    if actor:
        made = splits.by_actor(listing, actor)
    elif published is not None or listing.layout == ave.LAYOUT:
        made = splits.published(listing, published or folder / ave.PRIVATE_LIST)
    else:
        made = splits.by_class(listing, seed=seed)
    output.write_text(made.to_json() + "\n")
    clients = ", ".join(f"{client} {len(names)}" for client, names in made.clients.items())
    typer.echo(f"{made.name}: {len(made.public)} public clips; {clients}. Written to {output}")
