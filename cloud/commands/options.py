"""What the commands of `isthmus elastic` have in common: options, errors as one line, progress bars."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, fields
from functools import wraps
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import torch
import typer
from rich.console import Console

from isthmus.cloud.elastic.prepare import profiler
from isthmus.distill.training.checkpoint import CheckpointError
from isthmus.distill.training.loop import TrainingDiverged
from isthmus.distill.training.progress import bars
from isthmus.proto.errors import IsthmusError

Model = Annotated[str, typer.Option(help="A safetensors file with timm's weight names, or a name that timm knows.")]
Pixels = Annotated[
    str | None,
    typer.Option(help="Mean and deviation the model reads pictures with: cifar10, imagenet or half. Default: its own."),
]
Data = Annotated[Path, typer.Option(help="Labelled pictures: Parquet with the columns image and label.")]
Held = Annotated[
    float, typer.Option(min=0.01, max=1.0, help="Share of the pictures held back to profile; 1 takes all.")
]
Limit = Annotated[int | None, typer.Option(min=2, help="Take so many pictures by chance.")]
Gammas = Annotated[str, typer.Option(help="With commas between.")]
Tasks = Annotated[Path, typer.Option(help="Folder of tasks, as 'isthmus elastic prompts' wrote it.")]
Seed = Annotated[int, typer.Option(help="Of every random choice, the split too.")]
Device = Annotated[str, typer.Option(help="'auto' takes a GPU where there is one; or 'cpu', 'cuda'.")]
Threads = Annotated[int, typer.Option(min=0, help="CPU threads of torch; 0 leaves torch's own choice.")]

EXPECTED = (ValueError, CheckpointError, TrainingDiverged, IsthmusError, OSError)


def told(command: Callable[..., None]) -> Callable[..., None]:
    """A command that turns the errors a user can act on into one line and exit code 1."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except EXPECTED as error:
            Console(stderr=True).print(f"[red]error:[/red] {error}", soft_wrap=True, highlight=False)
            raise typer.Exit(1) from error

    return run


def taking(options: type[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A command whose first parameter is a dataclass of options, for typer: each field of it becomes an option."""
    hints = get_type_hints(options, include_extras=True)
    shared = [field.name for field in fields(options)]

    def decorated(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def run(**given: Any) -> None:
            asked = options(**{name: given.pop(name) for name in shared})
            command(asked, **given)

        own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
        common = [
            Parameter(
                field.name,
                Parameter.KEYWORD_ONLY,
                default=Parameter.empty if field.default is MISSING else field.default,
                annotation=hints[field.name],
            )
            for field in fields(options)
        ]
        signature = inspect.Signature(sorted([*common, *own], key=lambda one: one.default is not Parameter.empty))
        run.__signature__ = signature  # type: ignore[attr-defined]
        run.__annotations__ = {one.name: one.annotation for one in signature.parameters.values()}
        return run

    return decorated


def set_threads(threads: int) -> None:
    """Of torch; 0 leaves its own choice."""
    if threads:
        torch.set_num_threads(threads)


@contextmanager
def steps() -> Iterator[profiler.OnStep]:
    """Progress bars for measurements, one for each kind."""
    with bars() as progress:
        shown: dict[str, Any] = {}

        def on_step(what: str, done: int, every: int) -> None:
            if what not in shown:
                shown[what] = progress.add_task(what, total=every, note="")
            progress.update(shown[what], completed=done, total=every)

        yield on_step
