"""``isthmus elastic warmup``: plan, run, ensemble, evaluate; and a set of pictures on which merging hurts."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, cast

import typer
from rich.console import Console
from rich.table import Table

from isthmus.cloud.commands.options import (
    Data,
    Device,
    Held,
    Limit,
    Model,
    Pixels,
    Seed,
    Threads,
    set_threads,
    taking,
    told,
)
from isthmus.cloud.elastic.prepare.inputs import numbers as numbers_of
from isthmus.cloud.elastic.prepare.inputs import opened, pictures_of, split_off
from isthmus.cloud.elastic.tasks.recipes import TaskRecipe, read_recipe
from isthmus.cloud.elastic.warm.profiled import VANILLA
from isthmus.cloud.elastic.warm.store import ReducerName, WarmStore, profiled
from isthmus.cloud.warmup.compare import figures, grid
from isthmus.cloud.warmup.compare.grid import Grid
from isthmus.cloud.warmup.planner import UNBOUNDED, Plan, next_step
from isthmus.cloud.warmup.profiling import check_numbers, largest_number
from isthmus.cloud.warmup.tuning import FROZEN, TARGETS, TUNE, Subject, Target, TuneConfig, start
from isthmus.cloud.warmup.vanilla import save_task, vanilla_subject
from isthmus.cloud.warmup.warming import Warming, named
from isthmus.data.files import write_atomically
from isthmus.data.images import read_images, write_images
from isthmus.data.synthetic.details import detail_classes, with_details
from isthmus.distill.training.loop import pick_device
from isthmus.distill.training.progress import EpochBars, bars

app = typer.Typer(
    no_args_is_help=True,
    help="Models tuned with fewer tokens, so that taking tokens away costs little accuracy.\n\n"
    "A reduction number says how hard tokens are reduced: merges a layer, or per cent pruned at each of three stages. "
    "A model that never saw reduced tokens loses accuracy with them; one that was tuned with them keeps it. 'plan' "
    "times a few steps and says what a budget buys; 'run' tunes a few well-chosen numbers and 'ensemble' averages "
    "their weights for those between; 'isthmus cloud serve --elastic-warm OUT/models' serves each batch on the best "
    "model for it. 'evaluate' compares with no tuning and with tuning every number. What was stopped goes on where it "
    "stood when the same command is run again. From Python: isthmus.cloud.warmup.warming.find_ratio.",
)

Task = Annotated[
    str, typer.Option(help="cifar10, animals-vehicles, animals, or a JSON file with name, classes, class_of_label.")
]
Numbers = Annotated[str, typer.Option(help="Reduction numbers, with commas; empty: ten from 0 to the most possible.")]
Reducer = Annotated[str, typer.Option(help="merging or pruning.")]
Middle = Annotated[
    int | None, typer.Option(help="One model serves all numbers up to this one; default: the number nearest 20.")
]
TimeBudget = Annotated[float | None, typer.Option(min=0.0, help="Seconds of tuning, probing included; none: no bound.")]
StorageBudget = Annotated[
    int | None, typer.Option(min=0, help="Bytes of tuned models, and of soups beside them; none: no bound.")
]
Epochs = Annotated[int, typer.Option(min=1, help="Of tuning, for each number.")]
BatchSize = Annotated[int, typer.Option(min=1)]
Rate = Annotated[float, typer.Option(help="Learning rate of tuning.")]
Learned = Annotated[
    str,
    typer.Option(
        help="What merging models learn: labels (the paper's), vanilla (the vanilla model's answers with all tokens; "
        "no labels are read), or both."
    ),
]
VanillaEpochs = Annotated[
    int, typer.Option(min=0, help="Learn the task first, with a new head and all tokens; 0: the model knows it.")
]
Frozen = Annotated[str, typer.Option(help="Beginnings of timm's parameter names that stay as they are, with commas.")]
ALL_FROZEN = ",".join(FROZEN)
Augment = Annotated[
    bool,
    typer.Option(
        "--augment/--no-augment",
        help="Shift and mirror pictures while learning: not where the place of things is the answer.",
    ),
]
Out = Annotated[Path, typer.Option(help="Folder of all that is made, and of all that is needed to go on.")]
ProfileOn = Annotated[
    Path | None,
    typer.Option(
        "--profiling",
        help="Labelled pictures to profile on, for a model that has seen all of --data: what it has seen flatters it. "
        "Default: a share held back from --data.",
    ),
]


@dataclass(frozen=True)
class Asked:
    """What plan, run, ensemble and evaluate are all given."""

    model: Model
    data: Data
    out: Out
    task: Task = "cifar10"
    numbers: Numbers = ""
    reducer: Reducer = "merging"
    middle: Middle = None
    storage_budget_bytes: StorageBudget = None
    epochs: Epochs = TUNE.epochs
    batch_size: BatchSize = TUNE.batch_size
    learning_rate: Rate = TUNE.learning_rate
    target: Learned = "both"
    vanilla_epochs: VanillaEpochs = 0
    frozen: Frozen = ALL_FROZEN
    augment: Augment = True
    held: Held = 0.2
    profiling: ProfileOn = None
    limit: Limit = None
    pixels: Pixels = None
    seed: Seed = 0
    device: Device = "auto"
    threads: Threads = 0

    @cached_property
    def config(self) -> TuneConfig:
        if self.reducer not in ("merging", "pruning"):
            raise ValueError(f"reducer {self.reducer!r}: merging or pruning is wanted")
        if self.target not in TARGETS:
            raise ValueError(f"target {self.target!r}: one of {', '.join(TARGETS)} is wanted")
        chosen: ReducerName = "merging" if self.reducer == "merging" else "pruning"
        train = dataclasses.replace(
            TUNE,
            epochs=self.epochs,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            augment=self.augment,
            warmup_epochs=self.epochs / 10,  # Adam's first steps are long, however little there is to mend
        )
        frozen = tuple(part.strip() for part in self.frozen.split(",") if part.strip())
        return TuneConfig(train, chosen, frozen, self.seed, cast(Target, self.target))

    @cached_property
    def recipe(self) -> TaskRecipe:
        return read_recipe(self.task)

    @cached_property
    def subject(self) -> Subject:
        """Learns the task first, where that is asked for: with a progress bar, and resumable."""
        set_threads(self.threads)
        elastic, pixel = opened(self.model, self.pixels)
        learning = self.recipe.apply(pictures_of(self.data, elastic, self.limit, self.seed))
        if self.profiling is None:
            learning, profiling = split_off(learning, self.held, self.seed)
        else:
            profiling = self.recipe.apply(pictures_of(self.profiling, elastic, None, self.seed))
        with bars() as progress:
            return vanilla_subject(
                elastic,
                pixel,
                self.recipe,
                learning,
                profiling,
                self.config,
                epochs=self.vanilla_epochs,
                folder=self.out,
                device=pick_device(self.device),
                on_epoch=named("vanilla", EpochBars(progress, len(learning), "pictures")),
            )

    @cached_property
    def chosen_numbers(self) -> tuple[int, ...]:
        model = start(self.subject, self.config)
        most = largest_number(model)
        return check_numbers(numbers_of(self.numbers) or tuple(round(most * tenth / 9) for tenth in range(10)), model)

    @property
    def warming(self) -> Warming:
        return Warming(self.out, self.subject, self.chosen_numbers, self.config)

    @property
    def storage_bytes(self) -> float:
        return UNBOUNDED if self.storage_budget_bytes is None else self.storage_budget_bytes

    def plan(self, time_budget_s: float | None) -> Plan:
        return self.warming.begin(
            middle=self.middle,
            time_budget_s=UNBOUNDED if time_budget_s is None else time_budget_s,
            storage_budget_bytes=self.storage_bytes,
        )


@app.command("plan")
@told
@taking(Asked)
def make_plan(asked: Asked, *, time_budget_s: TimeBudget = None) -> None:
    """Predict what tuning each number takes, from a short timed probe, and check the budgets."""
    _show(asked.plan(time_budget_s))


@app.command("run")
@told
@taking(Asked)
def carry_out(asked: Asked, *, time_budget_s: TimeBudget = None) -> None:
    """Tune the numbers that the plan chooses within the budgets, and profile every model at every number."""
    plan, warming = asked.plan(time_budget_s), asked.warming
    with bars() as progress:
        watch = EpochBars(progress, len(asked.subject.learning), "pictures")
        plan = warming.run(plan, on_epoch=watch, report=_say)
    warming.profile(_say)
    path = save_task(asked.subject, asked.recipe, _merged(warming.table()[VANILLA], asked.config), asked.out / "task")
    _show(plan)
    _table(warming.store)
    Console().print(f"written: {warming.store.path}, {path}", highlight=False, soft_wrap=True)


@app.command("ensemble")
@told
@taking(Asked)
def make_soups(asked: Asked) -> None:
    """Average the tuned models' weights for each number, and keep the soups that gain most within the bytes.

    Give the options that 'run' was given; --storage-budget-bytes is for soups alone, beside the tuned models. A soup is
    kept only where it profiles better than every single model.
    """
    warming = asked.warming
    if warming.plan() is None:
        raise ValueError(f"{asked.out} holds no plan: 'isthmus elastic warmup run' makes one, and the models")
    found = warming.ensemble(asked.storage_bytes, _say)
    table = Table("number", "best single", "right", "soup", "right", "made of", title="Soups", title_justify="left")
    for one in found:
        made_of = ", ".join(f"{name} {share:.2f}" for name, share in sorted(one.shares.items()))
        table.add_row(
            str(one.number), one.best_member, f"{one.best_accuracy:.2%}", one.method, f"{one.accuracy:.2%}", made_of
        )
    Console(width=None if Console().is_terminal else 160).print(table)
    _table(warming.store)


@app.command("evaluate")
@told
@taking(Asked)
def evaluate(
    asked: Asked,
    *,
    test: Annotated[Path, typer.Option(help="Pictures that judge, apart from those to learn from and to profile on.")],
    seeds: Annotated[str, typer.Option(help="Of tuning; with commas. The split into pictures is --seed's.")] = "0,1,2",
    time_share: Annotated[
        float, typer.Option(min=0.0, help="The planner's time budget, as a share of what tuning every number takes.")
    ] = 1 / 3,
    test_limit: Annotated[int | None, typer.Option(min=2, help="Judge by so many pictures, by chance.")] = None,
) -> None:
    """Tune every number for every seed and compare: clipper, otas, maxprune, exhaustive, prodigy, prodigy+soups.

    Each cell (a seed and a number) is kept. Several processes may run the same command on one folder: each takes the
    cells that no other is at, and the last one writes the result. What the planner keeps of a seed is a store to serve:
    OUT/seed-S/soups-S-.../models, with the task's files in OUT/task.
    """
    subject, out = asked.subject, asked.out
    judged = asked.recipe.apply(pictures_of(test, subject.model, test_limit, asked.seed))
    each = tuple(numbers_of(seeds))
    measured = Grid(
        out,
        subject,
        judged,
        asked.chosen_numbers,
        asked.config,
        each,
        middle=asked.middle,
        time_share=time_share,
        storage_budget_bytes=asked.storage_bytes,
    )
    with bars() as progress:
        watch = EpochBars(progress, len(subject.learning), "pictures")
        result = measured.run(on_epoch=watch, report=_say)
    if result is None:
        return
    written = figures.draw(result, out / "pictures")
    save_task(subject, asked.recipe, _merged(measured.vanilla_accuracy(each[0]), asked.config), out / "task")
    Console(width=None if Console().is_terminal else 200).print(grid.markdown(result), highlight=False)
    Console().print(f"written: {out / 'result.json'}, {out / 'result.md'}, {len(written)} pictures", soft_wrap=True)


@app.command("details")
@told
def make_details(
    data: Data,
    out: Annotated[Path, typer.Option(help="Parquet file to write; the task's JSON is written beside it.")],
    size_px: Annotated[int, typer.Option(min=8, help="Side of the pictures.")] = 32,
    marks: Annotated[
        int, typer.Option(min=1, max=4, help="Details a picture; 2 to the power of it are the classes.")
    ] = 3,
    side_px: Annotated[int, typer.Option(min=3, help="Side of a detail.")] = 5,
    contrast: Annotated[float, typer.Option(min=0.01, max=1.0, help="Fainter details are merged away sooner.")] = 0.8,
    limit: Annotated[int | None, typer.Option(min=2, help="Take the first so many pictures.")] = None,
    seed: Seed = 0,
) -> None:
    """Make a task on which merging hurts: real pictures with small generated details, whose reading is the class.

    It is read from left to right, so learn it with --no-augment: mirrored pictures would have the wrong label.
    """
    labelled = with_details(
        read_images(data, size_px, limit=limit), seed=seed, marks=marks, side_px=side_px, contrast=contrast
    )
    write_images(out, labelled)
    classes = detail_classes(marks)
    recipe = TaskRecipe("details", classes, tuple(range(len(classes))))
    path = out.with_suffix(".json")
    write_atomically(path, json.dumps(dataclasses.asdict(recipe), indent=1))
    Console().print(f"written: {out} ({len(labelled)} pictures with generated details), {path}", soft_wrap=True)


def _merged(accuracy: Mapping[int, float], config: TuneConfig) -> Mapping[int, float]:
    """What of the vanilla model's accuracies holds where it is served itself, which does not prune."""
    return accuracy if config.reducer == "merging" else {0: accuracy[0]}


def _show(plan: Plan) -> None:
    """What each number is predicted to take, and what the tuned ones took."""
    known = {one.number: one for one in plan.tuned}
    table = Table("number", "predicted s", "took s", "error", "right at it", title="Plan", title_justify="left")
    for number, cost in sorted(plan.costs.items()):
        one = known.get(number)
        table.add_row(
            str(number),
            f"{cost.seconds if one is None else one.predicted_s:.1f}",
            "" if one is None else f"{one.seconds:.1f}",
            "" if one is None else f"{one.seconds / one.predicted_s - 1:+.0%}",
            "" if one is None else "given up" if one.accuracy is None else f"{one.accuracy:.1%}",
        )
    Console().print(table)
    every_s = sum(cost.seconds for number, cost in plan.costs.items())
    step = next_step(plan)
    Console().print(
        f"spent {plan.spent_s:.1f} s and {plan.stored_bytes} bytes; every number would take {every_s:.1f} s. "
        f"Next: {'nothing' if step.number is None else step.number} ({step.why}).",
        highlight=False,
        soft_wrap=True,
    )


def _table(store: WarmStore) -> None:
    """Every model's accuracy at every number, the best of each number marked."""
    cards = [store.card(name) for name in store.names()]
    best = profiled(cards).best()
    table = Table("model", *map(str, best), title="Right on the profiling set, by number", title_justify="left")
    for card in cards:
        shares = {number: f"{share:.1%}" for number, share in card.accuracy.items()}
        cells = [shares.get(number, "") + ("*" if name == card.name else "") for number, name in best.items()]
        table.add_row(card.name, *cells)
    Console(width=None if Console().is_terminal else 200).print(table)


def _say(line: str) -> None:
    Console(stderr=True).print(line, highlight=False, soft_wrap=True)
