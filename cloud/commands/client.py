"""``isthmus elastic register``, ``tasks``, ``remove`` and ``query``: a running server, from the command line."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from isthmus.cloud.elastic.tasks.task import TaskSpec
from isthmus.cloud.rpc.elastic_client import ElasticClient
from isthmus.proto.errors import IsthmusError

_Server = Annotated[str, typer.Option(help="HOST:PORT of 'isthmus cloud serve --elastic-model ...'.")]
_KeyFile = Annotated[Path | None, typer.Option(help="File with the server's key for elastic serving.")]
_TlsCert = Annotated[Path | None, typer.Option(help="PEM certificate to trust; without one the connection is plain.")]


def add_commands(app: typer.Typer) -> None:
    """Adds the commands of this file to the ``isthmus elastic`` command."""
    for command in (register, tasks, remove, query):
        app.command()(command)


def register(
    task: Annotated[Path, typer.Argument(help="NAME.json beside NAME.safetensors, from 'isthmus elastic prompts'.")],
    server: _Server,
    key_file: _KeyFile = None,
    tls_cert: _TlsCert = None,
) -> None:
    """Register a task, or replace the one of the same name; in mid-traffic too."""
    with _client(server, key_file, tls_cert) as client:
        try:
            spec = TaskSpec.from_json(task.read_text(encoding="utf-8"))
            weights = task.with_suffix(".safetensors").read_bytes()
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _failure(f"{task} is no task, or its weights are missing: {error}") from error
        registered = client.register(spec, weights)
        print(f"{registered.description.name} version {registered.version}")


def tasks(server: _Server, key_file: _KeyFile = None, tls_cert: _TlsCert = None) -> None:
    """List the tasks that a server answers."""
    with _client(server, key_file, tls_cert) as client:
        rows = [
            (
                each.description.name,
                str(each.version),
                str(len(each.description.classes)),
                ",".join(map(str, each.prompted_gammas)) or "-",
                " ".join(f"{gamma}:{share:.1%}" for gamma, share in sorted(each.description.accuracy.items())) or "-",
            )
            for each in client.tasks()
        ]
    if not sys.stdout.isatty():
        for row in rows:
            print("\t".join(row))
        return
    table = Table("task", "version", "classes", "prompts at gamma", "accuracy by gamma")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def remove(
    name: Annotated[str, typer.Argument(help="As 'isthmus elastic tasks' lists it.")],
    server: _Server,
    key_file: _KeyFile = None,
    tls_cert: _TlsCert = None,
) -> None:
    """Forget a task. Queries under way are still answered."""
    with _client(server, key_file, tls_cert) as client:
        client.remove(name)


def query(
    task: Annotated[str, typer.Argument(help="Name of a registered task.")],
    image: Annotated[Path, typer.Argument(help="A JPEG or PNG file.")],
    server: _Server,
    latency: Annotated[float, typer.Option(help="Seconds to the answer; 0 leaves it to the task.")] = 0.0,
    utility: Annotated[float | None, typer.Option(help="Worth of a right answer; the task's default without.")] = None,
    key_file: _KeyFile = None,
    tls_cert: _TlsCert = None,
) -> None:
    """Classify one image."""
    with _client(server, key_file, tls_cert) as client:
        try:
            encoded = image.read_bytes()
        except OSError as error:
            raise _failure(str(error)) from error
        reply = client.query(task, encoded, latency_s=latency, utility=utility)
        print(
            f"{reply.class_name}\tgamma {reply.gamma}, waited {reply.queue_s * 1e3:.1f} ms, ran "
            f"{reply.run_s * 1e3:.1f} ms{'' if reply.in_time else ', late'}"
        )


@contextmanager
def _client(server: str, key_file: Path | None, tls_cert: Path | None) -> Iterator[ElasticClient]:
    """A connection whose errors end the command in one line."""
    try:
        key = None if key_file is None else key_file.read_text(encoding="utf-8").strip()
        with ElasticClient.connect(server, key=key, tls_cert=tls_cert) as client:
            yield client
    except (IsthmusError, OSError) as error:
        raise _failure(str(error)) from error


def _failure(message: str) -> typer.Exit:
    typer.echo(f"isthmus elastic: {message}", err=True)
    return typer.Exit(1)
