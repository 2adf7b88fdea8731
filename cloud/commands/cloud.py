"""``isthmus cloud``: serve, and look at devices and jobs."""

import asyncio
import signal
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from isthmus.cloud import logs
from isthmus.cloud.elastic.policies.by_name import DEFAULT_POLICY, POLICIES
from isthmus.cloud.personalise import job_rows
from isthmus.cloud.settings import CloudSettings, split_listen
from isthmus.cloud.store import devices as device_rows
from isthmus.cloud.store.database import Database
from isthmus.proto.errors import IsthmusError

app = typer.Typer(no_args_is_help=True, help="The cloud service: personalise students, answer devices.")

_State = Annotated[
    Path | None,
    typer.Option(
        "--state",
        envvar="ISTHMUS_CLOUD_STATE",
        help="Folder with the signing key, the embedded database and the students.",
    ),
]
_DatabaseUrl = Annotated[
    str | None,
    typer.Option(
        "--database",
        envvar="ISTHMUS_CLOUD_DATABASE",
        help="SQLAlchemy URL, e.g. postgresql://HOST/NAME. Better in the environment where it holds a password. "
        "Default: an SQLite file in --state.",
    ),
]


@app.command()
def serve(
    release: Annotated[Path | None, typer.Option(help="The folder made by 'isthmus distill'.")] = None,
    state: _State = None,
    listen: Annotated[
        str | None,
        typer.Option(help="HOST:PORT, port 0 for a free one [default: 127.0.0.1:0]. Beyond loopback TLS is required."),
    ] = None,
    database: _DatabaseUrl = None,
    artefacts: Annotated[
        str | None, typer.Option(help="fsspec URL for students' files, e.g. s3://BUCKET/PREFIX. Default: in --state.")
    ] = None,
    enrolment_key_file: Annotated[
        Path | None, typer.Option(help="File with the key that a device must show to enrol.")
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="PEM certificate chain.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM private key.")] = None,
    port_file: Annotated[Path | None, typer.Option(help="Write HOST:PORT here when ready.")] = None,
    metrics_port: Annotated[
        int | None, typer.Option(help="Serve Prometheus metrics on this port of loopback; 0 for a free one.")
    ] = None,
    worker_threads: Annotated[int | None, typer.Option(help="Threads of the learning worker.")] = None,
    workers: Annotated[
        int | None, typer.Option(min=0, max=1, help="0: answer devices, but let personalisations wait [default: 1].")
    ] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error [default: info].")] = None,
    elastic_model: Annotated[
        str | None,
        typer.Option(
            help="Serve image tasks on this ViT: a safetensors file with timm's weights, or a name of timm's."
        ),
    ] = None,
    elastic_pixels: Annotated[
        str | None, typer.Option(help="Mean and deviation of its pictures, by name: cifar10, imagenet or half.")
    ] = None,
    elastic_profile: Annotated[Path | None, typer.Option(help="What 'isthmus elastic profile' wrote.")] = None,
    elastic_measure: Annotated[
        bool | None, typer.Option("--elastic-measure", help="Measure this machine first, and keep that as the profile.")
    ] = None,
    elastic_policy: Annotated[
        str | None, typer.Option(help=f"One of {', '.join(POLICIES)}, or fixed:G [default: {DEFAULT_POLICY}].")
    ] = None,
    elastic_device: Annotated[str | None, typer.Option(help="cpu or cuda [default: cpu].")] = None,
    elastic_threads: Annotated[int | None, typer.Option(help="Threads of the model's arithmetic [default: 1].")] = None,
    elastic_number_type: Annotated[
        str | None, typer.Option(help="auto, float32, bfloat16 or int8 [default: auto, as the profile].")
    ] = None,
    elastic_compiler: Annotated[str | None, typer.Option(help="Backend of torch.compile, e.g. inductor.")] = None,
    elastic_memory_bytes: Annotated[
        int | None, typer.Option(help="Split a batch that is predicted to need more memory.")
    ] = None,
    elastic_max_waiting: Annotated[
        int | None, typer.Option(help="Images that may wait; further ones are refused [default: 1024].")
    ] = None,
    elastic_warm: Annotated[
        Path | None, typer.Option(help="Folder of warmed models, as 'isthmus elastic warmup run' wrote it.")
    ] = None,
    elastic_warm_bytes: Annotated[
        int | None, typer.Option(help="Memory for warmed models [default: room for all].")
    ] = None,
    elastic_key_file: Annotated[
        Path | None, typer.Option(help="File with the key that clients of elastic serving must show.")
    ] = None,
) -> None:
    """Serve devices, image tasks or both until interrupted.

    Every option may also stand in the environment as ISTHMUS_CLOUD_<NAME>. A server killed in the middle of a
    personalisation goes on with it when it is started again.
    """
    given = {name: value for name, value in locals().items() if value is not None}
    settings = _settings(given)
    logs.configure(settings.log_level)
    try:
        asyncio.run(_serve(settings))
    except (IsthmusError, OSError) as error:
        _fail(str(error))


async def _serve(settings: CloudSettings) -> None:
    # Imported here: listing devices needs no learning library.
    import torch

    from isthmus.cloud.server import Server
    from isthmus.distill.release import ReleaseError

    # Heads are tiny; threads would only get into each other's way.
    torch.set_num_threads(1)
    stop = asyncio.Event()
    for name in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(name, stop.set)
    server = Server(settings)
    try:
        port = await server.start()
    except ReleaseError as error:
        _fail(str(error))
    print(f"listening on {split_listen(settings.listen)[0]}:{port}", flush=True)
    if server.metrics_port is not None:
        print(f"metrics on http://127.0.0.1:{server.metrics_port}/metrics", file=sys.stderr, flush=True)
    try:
        await stop.wait()
    finally:
        await server.stop()


@app.command()
def devices(
    state: _State = None,
    database: _DatabaseUrl = None,
    revoke: Annotated[str | None, typer.Option(metavar="ID", help="Shut this device out; it must enrol anew.")] = None,
) -> None:
    """List the enrolled devices, or shut one out. The server may be running."""
    opened = _open(state, database)
    try:
        if revoke is not None:
            if not device_rows.revoke(opened, revoke, time.time()):
                _fail(f"no enrolled device {revoke}; 'isthmus cloud devices' lists them")
            print(f"device {revoke} is shut out")
            return
        _print_table(
            ("device", "name", "enrolled", "state"),
            [
                (row.device_id, row.name, _when(row.created_s), "enrolled" if row.revoked_s is None else "revoked")
                for row in device_rows.listing(opened)
            ],
        )
    except IsthmusError as error:
        _fail(str(error))


@app.command()
def jobs(state: _State = None, database: _DatabaseUrl = None) -> None:
    """List the personalisations, oldest first. The server may be running."""
    opened = _open(state, database)
    try:
        _print_table(
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
                for job in job_rows.listing(opened)
            ],
        )
    except IsthmusError as error:
        _fail(str(error))


def _settings(given: dict[str, Any]) -> CloudSettings:
    try:
        return CloudSettings(**given)
    except ValidationError as error:
        lines = []
        for problem in error.errors(include_url=False, include_input=False):
            option = f"--{str(problem['loc'][0]).replace('_', '-')}: " if problem["loc"] else ""
            lines.append(f"{option}{problem['msg'].removeprefix('Value error, ')}")
        typer.echo("isthmus cloud serve: " + "; ".join(lines), err=True)
        raise typer.Exit(2) from None


def _open(state: Path | None, database: str | None) -> Database:
    if database is None:
        if state is None:
            typer.echo("isthmus cloud: say which server with --state DIR or --database URL", err=True)
            raise typer.Exit(2)
        file = state.absolute() / "isthmus.db"
        if not file.is_file():
            _fail(f"{state} holds no database; it is the --state folder of 'isthmus cloud serve'")
        database = f"sqlite:///{file}"
    try:
        return Database(database)
    except IsthmusError as error:
        _fail(str(error))


def _print_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table for a person; tab-separated lines, whole and without headers, for a pipe."""
    console = Console()
    if not console.is_terminal:
        for row in rows:
            print("\t".join(row))
        return
    table = Table()
    for header in headers:
        table.add_column(header, overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)


def _fail(message: str) -> NoReturn:
    typer.echo(f"isthmus cloud: {message}", err=True)
    raise typer.Exit(1)


def _when(unix_s: float) -> str:
    return datetime.fromtimestamp(unix_s, UTC).strftime("%Y-%m-%d %H:%M:%SZ")
