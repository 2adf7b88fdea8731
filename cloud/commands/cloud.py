"""``isthmus cloud``: serve, and list devices and jobs."""

import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from isthmus.cloud.settings import ENVIRONMENT, CloudSettings
from isthmus.command_line import App, fail, print_table

if TYPE_CHECKING:
    from isthmus.cloud.store.database import Database

app = App("isthmus cloud", help="Run the cloud service: personalise students, answer devices.", extra="cloud")

_State = Annotated[Path | None, typer.Option(envvar=f"{ENVIRONMENT}STATE", help="Folder of the server: its --state.")]
_Database = Annotated[
    str | None,
    typer.Option(envvar=f"{ENVIRONMENT}DATABASE", help="The server's --database. Default: an SQLite file in --state."),
]


@app.command(
    environment=ENVIRONMENT,
    example="""
    isthmus cloud serve --release release --state state --listen 127.0.0.1:50051
    isthmus cloud serve --elastic-model vit.safetensors --elastic-pixels cifar10 --elastic-measure --state state
    """,
)
def serve(settings: CloudSettings) -> None:
    """Serve devices, image tasks or both until interrupted.

    Needs a folder for --state, and a release, a vision transformer (--elastic-model) or both. Prints "listening on
    HOST:PORT" once it is ready. Writes its database, its signing key and the students to --state.

    A server that was killed during a personalisation continues it after the next start. Each option can also be set in
    the environment, as ISTHMUS_CLOUD_ and the option's name in capitals.
    """
    from isthmus.cloud.commands.serving import serve

    serve(settings)


@app.command(
    example="""
    isthmus cloud devices --state state
    isthmus cloud devices --state state --revoke DEVICE
    """,
)
def devices(
    state: _State = None,
    database: _Database = None,
    revoke: Annotated[
        str | None, typer.Option(metavar="ID", help="Shut this device out. It must enrol again to come back.")
    ] = None,
) -> None:
    """List the enrolled devices, or shut one out. The server may be running.

    Needs --state or --database of the server. If the output is no terminal, each device is a line with tabs between
    columns.
    """
    from isthmus.cloud.store import devices as device_rows

    opened = _open(state, database)
    if revoke is not None:
        if not device_rows.revoke(opened, revoke, time.time()):
            fail(f"no enrolled device {revoke}; 'isthmus cloud devices' lists them")
        typer.echo(f"device {revoke} is shut out")
        return
    print_table(
        ("device", "name", "enrolled", "state"),
        [
            (row.device_id, row.name, _when(row.created_s), "enrolled" if row.revoked_s is None else "revoked")
            for row in device_rows.listing(opened)
        ],
        tabs_in_pipes=True,
    )


@app.command(example="isthmus cloud jobs --state state")
def jobs(state: _State = None, database: _Database = None) -> None:
    """List the personalisations, oldest first. The server may be running.

    Needs --state or --database of the server. If the output is no terminal, each job is a line with tabs between
    columns.
    """
    from isthmus.cloud.personalise import job_rows

    print_table(
        ("job", "device", "stage", "round", "progress", "seconds", "started", "error"),
        [
            (
                job.job_id,
                job.device_id,
                job.stage.value,
                f"{job.round + 1}/{job.rounds}{' settled' if job.settled else ''}",
                f"{job.progress:.0%}",
                f"{sum(job.stage_seconds.values()):.1f}",
                _when(job.created_s),
                job.error,
            )
            for job in job_rows.listing(_open(state, database))
        ],
        tabs_in_pipes=True,
    )


def _open(state: Path | None, database: str | None) -> "Database":
    """Open the database of a server. Raises IsthmusError, also if this version cannot read its schema."""
    from isthmus.cloud.store.database import Database

    if database is None:
        if state is None:
            raise typer.BadParameter("give --state DIR or --database URL of the server")
        file = state.absolute() / "isthmus.db"
        if not file.is_file():
            fail(f"{state} holds no database; give the --state folder of 'isthmus cloud serve'")
        database = f"sqlite:///{file}"
    opened = Database(database)
    opened.check_schema()
    return opened


def _when(unix_s: float) -> str:
    return datetime.fromtimestamp(unix_s, UTC).strftime("%Y-%m-%d %H:%M:%SZ")
