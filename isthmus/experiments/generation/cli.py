"""``isthmus experiment generation``: policies of generation compared by simulation, beside the papers' claims."""

from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from isthmus.command_line import App, listed, numbers, whole_numbers


def add_commands(app: App) -> None:
    """Add the commands of this file to the ``isthmus experiment`` command."""
    app.command("generation", resumes=True, example="isthmus experiment generation --out words --seeds 0,1")(generation)


def generation(
    out: Annotated[Path, Option(help="Folder to write to: cells, result.json, result.md and pictures.")],
    trace: Annotated[
        Path | None, Option(help="CSV file of the Azure LLM inference traces, to be served too.", exists=True)
    ] = None,
    seeds: Annotated[str, Option(help="Seeds, with commas.")] = "0,1,2,3,4",
    loads: Annotated[str, Option(help="Loads, with commas, as multiples of what 32 rows serve.")] = "0.5,0.9,1.2",
    policies: Annotated[str, Option(help="Policies, with commas. Default: all.")] = "",
    requests: Annotated[int, Option(min=10, max=100_000, help="Number of requests of each simulation.")] = 300,
) -> None:
    """Compare the policies of generation by simulation: response time, goodput, fairness, replicas and placements.

    Needs nothing. Writes --out; every cell is a file, so a run that was stopped continues. result.md sets each system
    beside its paper's claim.
    """
    import json

    from isthmus.cloud.generation.policies.by_name import POLICIES, make_policy
    from isthmus.data.files import write_atomically
    from isthmus.data.made_by import made_by
    from isthmus.data.traces import read_azure_tokens
    from isthmus.experiments.generation import comparison, figures

    names = listed(policies) or list(POLICIES)
    for name in names:
        make_policy(name)
    found_loads = numbers(loads, "--loads", above=0)
    if trace is not None:
        read_azure_tokens(trace)
    cells = comparison.cells_of(names, found_loads, whole_numbers(seeds, "--seeds"), requests, trace)
    made = made_by(out, lambda line: typer.echo(line, err=True))
    found = comparison.run_all(cells, out, lambda line: typer.echo(line, err=True))
    write_atomically(out / "result.json", json.dumps({"code": made, "cells": found}, indent=1) + "\n")
    write_atomically(out / "result.md", comparison.markdown(found))
    pictures = figures.draw_all(found, out / "pictures")
    typer.echo(comparison.markdown(found))
    typer.echo(f"written: {out / 'result.json'}, {out / 'result.md'} and {len(pictures)} pictures")
