"""The options that name a cloud's stores, and opening them for a command beside a running server."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from isthmus.cloud.settings import ENVIRONMENT
from isthmus.command_line import fail

if TYPE_CHECKING:
    from isthmus.cloud.store.artefacts import Artefacts
    from isthmus.cloud.store.database import Database

StateOption = Annotated[
    Path | None, typer.Option(envvar=f"{ENVIRONMENT}STATE", help="Folder of the server: its --state.")
]
NeededStateOption = Annotated[Path, typer.Option("--state", envvar=f"{ENVIRONMENT}STATE", help="Folder of the server.")]
ArtefactsOption = Annotated[
    str | None,
    typer.Option(envvar=f"{ENVIRONMENT}ARTEFACTS", help="The server's --artefacts. Default: a folder in --state."),
]
DatabaseOption = Annotated[
    str | None,
    typer.Option(envvar=f"{ENVIRONMENT}DATABASE", help="The server's --database. Default: an SQLite file in --state."),
]


def artefacts_of(url: str | None, state: Path | None) -> "Artefacts":
    """Open the artefacts of a server. Raises InvalidInput, and BadParameter if neither is given."""
    from isthmus.cloud.store.artefacts import Artefacts

    if url is None and state is None:
        raise typer.BadParameter("give --state DIR or --artefacts URL of the server")
    return Artefacts(url if url is not None else str((state or Path()).absolute() / "artefacts"))


def open_database(state: Path | None, database: str | None) -> "Database":
    """Open the database of a server. Raises IsthmusError, also if this version cannot read its schema."""
    opened = connected(state, database)
    opened.check_schema()
    return opened


def connected(state: Path | None, database: str | None) -> "Database":
    """Open the database of a server, whichever version made it."""
    from isthmus.cloud.store.database import Database

    if database is None:
        if state is None:
            raise typer.BadParameter("give --state DIR or --database URL of the server")
        file = state.absolute() / "isthmus.db"
        if not file.is_file():
            fail(f"{state} holds no database; give the --state folder of 'isthmus cloud serve'")
        database = f"sqlite:///{file}"
    return Database(database)
