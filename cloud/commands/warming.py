"""The work of ``isthmus elastic warmup``: plan, run, ensemble, evaluate, and pictures on which merging hurts."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import typer

from isthmus.cloud.commands.options import DetailOptions, WarmupOptions, ascending
from isthmus.cloud.elastic.prepare.inputs import opened, pictures_of, split_off
from isthmus.cloud.elastic.scheduling.merge_order import MergeOrder, order_for
from isthmus.cloud.elastic.tasks.recipes import TaskRecipe, read_recipe
from isthmus.cloud.elastic.warm.profiled import VANILLA
from isthmus.cloud.elastic.warm.store import WarmStore, profiled
from isthmus.cloud.warmup.compare import figures, grid
from isthmus.cloud.warmup.compare.grid import Grid
from isthmus.cloud.warmup.planner import UNBOUNDED, Plan, next_step
from isthmus.cloud.warmup.profiling import check_numbers, largest_number
from isthmus.cloud.warmup.tuning import TUNE, Subject, TuneConfig, start
from isthmus.cloud.warmup.vanilla import save_task, vanilla_subject
from isthmus.cloud.warmup.warming import Warming, named, order_of_models
from isthmus.command_line import listed, print_table
from isthmus.data.files import write_atomically
from isthmus.data.images import Columns, read_images, write_images
from isthmus.data.made_by import made_by
from isthmus.data.synthetic.details import detail_classes, with_details
from isthmus.distill.training.loop import pick_device, set_threads
from isthmus.distill.training.progress import EpochBars, bars


@dataclass(frozen=True)
class Asked:
    """What the options of plan, run, ensemble and evaluate ask for. Each part is made when it is first needed."""

    options: WarmupOptions

    @cached_property
    def config(self) -> TuneConfig:
        """How to tune."""
        options = self.options
        train = dataclasses.replace(
            TUNE,
            epochs=options.epochs,
            batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            augment=options.augment,
            warmup_epochs=options.epochs / 10,  # Adam's first steps are long, however little there is to mend
        )
        return TuneConfig(train, options.reducer, tuple(listed(options.frozen)), options.seed, options.target)

    @property
    def columns(self) -> Columns:
        """Where the data set holds pictures and labels."""
        return Columns(self.options.image_column, self.options.label_column)

    @cached_property
    def recipe(self) -> TaskRecipe:
        """The task. Raises ValueError."""
        return read_recipe(self.options.task)

    @cached_property
    def numbers(self) -> tuple[int, ...]:
        """The reduction numbers that were given, ascending; none if the model is to decide. Raises a usage error."""
        return ascending(self.options.numbers, "--numbers")

    @cached_property
    def merge_order(self) -> MergeOrder:
        """The order of merging: that of the folder's models if it has some. Raises OtherOrder, StoreError."""
        folder = self.options.out
        return order_for(self.options.merge_order, {str(folder): order_of_models(folder)})

    @cached_property
    def subject(self) -> Subject:
        """The model with its pictures. It learns the task first if asked to, with a progress bar, and resumably."""
        options = self.options
        recipe, config, _ = self.recipe, self.config, self.numbers  # refused before any work
        set_threads(options.threads)
        elastic, pixel = opened(options.model, options.pixels, merge_order=self.merge_order)
        learning = recipe.apply(pictures_of(options.data, pixel, options.limit, options.seed, self.columns))
        if options.profiling is None:
            learning, profiling = split_off(learning, options.held, options.seed)
        else:
            profiling = recipe.apply(pictures_of(options.profiling, pixel, None, options.seed, self.columns))
        with bars() as progress:
            return vanilla_subject(
                elastic,
                pixel,
                recipe,
                learning,
                profiling,
                config,
                epochs=options.vanilla_epochs,
                folder=options.out,
                device=pick_device(options.device),
                on_epoch=named("vanilla", EpochBars(progress, len(learning), "pictures")),
            )

    @cached_property
    def chosen_numbers(self) -> tuple[int, ...]:
        """The reduction numbers: as given, or ten from 0 to the largest. Raises ValueError for one that cannot be."""
        model = start(self.subject, self.config)
        most = largest_number(model)
        return check_numbers(self.numbers or tuple(round(most * tenth / 9) for tenth in range(10)), model)

    @property
    def warming(self) -> Warming:
        """The tuning in its folder."""
        return Warming(self.options.out, self.subject, self.chosen_numbers, self.config)

    @property
    def storage_bytes(self) -> float:
        """Bytes that models may take; infinite if there is no limit."""
        budget = self.options.storage_budget_bytes
        return UNBOUNDED if budget is None else budget

    def plan(self, time_budget_s: float | None) -> Plan:
        """Return the plan in the folder, made if there is none yet."""
        return self.warming.begin(
            middle=self.options.middle,
            time_budget_s=UNBOUNDED if time_budget_s is None else time_budget_s,
            storage_budget_bytes=self.storage_bytes,
        )


def make_plan(options: WarmupOptions, time_budget_s: float | None) -> None:
    """Probe, plan and print the plan."""
    _show(Asked(options).plan(time_budget_s))


def carry_out(options: WarmupOptions, time_budget_s: float | None) -> None:
    """Tune what the plan chooses, profile the models, and write the task."""
    asked = Asked(options)
    plan, warming = asked.plan(time_budget_s), asked.warming
    with bars() as progress:
        watch = EpochBars(progress, len(asked.subject.learning), "pictures")
        plan = warming.run(plan, on_epoch=watch, report=_say)
    warming.profile(_say)
    path = save_task(asked.subject, asked.recipe, _merged(warming.table()[VANILLA], asked.config), options.out / "task")
    _show(plan)
    _print_models(warming.store)
    typer.echo(f"written: {warming.store.path}, {path}")


def make_soups(options: WarmupOptions) -> None:
    """Average tuned models' weights, keep the soups that pay, and print them. Raises ValueError without a plan."""
    asked = Asked(options)
    warming = asked.warming
    if warming.plan() is None:
        raise ValueError(f"{options.out} holds no plan: run 'isthmus elastic warmup run' first")
    found = warming.ensemble(asked.storage_bytes, _say)
    print_table(
        ("number", "best single", "accuracy", "soup", "accuracy", "made of"),
        [
            (
                str(one.number),
                one.best_member,
                f"{one.best_accuracy:.2%}",
                one.method,
                f"{one.accuracy:.2%}",
                ", ".join(f"{name} {share:.2f}" for name, share in sorted(one.shares.items())),
            )
            for one in found
        ],
        title="Soups",
    )
    _print_models(warming.store)


def evaluate(
    options: WarmupOptions, *, test: Path, seeds: tuple[int, ...], time_share: float, test_limit: int | None
) -> None:
    """Tune every number for every seed, compare the methods, and write the result once all cells are there."""
    asked = Asked(options)
    made_by(options.out, _say)  # before anything is learned in that folder
    subject, out = asked.subject, options.out
    judged = asked.recipe.apply(pictures_of(test, subject.pixels, test_limit, options.seed, asked.columns))
    measured = Grid(
        out,
        subject,
        judged,
        asked.chosen_numbers,
        asked.config,
        seeds,
        middle=options.middle,
        time_share=time_share,
        storage_budget_bytes=asked.storage_bytes,
    )
    with bars() as progress:
        watch = EpochBars(progress, len(subject.learning), "pictures")
        result = measured.run(on_epoch=watch, report=_say)
    if result is None:
        return
    written = figures.draw(result, out / "pictures")
    save_task(subject, asked.recipe, _merged(measured.vanilla_accuracy(seeds[0]), asked.config), out / "task")
    typer.echo(grid.markdown(result))
    typer.echo(f"written: {out / 'result.json'}, {out / 'result.md'}, {len(written)} pictures")


def make_details(options: DetailOptions) -> None:
    """Write pictures with generated details, and the task that reads them."""
    labelled = with_details(
        read_images(
            options.data,
            options.size_px,
            limit=options.limit,
            columns=Columns(options.image_column, options.label_column),
        ),
        seed=options.seed,
        marks=options.marks,
        side_px=options.side_px,
        contrast=options.contrast,
    )
    write_images(options.out, labelled)
    classes = detail_classes(options.marks)
    recipe = TaskRecipe("details", classes, tuple(range(len(classes))))
    path = options.out.with_suffix(".json")
    write_atomically(path, json.dumps(dataclasses.asdict(recipe), indent=1))
    typer.echo(f"written: {options.out} ({len(labelled)} pictures with generated details), {path}")


def _merged(accuracy: Mapping[int, float], config: TuneConfig) -> Mapping[int, float]:
    """Return the accuracies that hold for the vanilla model when it is served itself: it does not prune."""
    return accuracy if config.reducer == "merging" else {0: accuracy[0]}


def _show(plan: Plan) -> None:
    """Print how long each number is predicted to take, and how long the tuned ones took."""
    tuned = {one.number: one for one in plan.tuned}
    rows = []
    for number, cost in sorted(plan.costs.items()):
        one = tuned.get(number)
        if one is None:
            rows.append((str(number), f"{cost.seconds:.1f}", "", "", ""))
            continue
        accuracy = "given up" if one.accuracy is None else f"{one.accuracy:.1%}"
        error = f"{one.seconds / one.predicted_s - 1:+.0%}"
        rows.append((str(number), f"{one.predicted_s:.1f}", f"{one.seconds:.1f}", error, accuracy))
    print_table(("number", "predicted s", "took s", "error", "accuracy at it"), rows, title="Plan")
    every_s = sum(cost.seconds for cost in plan.costs.values())
    step = next_step(plan)
    typer.echo(
        f"spent {plan.spent_s:.1f} s and {plan.stored_bytes} bytes; every number would take {every_s:.1f} s. "
        f"Next: {'nothing' if step.number is None else step.number} ({step.why})."
    )


def _print_models(store: WarmStore) -> None:
    """Print every model's accuracy at every number, with the best of each number marked."""
    cards = [store.card(name) for name in store.names()]
    best = profiled(cards).best()
    rows = []
    for card in cards:
        shares = {number: f"{share:.1%}" for number, share in card.accuracy.items()}
        marked = (shares.get(number, "") + ("*" if name == card.name else "") for number, name in best.items())
        rows.append((card.name, *marked))
    print_table(("model", *map(str, best)), rows, title="Accuracy on the profiling set, by number")


def _say(line: str) -> None:
    typer.echo(line, err=True)
