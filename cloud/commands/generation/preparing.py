"""The work of ``isthmus generate`` convert and profile."""

import typer

from isthmus.cloud.commands.generation.options import ConvertOptions, GenerateProfileOptions
from isthmus.command_line import print_table
from isthmus.data.files import write_atomically
from isthmus.distill.training.progress import bars


def convert(asked: ConvertOptions) -> None:
    """Convert the file. Raises InvalidInput or OSError, and leaves nothing behind then."""
    from isthmus.cloud.generation.prepare.convert import convert as write

    config = write(asked.source, asked.out, number_type=asked.number_type)
    typer.echo(
        f"{asked.out}: {config.kind}, {config.layers} layers of {config.width}, {config.vocabulary} tokens, "
        f"{asked.number_type}"
    )


def profile(asked: GenerateProfileOptions) -> None:
    """Measure the machine and write the profile. Raises InvalidInput or OSError before anything is measured."""
    import torch

    from isthmus.cloud.generation.model.configuration import LlamaConfig
    from isthmus.cloud.generation.model.weights import load_llama
    from isthmus.cloud.generation.prepare.profiler import GOOD_ERROR, measure

    torch.set_num_threads(asked.threads)
    config = LlamaConfig.read(asked.model)
    model = load_llama(asked.model, config, number_type=asked.number_type, device=asked.device)
    with bars() as progress:
        task = progress.add_task("steps", total=None, note="")
        found = measure(
            model,
            layout=asked.layout,
            repeats=asked.repeats,
            on_step=lambda done, every: progress.update(task, completed=done, total=every),
        )
    write_atomically(asked.out, found.to_json() + "\n")
    print_table(
        ("cost", "microseconds"),
        [
            ("step", f"{1e6 * found.step_fixed_s:.0f}"),
            ("row that decodes", f"{1e6 * found.row_s:.1f}"),
            ("token of context read", f"{1e6 * found.context_s:.3f}"),
            ("prompt token", f"{1e6 * found.prompt_s:.1f}"),
            ("pair of prompt tokens", f"{1e6 * found.pair_s:.4f}"),
        ],
    )
    typer.echo(f"mean error of the fit {found.error:.1%}; written: {asked.out}")
    if found.error > GOOD_ERROR:
        typer.echo(
            f"the error is above {GOOD_ERROR:.0%}: the machine was busy with other work, or its steps do not follow "
            "these costs; measure again on a quiet machine",
            err=True,
        )
