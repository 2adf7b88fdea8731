"""Measures the grid of tuned number x number at inference over seeds, and every method on it, for `warmup evaluate`.

Every number is tuned once per seed: this is the method "exhaustive". What the planner would have tuned follows from the
same cells, because it depends only on costs and accuracies. The measurement can resume after each cell, and several
processes may share a folder. The profiling set chooses models, and the test set judges them.
"""

import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from isthmus import __version__
from isthmus.cloud.elastic.model.vit import ElasticViT
from isthmus.cloud.warmup.compare import comparison
from isthmus.cloud.warmup.compare.claims import Cells
from isthmus.cloud.warmup.compare.comparison import METHODS, Measured
from isthmus.cloud.warmup.planner import UNBOUNDED, BudgetTooSmall, Cost, Plan, next_step
from isthmus.cloud.warmup.profiling import accuracies, check_numbers, check_pictures
from isthmus.cloud.warmup.tuning import DEFAULT, Subject, TuneConfig, predicted_seconds, probe, start, tune
from isthmus.cloud.warmup.warming import MIDDLE, OnEpoch, Report, Warming, named, nearest, silent, unseen
from isthmus.data.cache.keys import digest
from isthmus.data.files import write_atomically
from isthmus.data.images import LabelledImages
from isthmus.data.made_by import made_by


@dataclass(frozen=True, eq=False)
class Grid:
    """The measurement in one folder. Each of ``seeds`` replaces ``config.seed``.

    ``time_share`` is the share of exhaustive's seconds that the planner may spend. ``storage_budget_bytes`` is for its
    models and the soups together. Raises ValueError for numbers beyond the model's tokens or without 0, and for test
    pictures that lack a class.
    """

    folder: Path
    subject: Subject
    test: LabelledImages
    numbers: tuple[int, ...]
    config: TuneConfig = DEFAULT
    seeds: tuple[int, ...] = (0, 1, 2)
    middle: int | None = None
    time_share: float = 1 / 3
    storage_budget_bytes: float = UNBOUNDED

    def __post_init__(self) -> None:
        check_pictures("the test set", self.test, self.subject.classes, self.subject.model)
        check_numbers(self.numbers, start(self.subject, self.config))
        if 0 not in self.numbers or len(self.seeds) < 1:
            raise ValueError("number 0 must be among the numbers, since all is compared with it; and a seed is needed")

    @cached_property
    def cells(self) -> Cells:
        """The cells of this measurement."""
        config = dataclasses.replace(self.config, seed=0)
        parts = [self.subject.key(config), self.subject.profiling.digest(), self.test.digest(), str(self.numbers)]
        return Cells(self.folder / "cells", digest(parts)[:16])

    def warming(self, seed: int) -> Warming:
        """Returns the warm-up of one seed, in a folder of its own."""
        config = dataclasses.replace(self.config, seed=seed)
        return Warming(self.folder / f"seed-{seed}", self.subject, self.numbers, config)

    def run(self, *, on_epoch: OnEpoch = unseen, report: Report = silent) -> dict[str, Any] | None:
        """Makes every missing cell that no other process is making, then the result, in result.json and result.md.

        Returns None if other processes are still making cells.
        """
        made_by(self.folder, report)
        cells = self.cells
        cells.make("probe", self._probe)
        for seed in self.seeds:
            cells.make(f"vanilla-{seed}", partial(self._vanilla, seed, on_epoch, report))
            for number in self.numbers:
                cells.make(f"tuned-{seed}-{number}", partial(self._tuned, seed, number, on_epoch, report))
        for seed in self.seeds:
            if self._ready(seed):
                cells.make(self._soups_name(seed), partial(self._soups, seed, report))
        # Check again: another process may have finished its cell meanwhile, and then nobody else writes the result.
        if not all(self._ready(seed) and cells.get(self._soups_name(seed)) is not None for seed in self.seeds):
            report("other processes are still making cells; the last of them writes the result")
            return None
        result = self.result()
        write_atomically(self.folder / "result.json", json.dumps(result, indent=1))
        write_atomically(self.folder / "result.md", markdown(result))
        return result

    def result(self) -> dict[str, Any]:
        """Returns the result of all cells. Raises KeyError if one is missing."""
        seeds = []
        for seed in self.seeds:
            vanilla, tuned, plan = self._vanilla_of(seed), self._tuned_of(seed), self.planned(seed)
            soups = {name: _measured(of) for name, of in self._cell(self._soups_name(seed))["kept"].items()}
            accuracy = comparison.by_method(
                vanilla, tuned, [one.number for one in plan.models], soups, len(self.subject.profiling)
            )
            seeds.append(
                {
                    "seed": seed,
                    "accuracy": accuracy,
                    "grid": {number: of.test for number, of in tuned.items()},
                    "vanilla": vanilla.test,
                    "tuned": [one.number for one in plan.models],
                    "soups": self._cell(self._soups_name(seed)),
                    "seconds": {number: of.seconds for number, of in tuned.items()},
                    "predicted_s": {number: cost.seconds for number, cost in plan.costs.items()},
                    **comparison.compared(accuracy, plan, tuned),
                }
            )
        subject = self.subject
        raw = {
            "what": "accuracy by number tuned for and number at inference, and by method",
            "task": subject.task,
            "reducer": self.config.reducer,
            "merge_order": subject.model.merge_order if self.config.reducer == "merging" else None,
            "classes": subject.classes,
            "pictures": {
                "learning": len(subject.learning),
                "profiling": len(subject.profiling),
                "test": len(self.test),
            },
            "numbers": self.numbers,
            "train": dataclasses.asdict(self.config.train),
            "target": self.config.target,
            "time_share": self.time_share,
            "storage_budget_bytes": None if self.storage_budget_bytes == UNBOUNDED else self.storage_budget_bytes,
            "code": made_by(self.folder, silent),
            "versions": {"isthmus": __version__, "torch": torch.__version__, "numpy": np.__version__},
            "seeds": seeds,
        }
        plain: dict[str, Any] = json.loads(json.dumps(raw))
        return plain

    @property
    def middle_number(self) -> int:
        """The planner's middle number."""
        return nearest(self.numbers, MIDDLE) if self.middle is None else self.middle

    def planned(self, seed: int) -> Plan:
        """Returns the planner's plan, replayed on the cells of this seed. Raises BudgetTooSmall."""
        raw = self._cell("probe")
        model = start(self.subject, self.config)
        own_bytes = sum(one.numel() * one.element_size() for one in model.parameters() if one.requires_grad)
        plan = Plan(
            self.middle_number,
            {number: Cost(float(raw["seconds"][str(number)]), own_bytes) for number in self.numbers},
            storage_budget_bytes=self.storage_budget_bytes,
            probe_s=float(raw["probe_s"]),
        )
        tuned = self._tuned_of(seed)
        try:
            return comparison.replayed(comparison.with_time_share(plan, tuned, self.time_share), tuned)
        except BudgetTooSmall as error:
            raise BudgetTooSmall(
                f"--time-share {self.time_share:g} of the time of tuning every number is too little: {error}"
            ) from error

    @property
    def _clock(self) -> Callable[[], float]:
        """The clock of costs. On a processor it is the process's own time, which other processes do not affect."""
        return time.process_time if self.subject.device.type == "cpu" else time.perf_counter

    def _probe(self) -> dict[str, Any]:
        measured = probe(self.subject, self.numbers, self.config, clock=self._clock)
        seconds = predicted_seconds(self.subject, measured, self.numbers, self.config)
        return {"seconds": {str(number): value for number, value in seconds.items()}, "probe_s": measured.seconds}

    def _vanilla(self, seed: int, on_epoch: OnEpoch, report: Report) -> dict[str, Any]:
        """Measures the vanilla model. For pruning, its predictors alone are trained, since it needs them."""
        warming = self.warming(seed)
        warming.keep_vanilla()
        model = start(self.subject, warming.config).eval().requires_grad_(False)
        if self.config.reducer == "pruning":
            config = dataclasses.replace(warming.config, frozen=("",))
            watched = named(f"seed {seed}, predictors", on_epoch)
            report(f"seed {seed}: predictors of the vanilla model")
            model, _ = tune(
                self.subject, self.middle_number, config, folder=warming.folder / "vanilla", on_epoch=watched
            )
        return self._both(model, 0.0)

    def _tuned(self, seed: int, number: int, on_epoch: OnEpoch, report: Report) -> dict[str, Any]:
        warming = self.warming(seed)
        tuning = warming.folder / "tuning"
        report(f"seed {seed}, number {number}")
        watched = named(f"seed {seed}, number {number}", on_epoch)
        model, seconds = tune(self.subject, number, warming.config, folder=tuning, on_epoch=watched, clock=self._clock)
        found = self._both(model, seconds)
        warming.save(model, number, seconds, _measured(found).profiling)
        for left in tuning.glob(f"{number}.*"):
            left.unlink()
        return found

    def _soups_name(self, seed: int) -> str:
        """Returns the name of the cell of soups. It depends on the planner's choice, since budgets may change."""
        chosen = digest([str([one.number for one in self.planned(seed).models]), str(self.storage_budget_bytes)])
        return f"soups-{seed}-{chosen[:8]}"

    def _soups(self, seed: int, report: Report) -> dict[str, Any]:
        """Averages the planner's models in a folder of their own, like `warmup ensemble`. Measures the kept soups."""
        plan = self.planned(seed)
        grid, chosen = self.warming(seed), self.warming(seed)
        chosen = dataclasses.replace(chosen, folder=grid.folder / self._soups_name(seed))
        for name in ["vanilla", *(f"tuned-{one.number}" for one in plan.models)]:
            card = grid.store.card(name)
            chosen.store.save(
                name,
                grid.store.load(name),
                kind=card.kind,
                number=card.number,
                heads=card.heads,
                accuracy=self._accuracy_of(name, seed),
                pictures=len(self.subject.profiling),
                seconds=card.seconds,
            )
        found = chosen.ensemble(self.storage_budget_bytes - plan.stored_bytes, report) if plan.models else []
        kept = [name for name in chosen.store.names() if name.startswith("soup-")]
        return {
            "found": [dataclasses.asdict(one) for one in found],
            "kept": {name: self._both(chosen.model(name), 0.0, chosen.store.card(name).accuracy) for name in kept},
            "why_stopped": next_step(plan).why,
        }

    def _both(self, model: ElasticViT, seconds: float, profiling: Mapping[int, float] | None = None) -> dict[str, Any]:
        """Measures accuracy at every number on both sets."""
        subject = self.subject
        sets = {
            "profiling": profiling
            or accuracies(model, subject.pixels, subject.profiling, self.numbers, device=subject.device),
            "test": accuracies(model, subject.pixels, self.test, self.numbers, device=subject.device),
        }
        by_set = {name: {str(number): share for number, share in of.items()} for name, of in sets.items()}
        return {**by_set, "seconds": seconds}

    def _ready(self, seed: int) -> bool:
        names = ["probe", f"vanilla-{seed}", *(f"tuned-{seed}-{number}" for number in self.numbers)]
        return all(self.cells.get(name) is not None for name in names)

    def _cell(self, name: str) -> dict[str, Any]:
        value = self.cells.get(name)
        if value is None:
            raise KeyError(f"cell {name} is missing")
        return value

    def vanilla_accuracy(self, seed: int) -> Mapping[int, float]:
        """Returns the accuracy on the profiling set, by number. Raises KeyError if the cell is missing."""
        return self._vanilla_of(seed).profiling

    def _vanilla_of(self, seed: int) -> Measured:
        return _measured(self._cell(f"vanilla-{seed}"))

    def _tuned_of(self, seed: int) -> dict[int, Measured]:
        return {number: _measured(self._cell(f"tuned-{seed}-{number}")) for number in self.numbers}

    def _accuracy_of(self, name: str, seed: int) -> Mapping[int, float]:
        cell = f"vanilla-{seed}" if name == "vanilla" else f"tuned-{seed}-{name.removeprefix('tuned-')}"
        return _measured(self._cell(cell)).profiling


def _measured(raw: Mapping[str, Any]) -> Measured:
    profiling, test = (
        {int(number): float(share) for number, share in raw[name].items()} for name in ("profiling", "test")
    )
    return Measured(profiling, test, float(raw["seconds"]))


def markdown(result: Mapping[str, Any]) -> str:
    """Formats the result: accuracy by method and number, as mean (range) over seeds, then the comparison."""
    seeds: Sequence[Mapping[str, Any]] = result["seeds"]
    numbers = [str(number) for number in result["numbers"]]
    what = "test accuracy by number at inference, mean (least to most)"
    lines = [
        f"### {result['task']}, {result['reducer']}: {what} over {len(seeds)} seeds",
        "",
        f"| method | {' | '.join(numbers)} | mean | of exhaustive | seconds |",
        f"| --- |{' --- |' * (len(numbers) + 3)}",
    ]
    for method in METHODS:
        shares = [[seed["accuracy"][method][number] for seed in seeds] for number in numbers]
        means = [seed["mean_accuracy"][method] for seed in seeds]
        ratios = [seed["of_exhaustive"][method] for seed in seeds]
        lines.append(
            f"| {method} | {' | '.join(_spread(of) for of in shares)} | {_spread(means)} "
            f"| {statistics.fmean(ratios):.3f} ({min(ratios):.3f}) | {_seconds(method, seeds)} |"
        )
    lines += ["", "| | prodigy | prodigy+soups |", "| --- | --- | --- |"]
    for label, figure in (
        ("smallest share won back where vanilla loses 3 points or more", _least_won_back),
        ("points lost at number 0, worst seed", _most_lost),
    ):
        lines.append(f"| {label} | {figure('prodigy', seeds)} | {figure('prodigy+soups', seeds)} |")
    costs = [seed["cost_share"] for seed in seeds]
    lines += [
        "",
        f"Planned cost: {statistics.fmean(costs):.3f} of exhaustive's (largest {max(costs):.3f}); tuned: "
        + "; ".join(f"seed {seed['seed']}: {', '.join(map(str, seed['tuned']))}" for seed in seeds)
        + ".",
        f"The vanilla model loses up to {100 * max(seed['vanilla_loses_most'] for seed in seeds):.1f} points.",
    ]
    return "\n".join(lines) + "\n"


def _spread(shares: Sequence[float]) -> str:
    mean, least, most = 100 * statistics.fmean(shares), 100 * min(shares), 100 * max(shares)
    return f"{mean:.1f}" if least == most else f"{mean:.1f} ({least:.1f} to {most:.1f})"


def _seconds(method: str, seeds: Sequence[Mapping[str, Any]]) -> str:
    if method == "exhaustive":
        return f"{statistics.fmean(seed['exhaustive_s'] for seed in seeds):.0f}"
    if method == "maxprune":
        return f"{statistics.fmean(seed['seconds'][max(seed['seconds'], key=int)] for seed in seeds):.0f}"
    return f"{statistics.fmean(seed['planned_s'] for seed in seeds):.0f}" if method.startswith("prodigy") else "0"


def _least_won_back(method: str, seeds: Sequence[Mapping[str, Any]]) -> str:
    shares = [share for seed in seeds for share in seed["won_back"][method].values()]
    return f"{min(shares):.2f}" if shares else "vanilla never loses that much"


def _most_lost(method: str, seeds: Sequence[Mapping[str, Any]]) -> str:
    return f"{100 * max(seed['cost_at_0'][method] for seed in seeds):.1f}"
