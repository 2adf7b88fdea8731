"""``isthmus experiment`` elastic and warmup: policies of elastic serving compared, without and with warmed models."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from isthmus.command_line import App, listed, numbers, whole_numbers

_SYNTHETIC = "synthetic"

Out = Annotated[Path, Option(help="Folder to write to: cells, result.json, result.md and pictures.")]


@dataclass(frozen=True)
class TraceOptions:
    """Which queries are served."""

    trace: Annotated[
        list[str], Option(help="'synthetic', or a recorded trace (CSV). Repeat it for more traces. Default: synthetic.")
    ] = field(default_factory=list)
    duration_s: Annotated[float, Option(help="Length of the synthetic trace in seconds.", min=1)] = 60.0
    window_s: Annotated[float, Option(help="Seconds of a recorded trace that are replayed per second.")] = 60.0

    @property
    def names(self) -> list[str]:
        return self.trace or [_SYNTHETIC]


Seeds = Annotated[str, Option(help="Seeds, with commas.")]
Loads = Annotated[str, Option(help="Loads, with commas, as multiples of what the model serves at gamma 0.")]


def add_commands(app: App) -> None:
    """Add the commands of this file to the ``isthmus experiment`` command."""
    app.command("elastic", resumes=True, example="isthmus experiment elastic --out policies --seeds 0,1")(
        elastic_policies
    )
    app.command(
        "warmup",
        resumes=True,
        example="isthmus experiment warmup --profile profile.json --warm warm/models --out warmed",
    )(warmed_models)


def elastic_policies(
    out: Out,
    traces: TraceOptions,
    profile: Annotated[
        list[str] | None,
        Option(
            help="'paper', 'modelled' or a measured profile (JSON). Repeat it for more. Default: paper and modelled."
        ),
    ] = None,
    seeds: Seeds = "0,1,2,3,4",
    loads: Loads = "0.5,1,1.5,2",
    policies: Annotated[str, Option(help="Policies, with commas. Default: all.")] = "",
) -> None:
    """Compare the policies of elastic serving by simulation: the utility of each, beside the clairvoyant bound.

    Needs nothing for the synthetic trace. Writes --out; every cell is a file, so a run that was stopped continues.
    """
    from isthmus.experiments.elastic import comparison
    from isthmus.extensions import load_extensions

    load_extensions()
    profiles, names = profile or ["paper", "modelled"], listed(policies) or None
    result = comparison.run(
        profiles,
        traces.names,
        loads=numbers(loads, "--loads"),
        seeds=whole_numbers(seeds, "--seeds"),
        out=out,
        report=_say,
        duration_s=traces.duration_s,
        window_s=traces.window_s,
        policies=names,
    )
    first = comparison.Workload(
        traces.names[0], result["loads"][-1], result["seeds"][0], traces.duration_s, traces.window_s
    )
    pictures = comparison.draw(profiles[0], first, out / "pictures", names)
    typer.echo(comparison.markdown(result))
    typer.echo(f"written: {out / 'result.json'}, {out / 'result.md'} and {len(pictures)} pictures")


def warmed_models(
    profile: Annotated[
        Path, Option(help="Profile that 'isthmus elastic profile' measured, at the numbers of the warmed models.")
    ],
    warm: Annotated[Path, Option(help="Folder of warmed models: OUT/models of 'isthmus elastic warmup run'.")],
    out: Out,
    traces: TraceOptions,
    seeds: Seeds = "0,1,2",
    loads: Loads = "1,1.5,2",
    policies: Annotated[str, Option(help="Policies, with commas.")] = "priced,exact,otas,throughput,clipper",
) -> None:
    """Measure what warmed models gain in serving: the same queries on vanilla and on warmed models, simulated.

    Needs a measured profile and warmed models. Writes --out; every cell is a file, so a run that was stopped continues.
    'isthmus elastic warmup evaluate' compares the models at each number; 'isthmus elastic replay --live --warm' runs
    the real models in real time.
    """
    from isthmus.experiments.elastic import warmed
    from isthmus.extensions import load_extensions

    load_extensions()
    result = warmed.run(
        profile,
        warm,
        traces.names,
        loads=numbers(loads, "--loads"),
        seeds=whole_numbers(seeds, "--seeds"),
        out=out,
        report=_say,
        duration_s=traces.duration_s,
        window_s=traces.window_s,
        policies=listed(policies),
    )
    typer.echo(warmed.markdown(result))
    typer.echo(f"written: {out / 'result.json'}, {out / 'result.md'} and pictures")


def _say(line: str) -> None:
    typer.echo(line, err=True)
