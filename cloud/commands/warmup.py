"""``isthmus elastic warmup``: plan, run, ensemble, evaluate; and a set of pictures on which merging hurts."""

from pathlib import Path
from typing import Annotated

import typer

from isthmus.cloud.commands.options import DetailOptions, WarmupOptions
from isthmus.command_line import App, whole_numbers

app = App(
    "isthmus elastic warmup",
    help="Tune models with fewer tokens, so that taking tokens away costs little accuracy.\n\n"
    "A reduction number says how hard tokens are reduced: merges per layer, or per cent pruned at each of three stages."
    " A model that never saw reduced tokens loses accuracy with them; a model that was tuned with them keeps it.\n\n"
    "'plan' times a few steps and says what a budget buys. 'run' tunes a few well-chosen numbers. 'ensemble' averages "
    "their weights for the numbers between. 'isthmus cloud serve --elastic-warm OUT/models' then serves each batch on "
    "the best model for it. 'evaluate' compares with no tuning and with tuning every number. A command that was "
    "stopped continues when it is run again. From Python: isthmus.cloud.warmup.warming.find_ratio.",
    extra="elastic",
)

TimeBudget = Annotated[
    float | None, typer.Option(min=0.0, help="Seconds of tuning, probing included. Default: no limit.")
]
_GIVEN = "--model vit.safetensors --pixels cifar10 --data train.parquet --out warm"


@app.command("plan", resumes=True, example=f"isthmus elastic warmup plan {_GIVEN} --time-budget-s 600")
def make_plan(asked: WarmupOptions, *, time_budget_s: TimeBudget = None) -> None:
    """Predict how long tuning each number takes, from a short timed probe, and check the budgets.

    Needs a vision transformer and labelled pictures. Writes the plan to --out; 'run' uses it.
    """
    from isthmus.cloud.commands.warming import make_plan

    make_plan(asked, time_budget_s)


@app.command("run", resumes=True, example=f"isthmus elastic warmup run {_GIVEN} --time-budget-s 600")
def carry_out(asked: WarmupOptions, *, time_budget_s: TimeBudget = None) -> None:
    """Tune the numbers that the plan chooses within the budgets, and profile every model at every number.

    Needs a vision transformer and labelled pictures. Writes the models to OUT/models and the task to OUT/task.
    """
    from isthmus.cloud.commands.warming import carry_out

    carry_out(asked, time_budget_s)


@app.command("ensemble", resumes=True, example=f"isthmus elastic warmup ensemble {_GIVEN}")
def make_soups(asked: WarmupOptions) -> None:
    """Average the tuned models' weights for each number, and keep the averages (soups) that gain most.

    Needs the folder of 'isthmus elastic warmup run', and the options that were given to it. --storage-budget-bytes then
    limits the soups alone, beside the tuned models. A soup is kept only if it profiles better than every single model.
    Writes the soups to OUT/models.
    """
    from isthmus.cloud.commands.warming import make_soups

    make_soups(asked)


@app.command(
    "evaluate", resumes=True, example=f"isthmus elastic warmup evaluate {_GIVEN} --test test.parquet --seeds 0,1,2"
)
def evaluate(
    asked: WarmupOptions,
    *,
    test: Annotated[Path, typer.Option(help="Labelled pictures to test on, used neither to learn nor to profile.")],
    seeds: Annotated[
        str, typer.Option(help="Seeds of tuning, with commas. The split of the pictures uses --seed.")
    ] = "0,1,2",
    time_share: Annotated[
        float, typer.Option(min=0.0, help="The planner's time budget, as a share of the time to tune every number.")
    ] = 1 / 3,
    test_limit: Annotated[
        int | None, typer.Option(min=2, help="Test on this many pictures, drawn at random. Default: all.")
    ] = None,
) -> None:
    """Tune every number for every seed and compare: clipper, otas, maxprune, exhaustive, prodigy, prodigy+soups.

    Needs a vision transformer, labelled pictures and test pictures. Writes result.json, result.md and pictures to
    --out. Each cell (a seed and a number) is kept. Several processes may run the same command on one folder: each takes
    cells that no other works on, and the last one writes the result. The planner's models of a seed are served from
    OUT/seed-S/soups-S-.../models, with the task's files in OUT/task.
    """
    from isthmus.cloud.commands.warming import evaluate

    chosen = whole_numbers(seeds, "--seeds")
    if not chosen:
        raise typer.BadParameter("name at least one seed", param_hint="'--seeds'")
    evaluate(asked, test=test, seeds=chosen, time_share=time_share, test_limit=test_limit)


@app.command("details", example="isthmus elastic warmup details --data train.parquet --out details.parquet")
def make_details(asked: DetailOptions) -> None:
    """Make a task on which merging hurts: real pictures with small generated details that decide the class.

    Needs labelled pictures. Writes --out, and the task's JSON file beside it. Details are read from left to right, so
    learn the task with --no-augment: a mirrored picture would have the wrong label.
    """
    from isthmus.cloud.commands.warming import make_details

    make_details(asked)
