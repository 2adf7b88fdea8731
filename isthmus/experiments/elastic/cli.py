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
        "experts",
        resumes=True,
        example="isthmus experiment experts --model vit.safetensors --pixels cifar10 --data train.parquet --test "
        "test.parquet --out experts",
    )(experts)
    app.command(
        "warmup",
        resumes=True,
        example="isthmus experiment warmup --profile profile.json --warm warm/models --out warmed",
    )(warmed_models)


@dataclass(frozen=True)
class ExpertsOptions:
    """Options of ``isthmus experiment experts``."""

    model: Annotated[str, Option(help="The dense vision transformer, as for 'isthmus elastic experts'.")]
    data: Annotated[Path, Option(help="CIFAR-10's pictures to learn from, a Parquet file.")]
    test: Annotated[Path, Option(help="CIFAR-10's pictures to test on, a Parquet file.")]
    pixels: Annotated[str | None, Option(help="cifar10, imagenet or half. Default: the model's.")] = None
    seeds: Seeds = "0,1,2,3,4"
    learned: Annotated[int, Option(min=2, help="Pictures to learn from.")] = 2_000
    tested: Annotated[int, Option(min=2, help="Pictures to test on.")] = 1_000
    pictures: Annotated[int, Option(min=1, help="Pictures of each task per epoch.")] = 512
    epochs: Annotated[int, Option(min=1, help="Epochs of training.")] = 4
    batch_size: Annotated[int, Option(min=2, help="Pictures per training step.")] = 32
    learning_rate: Annotated[float, Option(help="Learning rate.")] = 2e-4
    marks: Annotated[int, Option(min=1, max=4, help="Details per picture of the task 'details'.")] = 2
    threads: Annotated[int, Option(min=1, help="Threads of torch.")] = 1


def experts(asked: ExpertsOptions, *, out: Out) -> None:
    """Compare experts with dense models of equal operations on four tasks: accuracy, conflict, balance and memory.

    Needs a dense vision transformer and CIFAR-10. Writes --out; every cell is a file, so a run that was stopped
    continues.
    """
    import torch

    from isthmus.experiments.elastic.experts import Setup, markdown, run

    torch.set_num_threads(asked.threads)
    setup = Setup(
        asked.model,
        asked.data,
        asked.test,
        asked.pixels,
        learned=asked.learned,
        tested=asked.tested,
        pictures=asked.pictures,
        epochs=asked.epochs,
        batch_size=asked.batch_size,
        learning_rate=asked.learning_rate,
        marks=asked.marks,
    )
    result = run(setup, seeds=whole_numbers(asked.seeds, "--seeds"), out=out, report=_say)
    typer.echo(markdown(result))
    typer.echo(f"written: {out / 'result.json'} and {out / 'result.md'}")


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
        loads=numbers(loads, "--loads", above=0),
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
        loads=numbers(loads, "--loads", above=0),
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
