"""``isthmus cloud``: serve, and list devices and jobs."""

import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from isthmus.cloud.commands.load.options import Load
from isthmus.cloud.commands.releases.commands import app as release_app
from isthmus.cloud.commands.stores import (
    ArtefactsOption,
    DatabaseOption,
    NeededStateOption,
    StateOption,
    artefacts_of,
    connected,
    open_database,
)
from isthmus.cloud.commands.tenants.options import TenantOptions
from isthmus.cloud.settings import ENVIRONMENT, CloudSettings
from isthmus.command_line import App, fail, print_table

app = App("isthmus cloud", help="Run the cloud service: personalise students, answer devices.", extra="cloud")


@app.command(
    environment=ENVIRONMENT,
    example="""
    isthmus cloud serve --release release --state state --listen 127.0.0.1:50051
    isthmus cloud serve --elastic-model vit.safetensors --elastic-pixels cifar10 --elastic-measure --state state
    isthmus cloud serve --release release --generate-model smollm2 --http 127.0.0.1:8000 --state state
    """,
)
def serve(settings: CloudSettings) -> None:
    """Serve devices, image tasks, replies of a language model or all of them until interrupted.

    Needs a folder for --state, and a release, a vision transformer (--elastic-model), a language model
    (--generate-model) or servers that have one (--generate-upstream). Prints "listening on HOST:PORT" once it is ready.
    Writes its database, its signing key and the students to --state. SIGHUP reads --generate-drained again.

    A server that was killed during a personalisation continues it after the next start. Each option can also be set in
    the environment, as ISTHMUS_CLOUD_ and the option's name in capitals.
    """
    from isthmus.cloud.commands.serving import serve

    serve(settings)


@app.command(
    environment=ENVIRONMENT,
    example="""
    isthmus cloud worker --release release --state worker-1 --database postgresql://HOST/NAME \\
        --artefacts s3://BUCKET/PREFIX --signing-key-file signing_key
    """,
)
def worker(settings: CloudSettings) -> None:
    """Run personalisations for the servers of a PostgreSQL database, without answering devices.

    Needs the servers' --database, --artefacts, --release and signing key, and a --state folder of its own for
    unfinished jobs. Writes students to the database and the artefacts. Ends at an interrupt, and hands the job under
    way to another worker. Options that only concern answering are ignored.
    """
    from isthmus.cloud.commands.working import work

    work(settings)


@app.command(
    example="""
    isthmus cloud load --server 127.0.0.1:50051 --task animals --image cat.png --rate 50,100,200 --deadline-ms 200
    isthmus cloud load --server 127.0.0.1:50051 --what frames --in-flight 1,8,64 --connections 8 --echo --out load.json
    """
)
def load(
    load: Load,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the figures to this JSON file.")] = None,
) -> None:
    """Load a running server and measure how it answers.

    Needs a running server, and for queries a registered task. Devices that it enrols stay enrolled. Prints answers per
    second, goodput (answers within --deadline-ms), percentiles of the latency and the errors. Latency counts from the
    time at which a call was due. "lag" is how late this program itself was: if it is not small, the figures are those
    of this program's machine.
    """
    from isthmus.cloud.commands.load.running import load as run

    run(load, out)


@app.command(example="isthmus cloud page --metrics-port 9464", extra="generate")
def page(
    metrics_port: Annotated[
        int, typer.Option(min=1, max=65535, help="The service's --metrics-port, on this machine.")
    ] = 9464,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port on 127.0.0.1. 0: any that is free.")] = 8471,
    release: Annotated[
        Path | None,
        typer.Option(help="A release, whose base student people can try in their browser. Default: none is offered."),
    ] = None,
) -> None:
    """Serve a page about a running service on this machine: load, queue, gammas, outcomes, personalisations.

    Needs 'isthmus cloud serve --metrics-port PORT' on this machine. Prints the page's address, which holds a secret
    token that is new at each start, and serves until it is interrupted. Writes nothing.
    """
    from isthmus.cloud.commands.paging import page

    page(metrics_port, port, release)


@app.command(
    example="""
    isthmus cloud devices --state state
    isthmus cloud devices --state state --revoke DEVICE
    isthmus cloud devices --state state --revoke-since 2026-11-29T20:00
    isthmus cloud devices --state state --delete DEVICE
    """,
)
def devices(
    state: StateOption = None,
    database: DatabaseOption = None,
    artefacts: ArtefactsOption = None,
    revoke: Annotated[
        list[str] | None,
        typer.Option(metavar="ID", help="Shut this device out. It must enrol again to come back. May be repeated."),
    ] = None,
    revoke_since: Annotated[
        datetime | None, typer.Option(help="Shut out all devices that enrolled at this time (UTC) or later.")
    ] = None,
    delete: Annotated[
        str | None,
        typer.Option(metavar="ID", help="Erase this device: its prototypes, jobs and students. It cannot be undone."),
    ] = None,
) -> None:
    """List the enrolled devices, shut some out, or erase one. The server may be running.

    Needs --state or --database of the server. If the output is no terminal, each device is a line with tabs between
    columns.
    """
    from isthmus.cloud.store import devices as device_rows

    opened = open_database(state, database)
    if delete is not None:
        from isthmus.cloud.personalise.forgetting import forget_device
        from isthmus.cloud.personalise.students import Shelf

        if state is None:
            raise typer.BadParameter("--delete needs the server's --state, where files of its jobs are")
        if not forget_device(Shelf(opened, artefacts_of(artefacts, state)), state / "work", delete):
            fail(f"no device {delete}; 'isthmus cloud devices' lists them")
        typer.echo(f"device {delete} is erased")
        return
    if revoke_since is not None:
        since = revoke_since.replace(tzinfo=UTC)
        typer.echo(f"{device_rows.revoke_enrolled_since(opened, since.timestamp(), time.time())} devices are shut out")
        return
    for device_id in revoke or ():
        if not device_rows.revoke(opened, device_id, time.time()):
            fail(f"no enrolled device {device_id}; 'isthmus cloud devices' lists them")
        typer.echo(f"device {device_id} is shut out")
    if revoke:
        return
    print_table(
        ("device", "name", "tenant", "enrolled", "seen", "state"),
        [
            (
                row.device_id,
                row.name,
                row.tenant,
                _when(row.created_s),
                "never" if row.seen_s is None else _when(row.seen_s),
                "enrolled" if row.revoked_s is None else "revoked",
            )
            for row in device_rows.listing(opened)
        ],
        tabs_in_pipes=True,
    )


@app.command(
    example="""
    isthmus cloud tenants --state state --add acme --devices 500 --jobs-per-day 100 --queries-per-s 50
    isthmus cloud tenants --state state --new-key acme --purpose enrol --key-file acme.key
    isthmus cloud tenants --state state --close acme
    """,
)
def tenants(quotas: TenantOptions, state: StateOption = None, database: DatabaseOption = None) -> None:
    """List the tenants, add or change one, make or remove its keys, or close it. The server may be running.

    Needs --state or --database of the server. Devices that enrol with a tenant's key belong to it, and so do image
    tasks that are registered with its key. Servers learn of a change within 2 seconds. A quota that is not given stays
    as it is; "none" removes it, and 0 allows nothing.
    """
    from isthmus.cloud.commands.tenants.changing import change_tenants

    change_tenants(open_database(state, database), quotas)


@app.command(example="isthmus cloud audit --state state --tenant acme --since 2026-11-29")
def audit(
    state: StateOption = None,
    database: DatabaseOption = None,
    tenant: Annotated[str | None, typer.Option(help="Only entries of this tenant.")] = None,
    since: Annotated[datetime | None, typer.Option(help="Only entries of this time (UTC) or later.")] = None,
    most: Annotated[int, typer.Option(min=1, max=100_000, help="Number of entries, the newest.")] = 1_000,
) -> None:
    """Show what was enrolled, published, registered, removed, revoked and refused, oldest first.

    Needs --state or --database of the server. Prints a table of entries. If the output is no terminal, each entry is a
    line with tabs between columns.
    """
    from isthmus.cloud.store import audit as audit_rows

    since_s = 0.0 if since is None else since.replace(tzinfo=UTC).timestamp()
    entries = audit_rows.listing(open_database(state, database), tenant=tenant, since_s=since_s, most=most)
    print_table(
        ("time", "tenant", "by", "what", "of", "detail"),
        [(_when(each.at_s), each.tenant, each.actor, each.action, each.subject, each.detail) for each in entries],
        tabs_in_pipes=True,
    )


@app.command(example="isthmus cloud migrate --database postgresql://HOST/NAME")
def migrate(state: StateOption = None, database: DatabaseOption = None) -> None:
    """Upgrade the tables of a database to this version, or make them. Servers of the version before may be running.

    Needs --state or --database of the server. 'isthmus cloud serve' does the same at its start; this command is for
    those who do it once, before they replace many servers. Writes to the database alone.
    """
    opened = connected(state, database)
    opened.connect()
    opened.migrate()
    typer.echo(f"{opened.shown} is of this version")


@app.command(example="isthmus cloud jobs --state state")
def jobs(state: StateOption = None, database: DatabaseOption = None) -> None:
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
            for job in job_rows.listing(open_database(state, database))
        ],
        tabs_in_pipes=True,
    )


@app.command(
    "rotate-key",
    example="""
    isthmus cloud rotate-key --state state
    isthmus cloud rotate-key --state state --signing-key-file signing_key --database postgresql://HOST/NAME
    """,
)
def rotate_key(
    state: NeededStateOption,
    signing_key_file: Annotated[
        Path | None,
        typer.Option(envvar=f"{ENVIRONMENT}SIGNING_KEY_FILE", help="The server's --signing-key-file."),
    ] = None,
    database: DatabaseOption = None,
) -> None:
    """Replace the key that signs students. Devices go on without enrolling again.

    Needs --state of a server that is stopped, and its --database and --signing-key-file if it was given these. Writes
    the new key in place of the old one, and to the database a statement that the old key has signed. Devices of version
    0.1 do not know such statements: they must enrol again. If several servers use the database, stop all of them and
    copy the new key to each. Take a backup afterwards.
    """
    from isthmus.cloud import continuity
    from isthmus.cloud.store import lock

    opened = open_database(state, database)
    holds = lock.acquire_folder(state, "server"), lock.acquire(opened, "server")
    try:
        path = signing_key_file or state / "signing_key"
        signer = continuity.rotate_key(opened, path, time.time())
    finally:
        for held in holds:
            held.release()
    typer.echo(f"{path} is a new key; its public half is {signer.public_key.hex()}")


@app.command(example="isthmus cloud backup --state state --to isthmus.tar")
def backup(
    state: NeededStateOption,
    to: Annotated[Path, typer.Option(metavar="FILE", help="File to write. It must not exist.")],
    database: DatabaseOption = None,
    artefacts: ArtefactsOption = None,
) -> None:
    """Write a backup of a server to one file. The server may be running.

    Needs --state of the server, and its --database and --artefacts if it was given these. The file holds the database,
    the students, the signing key and unfinished jobs. A person who can read it can pass for this server: keep it safe.
    """
    from isthmus.cloud.backup import backup as write

    size = write(open_database(state, database), artefacts_of(artefacts, state), state, to)
    typer.echo(f"{to}: {size / 1e6:.1f} MB")


@app.command(example="isthmus cloud restore --state state --from isthmus.tar")
def restore(
    state: NeededStateOption,
    source: Annotated[Path, typer.Option("--from", metavar="FILE", help="File that 'isthmus cloud backup' wrote.")],
    database: DatabaseOption = None,
    artefacts: ArtefactsOption = None,
) -> None:
    """Make a server's folder and database from a backup.

    Needs a --state that does not exist or is empty and, with --database, an empty database. Writes the server's files
    to --state and its rows to the database; nothing is overwritten. Afterwards start the server with
    'isthmus cloud serve' and the same options.
    """
    from isthmus.cloud.backup import restore as read

    read(source, database or f"sqlite:///{state.absolute() / 'isthmus.db'}", artefacts, state)
    typer.echo(f"{state} is restored")


def _when(unix_s: float) -> str:
    return datetime.fromtimestamp(unix_s, UTC).strftime("%Y-%m-%d %H:%M:%SZ")


app.add(release_app)
