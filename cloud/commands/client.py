"""``isthmus elastic register``, ``tasks``, ``remove`` and ``query``: the client of a running server.

They need the extra ``client`` alone: no torch, and nothing that serves. Only ``register --own-head`` reads a model.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from isthmus.command_line import App, fail, key_in, one_line, print_table

if TYPE_CHECKING:
    from isthmus.cloud.elastic.tasks.task import TaskSpec
    from isthmus.cloud.rpc.elastic_client import ElasticClient
    from isthmus.proto.v1 import elastic_pb2 as pb

_EXTRA = "client"


@dataclass(frozen=True)
class Server:
    """How to reach a server of elastic serving."""

    server: Annotated[str, typer.Option(help="Address of 'isthmus cloud serve --elastic-model ...', HOST:PORT.")]
    key_file: Annotated[Path | None, typer.Option(help="File with the key that the server asks its clients for.")] = (
        None
    )
    tls_cert: Annotated[
        Path | None, typer.Option(help="PEM certificate to trust. Without one the connection is not encrypted.")
    ] = None

    @contextmanager
    def connected(self) -> Iterator["ElasticClient"]:
        """Open a connection to the server. Raises IsthmusError, ValueError or OSError."""
        from isthmus.cloud.rpc.elastic_client import ElasticClient

        with ElasticClient.connect(self.server, key=key_in(self.key_file), tls_cert=self.tls_cert) as client:
            yield client


def add_commands(app: App) -> None:
    """Add the commands of this file to the ``isthmus elastic`` command."""
    app.command(
        extra=_EXTRA, example="isthmus elastic register tasks/animals.json --server 127.0.0.1:50051 --key-file key"
    )(register)
    app.command(extra=_EXTRA, example="isthmus elastic tasks --server 127.0.0.1:50051 --key-file key")(tasks)
    app.command(extra=_EXTRA, example="isthmus elastic remove animals --server 127.0.0.1:50051 --key-file key")(remove)
    app.command(extra=_EXTRA, example="isthmus elastic query animals cat.png --server 127.0.0.1:50051 --latency 0.2")(
        query
    )


def register(
    task: Annotated[
        Path,
        typer.Argument(
            help="NAME.json of 'isthmus elastic prompts', with NAME.safetensors beside it. With --own-head: the task's "
            "name."
        ),
    ],
    server: Server,
    own_head: Annotated[
        bool, typer.Option("--own-head", help="Make the task of the model's own head. Needs --model and no training.")
    ] = False,
    model: Annotated[
        str | None, typer.Option(help="With --own-head: the model that the server serves, as its --elastic-model.")
    ] = None,
    classes: Annotated[
        Path | None,
        typer.Option(
            help="With --own-head: file with the names of the classes in the order of the head, one per line or a JSON "
            "list. Default: those of the model's config.json."
        ),
    ] = None,
    profiling: Annotated[
        Path | None,
        typer.Option(
            help="Labelled pictures (Parquet) on which the server itself measures the task's accuracy while it is "
            "idle. Their labels are those of the task's NAME.recipe.json, or of the head. Needs the extra elastic."
        ),
    ] = None,
    profiling_limit: Annotated[
        int, typer.Option(help="Send this many of the pictures, drawn at random.", min=2, max=10_000)
    ] = 500,
) -> None:
    """Register a task with a server, or replace the task of the same name.

    Needs a running server, and the two files of a task or, with --own-head, the served model. Queries of other tasks
    are answered meanwhile. Prints the task's name and its new version.
    """
    if not own_head and (model is not None or classes is not None):
        fail("--model and --classes belong to --own-head")
    if own_head and model is None:
        fail("--own-head needs --model: the file or name that the server serves")
    spec, weights = _of_files(task) if model is None else _of_head(str(task), model, classes)
    with server.connected() as client:
        if profiling is not None:
            recipe = None if own_head else task.with_suffix(".recipe.json")
            weights = _with_pictures(weights, profiling, profiling_limit, recipe, client.image_px())
        registered = client.register(spec, weights)
    typer.echo(f"{registered.description.name} version {registered.version}")


def _of_files(task: Path) -> "tuple[TaskSpec, bytes]":
    from isthmus.cloud.elastic.tasks.task import TaskSpec
    from isthmus.data.files import read_bytes, read_text

    try:
        return TaskSpec.from_json(read_text(task)), read_bytes(task.with_suffix(".safetensors"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        fail(f"{task} is not a task, or its weights are missing: {one_line(error)}")


def _of_head(name: str, model: str, classes: Path | None) -> "tuple[TaskSpec, bytes]":
    try:
        from isthmus.cloud.elastic.prepare.own_head import own_head
    except ImportError:
        fail("--own-head reads the model on this machine, which needs the extra cloud: pip install 'isthmus[cloud]'")
    spec, weights = own_head(model, name, classes)
    return spec, weights.to_bytes()


def _with_pictures(weights: bytes, data: Path, limit: int, recipe: Path | None, image_px: int) -> bytes:
    if not image_px:
        fail("the server is too old to measure accuracy itself: leave out --profiling")
    try:
        import numpy as np

        from isthmus.cloud.elastic.tasks.recipes import read_recipe
        from isthmus.cloud.elastic.tasks.task import with_profiling
        from isthmus.data.images import read_images
        from isthmus.proto.limits import MAX_TASK_WEIGHTS_BYTES
    except ImportError:
        fail("--profiling reads pictures, which needs the extra elastic: pip install 'isthmus[elastic]'")
    labelled = read_images(data, image_px)
    if recipe is not None and recipe.is_file():
        labelled = read_recipe(str(recipe)).apply(labelled)
    if limit < len(labelled):
        labelled = labelled.only(np.random.default_rng(0).choice(len(labelled), limit, replace=False))
    whole = with_profiling(weights, labelled)
    if len(whole) > MAX_TASK_WEIGHTS_BYTES:
        fail(f"weights and pictures have {len(whole)} bytes, over {MAX_TASK_WEIGHTS_BYTES}: lower --profiling-limit")
    return whole


def tasks(server: Server) -> None:
    """List the tasks that a server answers, with their classes, prompts and accuracies.

    'owner's accuracy' is what the owner of the task measured. 'measured here' is what the server measured on the
    owner's profiling set, which its plans use unless the labels do not fit the task.

    Needs a running server. Writes nothing. If the output is no terminal, each task is a line with tabs between columns.
    """
    with server.connected() as client:
        rows = [
            (
                each.description.name,
                str(each.version),
                str(len(each.description.classes)),
                ",".join(map(str, each.prompted_gammas)) or "-",
                _shares(each.description.accuracy),
                _measured(each),
            )
            for each in client.tasks()
        ]
    columns = ("task", "version", "classes", "prompts at gamma", "owner's accuracy", "measured here")
    print_table(columns, rows, tabs_in_pipes=True)


def _shares(accuracy: "Mapping[int, float]") -> str:
    return " ".join(f"{gamma}:{share:.1%}" for gamma, share in sorted(accuracy.items())) or "-"


def _measured(task: "pb.RegisteredTask") -> str:
    if not task.HasField("measured"):
        return "-"
    use = "" if task.measured.used else "not used, labels do not fit: "
    return f"{use}{_shares(task.measured.accuracy)} ({task.measured.pictures} pictures)"


def remove(
    name: Annotated[str, typer.Argument(help="The task's name, as 'isthmus elastic tasks' lists it.")],
    server: Server,
) -> None:
    """Remove a task from a server. Queries that are being answered are still answered.

    Needs a running server that has the task. Prints nothing.
    """
    with server.connected() as client:
        client.remove(name)


def query(
    task: Annotated[str, typer.Argument(help="Name of a registered task.")],
    image: Annotated[Path, typer.Argument(help="A JPEG or PNG file.")],
    server: Server,
    latency: Annotated[float, typer.Option(help="Seconds until the answer is due. 0: the task's default.")] = 0.0,
    utility: Annotated[
        float | None, typer.Option(help="What a right answer in time is worth. Default: the task's default.")
    ] = None,
    gamma: Annotated[
        int | None, typer.Option(help="Run at this gamma and no other. Default: the server decides.")
    ] = None,
    min_accuracy: Annotated[
        float | None,
        typer.Option(help="Run only at gammas at which the task has at least this accuracy.", min=0.0, max=1.0),
    ] = None,
) -> None:
    """Classify one picture.

    Needs a running server with the task. Prints the class, then the gamma of its batch, the time in the queue and the
    time of the batch.
    """
    encoded = image.read_bytes()
    with server.connected() as client:
        reply = client.query(task, encoded, latency_s=latency, utility=utility, gamma=gamma, min_accuracy=min_accuracy)
    experts = f", {reply.experts} experts" if reply.experts else ""
    typer.echo(
        f"{reply.class_name}\tgamma {reply.gamma}{experts}, waited {reply.queue_s * 1e3:.1f} ms, ran "
        f"{reply.run_s * 1e3:.1f} ms{'' if reply.in_time else ', late'}"
    )
