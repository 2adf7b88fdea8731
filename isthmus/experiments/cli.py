"""``isthmus experiment``: measured comparisons, each writing a JSON result and a Markdown table."""

import logging
from pathlib import Path
from typing import Annotated

import torch
import typer

from isthmus.data.arrays import CacheFull
from isthmus.distill.checkpoint import CheckpointError
from isthmus.distill.prepare import read_data, release_split
from isthmus.distill.progress import EpochBars, bars
from isthmus.distill.release import Release, ReleaseError
from isthmus.distill.train import TrainingDiverged, pick_device
from isthmus.experiments import elastic, table52, warmup
from isthmus.experiments.offline import METHODS

app = typer.Typer(
    no_args_is_help=True,
    help="Measured comparisons over seeds. Each can be stopped and run again: finished cells are kept.",
)


@app.callback()
def group() -> None:
    """Measured comparisons over seeds."""


@app.command("table-5.2")
def table_5_2(
    data: Annotated[Path, typer.Option(help="The data set that the release was begun with.")],
    release: Annotated[Path, typer.Option(help="A release whose teacher is trained.")],
    out: Annotated[Path, typer.Option(help="Folder of cells, result.json and result.md.")],
    seeds: Annotated[
        str,
        typer.Option(
            help="Comma-separated. Processes with different seeds may share --out: one a core, then one for all."
        ),
    ] = "0,1,2",
    methods: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(METHODS),
    layout: Annotated[str, typer.Option(help="'auto', 'crema-d' or 'ave'.")] = "auto",
    device: Annotated[str, typer.Option(help="'auto' takes a GPU where there is one.")] = "auto",
    threads: Annotated[int, typer.Option(help="CPU threads of torch; 0 leaves torch's own choice.")] = 0,
) -> None:
    """Accuracy of each client's student by method, latency-sensitive scenario (the paper's Table 5.2, right half)."""
    logging.basicConfig(level=logging.WARNING)
    if threads:
        torch.set_num_threads(threads)
    try:
        opened = Release.open(release)
        with bars() as progress:
            result = table52.run(
                opened,
                read_data(data, layout),
                release_split(opened),
                seeds=[int(seed) for seed in seeds.split(",")],
                methods=[method.strip() for method in methods.split(",")],
                out=out,
                device=pick_device(device),
                told=lambda line: typer.echo(line, err=True),
                watch=EpochBars(progress, len(opened.public.names)),
            )
    except (ReleaseError, CheckpointError, TrainingDiverged, CacheFull, ValueError, OSError) as error:
        typer.echo(f"isthmus experiment: {error}", err=True)
        raise typer.Exit(1) from error
    typer.echo(table52.markdown(result))
    typer.echo(f"written: {out / 'result.json'}, {out / 'result.md'}")


@app.command("elastic")
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
    profiles, traces = profile or ["paper", "modelled"], trace or [elastic.SYNTHETIC]
    names = [name.strip() for name in policies.split(",")] if policies else None
    try:
        result = elastic.run(
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
        first = elastic.Workload(traces[0], result["loads"][-1], result["seeds"][0], duration_s, window_s)
        pictures = elastic.draw(profiles[0], first, out / "pictures", names)
    except (ValueError, OSError) as error:
        typer.echo(f"isthmus experiment: {error}", err=True)
        raise typer.Exit(1) from error
    typer.echo(elastic.markdown(result))
    typer.echo(f"written: {out / 'result.json'}, {out / 'result.md'} and {len(pictures)} pictures")


@app.command("warmup")
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
    policies: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(warmup.POLICIES),
) -> None:
    """What warmed models are worth while serving: vanilla against warmed, the same queries, simulated.

    The grid of tuned number by number at inference, with the other methods, is 'isthmus elastic warmup evaluate'; the
    real model in real time is 'isthmus elastic replay --live --warm'.
    """
    try:
        result = warmup.run(
            profile,
            warm,
            trace or [elastic.SYNTHETIC],
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
    typer.echo(warmup.markdown(result))
    typer.echo(f"written: {out / 'result.json'}, {out / 'result.md'} and pictures")
