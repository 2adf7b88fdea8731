"""`isthmus experiment elastic` and `warmup`: policies of elastic serving compared, without and with warmed models."""

from pathlib import Path
from typing import Annotated

import typer

from isthmus.experiments.elastic import comparison, warmed


def elastic_policies(
    out: Annotated[Path, typer.Option(help="Folder of cells, result.json, result.md and pictures.")],
    trace: Annotated[
        list[str] | None, typer.Option(help="'synthetic' or a recorded trace (CSV); may be given again.")
    ] = None,
    profile: Annotated[
        list[str] | None, typer.Option(help="'paper', 'modelled' or a measured profile (JSON); may be given again.")
    ] = None,
    seeds: Annotated[str, typer.Option(help="Comma-separated.")] = "0,1,2,3,4",
    loads: Annotated[str, typer.Option(help="Comma-separated multiples of gamma 0's capacity.")] = "0.5,1,1.5,2",
    duration_s: Annotated[float, typer.Option(help="Length of the synthetic trace.", min=1)] = 60.0,
    window_s: Annotated[float, typer.Option(help="So much of a recorded trace is played as one second.")] = 60.0,
    policies: Annotated[str, typer.Option(help="Comma-separated; empty: all.")] = "",
) -> None:
    """Utility of every policy of elastic serving, simulated, beside the clairvoyant bound."""
    profiles, traces = profile or ["paper", "modelled"], trace or [comparison.SYNTHETIC]
    names = [name.strip() for name in policies.split(",")] if policies else None
    try:
        result = comparison.run(
            profiles,
            traces,
            loads=[float(load) for load in loads.split(",")],
            seeds=[int(seed) for seed in seeds.split(",")],
            out=out,
            told=lambda line: typer.echo(line, err=True),
            duration_s=duration_s,
            window_s=window_s,
            policies=names,
        )
        first = comparison.Workload(traces[0], result["loads"][-1], result["seeds"][0], duration_s, window_s)
        pictures = comparison.draw(profiles[0], first, out / "pictures", names)
    except (ValueError, OSError) as error:
        typer.echo(f"isthmus experiment: {error}", err=True)
        raise typer.Exit(1) from error
    typer.echo(comparison.markdown(result))
    typer.echo(f"written: {out / 'result.json'}, {out / 'result.md'} and {len(pictures)} pictures")


def warmed_models(
    profile: Annotated[Path, typer.Option(help="What 'isthmus elastic profile' measured, at the store's numbers.")],
    warm: Annotated[Path, typer.Option(help="Warmed models: 'OUT/models' of 'isthmus elastic warmup run'.")],
    out: Annotated[Path, typer.Option(help="Folder of cells, result.json, result.md and pictures.")],
    trace: Annotated[
        list[str] | None, typer.Option(help="'synthetic' or a recorded trace (CSV); may be given again.")
    ] = None,
    seeds: Annotated[str, typer.Option(help="Comma-separated.")] = "0,1,2",
    loads: Annotated[str, typer.Option(help="Comma-separated multiples of gamma 0's capacity.")] = "1,1.5,2",
    duration_s: Annotated[float, typer.Option(help="Length of the synthetic trace.", min=1)] = 60.0,
    window_s: Annotated[float, typer.Option(help="So much of a recorded trace is played as one second.")] = 60.0,
    policies: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(warmed.POLICIES),
) -> None:
    """What warmed models are worth while serving: vanilla against warmed, the same queries, simulated.

    The grid of tuned number by number at inference, with the other methods, is 'isthmus elastic warmup evaluate'; the
    real model in real time is 'isthmus elastic replay --live --warm'.
    """
    try:
        result = warmed.run(
            profile,
            warm,
            trace or [comparison.SYNTHETIC],
            loads=[float(load) for load in loads.split(",")],
            seeds=[int(seed) for seed in seeds.split(",")],
            out=out,
            told=lambda line: typer.echo(line, err=True),
            duration_s=duration_s,
            window_s=window_s,
            policies=[name.strip() for name in policies.split(",")],
        )
    except (ValueError, OSError) as error:
        typer.echo(f"isthmus experiment: {error}", err=True)
        raise typer.Exit(1) from error
    typer.echo(warmed.markdown(result))
    typer.echo(f"written: {out / 'result.json'}, {out / 'result.md'} and pictures")
