"""``isthmus demo``: the whole loop on this machine."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from isthmus.command_line import App, fail, listed, print_table

if TYPE_CHECKING:
    from isthmus.demo.run import DemoSettings

app = App("isthmus demo", help="Run the whole loop on this machine.", extra="demo")


@app.command(
    "isthmus demo",
    resumes=True,
    example="""
    isthmus demo --out demo-out
    isthmus demo --data clips/CREMA-D --people 1001,1002 --preset small --out demo-small
    isthmus demo --seeds 3 --out demo-seeds
    """,
)
def demo(
    data: Annotated[
        Path | None,
        typer.Option(
            help="A folder in CREMA-D's or AVE's layout. Default: a synthetic set is made.",
            exists=True,
            file_okay=False,
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Folder to write everything to. Finished training that is there is used.")
    ] = Path("demo-out"),
    seed: Annotated[int, typer.Option(help="Seed of the data, the split, the training and the devices.", min=0)] = 0,
    preset: Annotated[
        Literal["thesis", "small", "smoke", "demo", "tiny"],
        typer.Option(help="Sizes and schedules: tiny takes seconds, demo minutes, small an hour, thesis days."),
    ] = "demo",
    people: Annotated[
        str,
        typer.Option(
            help="Two people of the data set, with a comma, who become the clients. Default: as described above."
        ),
    ] = "",
    seeds: Annotated[
        int,
        typer.Option(
            help="Run so many seeds one after the other, and check that each client's gain is beyond two standard "
            "errors of the paired clips of all. The command ends with an error if one is not.",
            min=1,
            max=100,
        ),
    ] = 1,
    generate_model: Annotated[
        Path | None,
        typer.Option(
            help="Model directory of a language model, as 'isthmus generate serve' takes it. The demo then ends with "
            "a reply to each client; the devices send how their users feel with the request.",
            exists=True,
            file_okay=False,
        ),
    ] = None,
    edge_python: Annotated[
        Path | None,
        typer.Option(
            help="Python of the devices' environment. Default: that of .venv-edge beside this environment, or this one."
        ),
    ] = None,
) -> None:
    """Train, start a cloud and two devices as separate processes, personalise both over gRPC, and report.

    Needs nothing: without --data it makes a synthetic data set. Writes the data set, the release, the devices' states,
    report.html and result.json to --out, and prints a table and one sentence at the end. With --seeds, each seed has a
    folder below --out, and gains.json holds the gains over all.

    Client 1 has clips of all classes, client 2 of few. If the data set has at least ten people, both are people of
    whom nothing is public: those of role "private" in its manifest.csv, if there is one, else the last two. Both send
    prototypes, get their own student, and have their test clips answered by the cloud and alone: at first, after their
    voice and face were learned without labels, and after 8 corrections. No test clip is used to learn anything.
    Everything listens on loopback only, on a free port.
    """
    from isthmus.demo.run import DemoSettings

    settings = DemoSettings(
        out=out.absolute(),
        data=None if data is None else data.absolute(),
        seed=seed,
        preset=preset,
        edge_python=(edge_python or default_edge_python()).absolute(),
        people=tuple(listed(people)),
        generate_model=None if generate_model is None else generate_model.absolute(),
    )
    if seeds == 1:
        _run(settings)
        return
    results = [
        _run(replace(settings, seed=each, out=settings.out / f"seed-{each}")) for each in range(seed, seed + seeds)
    ]
    _check_gains(results, settings.out)


def _run(settings: "DemoSettings") -> dict[str, Any]:
    """Run one seed, write its report and result, and print how it ended. Returns the content of result.json."""
    from rich.console import Console

    from isthmus.demo.report import write_report
    from isthmus.demo.result import closing_sentence, write_result
    from isthmus.demo.run import Demo
    from isthmus.demo.table import closing_table

    console = Console(highlight=False)
    outcome = Demo(settings, console).run()
    result = write_result(outcome, settings.out)
    report = settings.out / "report.html"
    write_report(outcome, report, closing_sentence(result))
    console.print(closing_table(outcome))
    for client in outcome.clients:
        if client.spoken is not None:
            sent = "nothing of how they feel" if client.spoken.sent is None else json.dumps(client.spoken.sent)
            typer.echo(f"{client.name} says: {client.spoken.said} (sent with it: {sent})\nReply: {client.spoken.reply}")
    typer.echo(f"Report: {report}")
    typer.echo(closing_sentence(result))
    return result


def _check_gains(results: Sequence[Mapping[str, Any]], out: Path) -> None:
    """Print and write the gains over all seeds. Raises Refused if one is within two standard errors."""
    from dataclasses import asdict

    from isthmus.data.files import write_atomically
    from isthmus.demo.result import GAINS, gains

    found = gains(results)
    write_atomically(out / GAINS, json.dumps([asdict(gain) for gain in found], indent=1) + "\n")
    print_table(
        ("client", "way", "clips", "before", "gain, points", "standard error", "beyond chance"),
        [
            (
                gain.client,
                gain.way.replace("_", " "),
                f"{gain.clips}",
                f"{gain.before:.1f} %",
                f"{gain.points:+.1f}",
                f"{gain.error:.1f}",
                "yes" if gain.beyond_chance else "no",
            )
            for gain in found
        ],
    )
    small = [f"{gain.client} {gain.way.replace('_', ' ')}" for gain in found if not gain.beyond_chance]
    if small:
        fail(f"not beyond two standard errors over {len(results)} seeds: {'; '.join(small)}")


def default_edge_python() -> Path:
    """Return the Python of ``.venv-edge`` beside the environment that runs this, or else the Python that runs this."""
    beside = Path(sys.prefix).parent / ".venv-edge" / "bin" / "python"
    return beside if beside.exists() else Path(sys.executable)
