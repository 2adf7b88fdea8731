"""``isthmus demo``: the whole loop on this machine."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(add_completion=False)


@app.command()
def demo(
    data: Annotated[
        Path | None,
        typer.Option(
            help="A folder in CREMA-D's layout. Default: a synthetic set is made.", exists=True, file_okay=False
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Where everything goes; finished training there is taken over.")] = Path(
        "demo-out"
    ),
    seed: Annotated[int, typer.Option(help="Of the data, the split, the training and the devices.", min=0)] = 0,
    preset: Annotated[
        str, typer.Option(help="Sizes and schedules: smoke (minutes), small (an hour), thesis.")
    ] = "smoke",
    edge_python: Annotated[
        Path | None,
        typer.Option(help="Python of the devices' environment. Default: .venv-edge beside this one, else this one."),
    ] = None,
) -> None:
    """Train, start a cloud and two devices as processes of their own, personalise both over gRPC, and report.

    Client 1 has private clips of the first half of the classes, client 2 of the second. Both send prototypes, get
    their own student, and have their test clips answered by the cloud at compression ratios 1 and 2, and alone.
    Everything listens on loopback only, on a free port. Ends with a table here and report.html in --out.
    """
    # Imported here: asking for help should need neither torch nor matplotlib.
    from isthmus.demo.processes import ChildFailed
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
    try:
        outcome = Demo(settings, console).run()
        report = settings.out / "report.html"
        write_report(outcome, report)
    except (ChildFailed, ValueError, OSError) as error:
        typer.echo(f"isthmus demo: {error}", err=True)
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        typer.echo(f"isthmus demo: interrupted; finished training is kept in {out}, the same command goes on", err=True)
        raise typer.Exit(130) from None
    console.print(closing_table(outcome))
    console.print(f"Report: {report}")


def default_edge_python() -> Path:
    """The Python of ``.venv-edge`` beside the environment that runs this, where there is one."""
    beside = Path(sys.prefix).parent / ".venv-edge" / "bin" / "python"
    return beside if beside.exists() else Path(sys.executable)
