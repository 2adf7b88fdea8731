"""The work of ``isthmus elastic variants``."""

import typer

from isthmus.cloud.commands.options import VariantOptions, ascending
from isthmus.cloud.commands.preparing import steps
from isthmus.cloud.elastic.policies.infaas import SIZE_NAMES
from isthmus.cloud.elastic.prepare.inputs import pictures_of
from isthmus.cloud.elastic.tasks.recipes import read_recipe
from isthmus.cloud.elastic.variants.adding import add_task
from isthmus.command_line import print_table
from isthmus.data.images import Columns, LabelledImages, PixelSpec
from isthmus.distill.training.loop import pick_device, set_threads


def add_variants(asked: VariantOptions) -> None:
    """Add a task to a folder of variants. Raises ValueError, ImageError or OSError."""
    batches = ascending(asked.sizes, "--sizes")
    if asked.small is None and asked.large is None:
        raise ValueError("one size leaves nothing to choose: give --small, --large or both")
    set_threads(asked.threads)
    recipe = read_recipe(asked.task)
    sources = {
        level: source for level, source in ((-1, asked.small), (0, asked.base), (1, asked.large)) if source is not None
    }
    columns = Columns(asked.image_column, asked.label_column)

    def pictures(pixels: PixelSpec) -> LabelledImages:
        return pictures_of(asked.data, pixels, asked.limit, asked.seed, columns)

    with steps() as on_step:
        made = add_task(
            asked.out,
            recipe,
            sources,
            pictures,
            pixels=asked.pixels,
            device=str(pick_device(asked.device)),
            number_type=asked.number_type,
            batches=batches,
            repeats=asked.repeats,
            on_step=on_step,
        )
    print_table(
        ("size", "accuracy", "images/s", "MB", "loaded in, ms"),
        [
            (
                SIZE_NAMES[size.level],
                f"{made.profile.accuracy_of(recipe.name, size.level):.1%}",
                f"{made.profile.capacity_per_s(size.level):.0f}",
                f"{size.memory_bytes / 1e6:.1f}",
                f"{1e3 * size.load_s:.0f}",
            )
            for size in made.sizes
        ],
        title=f"{recipe.name}, of {len(made.tasks)} tasks in {asked.out}",
    )
    typer.echo(f"written: {asked.out}")
