"""``isthmus demo``: the whole loop on this machine."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from isthmus.command_line import App

app = App("isthmus demo", help="Run the whole loop on this machine.", extra="demo")


@app.command(
    "isthmus demo",
    resumes=True,
    example="""
    isthmus demo --out demo-out
    isthmus demo --data clips/CREMA-D --preset small --out demo-small
    """,
)
def demo(
    data: Annotated[
        Path | None,
        typer.Option(
            help="A folder in CREMA-D's layout. Default: a synthetic set is made.", exists=True, file_okay=False
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Folder to write everything to. Finished training that is there is used.")
    ] = Path("demo-out"),
    seed: Annotated[int, typer.Option(help="Seed of the data, the split, the training and the devices.", min=0)] = 0,
    preset: Annotated[
        Literal["thesis", "small", "smoke", "tiny"],
        typer.Option(help="Sizes and schedules: tiny takes seconds, smoke minutes, small an hour, thesis days."),
    ] = "smoke",
    edge_python: Annotated[
        Path | None,
        typer.Option(
            help="Python of the devices' environment. Default: that of .venv-edge beside this environment, or this one."
        ),
    ] = None,
) -> None:
    """Train, start a cloud and two devices as separate processes, personalise both over gRPC, and report.

    Needs nothing: without --data it makes a synthetic data set. Writes the data set, the release, the devices' states
    and report.html to --out, and prints a table at the end.

    Client 1 has private clips of the first half of the classes, client 2 of the second half. Both send prototypes, get
    their own student, and have their test clips answered by the cloud at compression ratios 1 and 2, and alone.
    Everything listens on loopback only, on a free port.
    """
    from rich.console import Console

    from isthmus.demo.report import write_report
    from isthmus.demo.run import Demo, DemoSettings
    from isthmus.demo.table import closing_table

    console = Console(highlight=False)
    settings = DemoSettings(
        out=out.absolute(),
        data=None if data is None else data.absolute(),
        seed=seed,
        preset=preset,
        edge_python=(edge_python or default_edge_python()).absolute(),
    )
    outcome = Demo(settings, console).run()
    report = settings.out / "report.html"
    write_report(outcome, report)
    console.print(closing_table(outcome))
    typer.echo(f"Report: {report}")


def default_edge_python() -> Path:
    """Return the Python of ``.venv-edge`` beside the environment that runs this, or else the Python that runs this."""
    beside = Path(sys.prefix).parent / ".venv-edge" / "bin" / "python"
    return beside if beside.exists() else Path(sys.executable)
