"""``isthmus experiment link``: the choice between cloud and own answer, replayed on links."""

from pathlib import Path
from typing import Annotated

from typer import Option

from isthmus.command_line import App, fail, print_table


def add_commands(app: App) -> None:
    """Add the command of this file to the ``isthmus experiment`` command."""
    app.command("link", example="isthmus experiment link --out link.json", extra="edge")(link_command)


def link_command(
    out: Annotated[Path, Option(help="JSON file to write the result to.")],
    traces: Annotated[
        list[Path] | None,
        Option(help="Mahimahi packet-delivery trace of an uplink. Repeat it for more. Default: scripted links alone."),
    ] = None,
    seeds: Annotated[int, Option(min=1, help="Seeds of the scripted links.")] = 3,
    duration_s: Annotated[float, Option(min=60, help="Simulated seconds per link.")] = 1200.0,
    every_s: Annotated[float, Option(min=0.05, help="Seconds between two clips.")] = 0.5,
    latency_budget_ms: Annotated[float, Option(min=1, help="Milliseconds within which a clip is to be answered.")] = (
        300.0
    ),
    held_out: Annotated[
        bool, Option("--held-out", help="Links of other kinds, on which the device's constants were not chosen.")
    ] = False,
) -> None:
    """Replay the device's choice between cloud and own answer on links with outages, against an oracle.

    Needs nothing; recorded uplinks are read from --traces. Writes --out, and prints a table. Time is simulated. The
    oracle knows the link. Exits with 1 if a bound does not hold: each clip in its budget, 0.97 of the oracle's answers
    by the cloud, accuracy no worse than always or never asking, and the cloud back within 10 s of an outage.
    """
    from isthmus.experiments.link_choice import run, table
    from isthmus.link.script import read_trace

    found = run(
        out,
        [(path, read_trace(path)) for path in traces or ()],
        seeds=seeds,
        duration_s=duration_s,
        every_s=every_s,
        budget_s=latency_budget_ms / 1000,
        held_out=held_out,
    )
    rows = list(table(found))
    print_table(
        ("link", "by cloud", "oracle", "share", "accuracy: device / always / never", "s", "back s", "bad"), rows
    )
    if any(row[-1] != "-" for row in rows):
        fail(f"some bounds do not hold; {out} has the whole result")
