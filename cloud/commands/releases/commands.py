"""``isthmus cloud release``: publish another base release while everything serves, offer it in steps, go back."""

from pathlib import Path
from typing import Annotated

import typer

from isthmus.cloud.commands.stores import ArtefactsOption, DatabaseOption, StateOption, artefacts_of, open_database
from isthmus.cloud.settings import ENVIRONMENT
from isthmus.command_line import App

app = App(
    "isthmus cloud release",
    help="Publish another base release while everything serves, offer it to some devices or all, and go back.",
    extra="cloud",
)

_Id = Annotated[str, typer.Argument(metavar="RELEASE", help="Id of a published release.")]


@app.command(
    example="""
    isthmus cloud release publish --release better --state state
    isthmus cloud release publish --release better --database postgresql://HOST/NAME --artefacts s3://BUCKET/PREFIX \\
        --signing-key-file signing_key
    """,
)
def publish(
    release: Annotated[Path, typer.Option(help="Folder made by 'isthmus distill'.")],
    state: StateOption = None,
    database: DatabaseOption = None,
    artefacts: ArtefactsOption = None,
    signing_key_file: Annotated[
        Path | None,
        typer.Option(
            envvar=f"{ENVIRONMENT}SIGNING_KEY_FILE", help="The servers' --signing-key-file. Default: a file in --state."
        ),
    ] = None,
) -> None:
    """Publish a release. Nobody is offered it yet. Servers and workers may be running.

    Needs a release for the same classes, the same width of features and the same preparation of clips as before, and
    the servers' database, artefacts and signing key. Writes the release's files to the artefacts, from where workers
    fetch them, and its base student and its row to the database. A publication that was interrupted shows nothing, and
    the same command continues it.
    """
    from isthmus.cloud.commands.releases.changing import publish

    if state is None and (artefacts is None or signing_key_file is None):
        raise typer.BadParameter("give --state, or --database, --artefacts and --signing-key-file of the servers")
    key = signing_key_file or (state or Path()) / "signing_key"
    publish(open_database(state, database), artefacts_of(artefacts, state), key, release)


@app.command(
    example="""
    isthmus cloud release offer 0123456789abcdef --device DEVICE --state state
    isthmus cloud release offer 0123456789abcdef --percent 5 --state state
    isthmus cloud release offer 0123456789abcdef --everyone --state state
    """,
)
def offer(
    release: _Id,
    percent: Annotated[
        float | None,
        typer.Option(min=0, max=100, help="Share of the devices. A larger share includes those of a smaller one."),
    ] = None,
    device: Annotated[
        list[str] | None, typer.Option(metavar="ID", help="Offer it to this device besides. May be repeated.")
    ] = None,
    everyone: Annotated[bool, typer.Option("--everyone", help="Offer it to every device.")] = False,
    state: StateOption = None,
    database: DatabaseOption = None,
) -> None:
    """Offer a published release to some devices or to everyone, in place of what it was offered to before.

    Needs --state or --database of the servers. Writes to the database alone; servers see it at their next call. A
    device looks every few hours, personalises anew on the release that it is offered, and judges the result on its own
    clips. Until then it is answered as before. To go back, offer the release before to everyone, or withdraw this one.
    """
    from isthmus.cloud.commands.releases.changing import offer

    offer(open_database(state, database), release, percent=percent, devices=device or (), everyone=everyone)


@app.command(example="isthmus cloud release withdraw 0123456789abcdef --state state")
def withdraw(release: _Id, state: StateOption = None, database: DatabaseOption = None) -> None:
    """Offer a release to nobody any more. Its devices go back to what they are offered now.

    Needs --state or --database of the servers. Writes to the database alone. Personalisations on the release that have
    not ended fail with advice to start again, which devices follow. Students of the release are answered as before.
    """
    from isthmus.cloud.commands.releases.changing import withdraw

    withdraw(open_database(state, database), release)


@app.command(example="isthmus cloud release remove 0123456789abcdef --state state")
def remove(
    release: _Id, state: StateOption = None, database: DatabaseOption = None, artefacts: ArtefactsOption = None
) -> None:
    """Remove a release that is withdrawn, or was never offered, and that no device uses.

    Needs --state, or --database and --artefacts of the servers. Removes its files and its base student, and prints its
    identity.
    """
    from isthmus.cloud.commands.releases.changing import remove

    remove(open_database(state, database), artefacts_of(artefacts, state), release)


@app.command("list", example="isthmus cloud release list --state state")
def listing(state: StateOption = None, database: DatabaseOption = None) -> None:
    """List the releases: to whom each is offered, and how many devices use it. The first goes before the others.

    Needs --state or --database of the servers. A device uses the release of the student that it fetched or asked with
    last. If the output is no terminal, each release is a line with tabs between columns.
    """
    from isthmus.cloud.commands.releases.changing import show

    show(open_database(state, database))
