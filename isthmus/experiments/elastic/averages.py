"""Averages of two tuned models by fixed weights (table 4.1 of Prodigy).

Two models are tuned, each for its number of merges. Their weights are averaged with a share from 0 to 1 of the second,
and every average is tested at some numbers. If a mixture beats both ends, the ensembler has something to win.
"""

import dataclasses
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from isthmus.cloud.elastic.model.vit import ElasticViT
from isthmus.cloud.warmup.profiling import accuracies, check_numbers, check_pictures
from isthmus.cloud.warmup.soup import average
from isthmus.cloud.warmup.tuning import Subject, TuneConfig, start, tensors_of_model, tune
from isthmus.data.files import write_atomically
from isthmus.data.images import LabelledImages
from isthmus.data.made_by import made_by
from isthmus.distill.figures import png
from isthmus.experiments.elastic.kept import read_cell
from isthmus.experiments.elastic.spread import in_points

Report = Callable[[str], None]
SHARES: Final = tuple(tenth / 10 for tenth in range(11))


@dataclass(frozen=True, eq=False)
class Sweep:
    """Two numbers to tune for, numbers to test at, and the pictures.

    Raises ValueError for other than two numbers, numbers beyond the model's tokens, and test pictures of other classes.
    """

    subject: Subject
    test: LabelledImages
    tuned: tuple[int, ...]
    numbers: tuple[int, ...]
    config: TuneConfig
    shares: tuple[float, ...] = SHARES

    def __post_init__(self) -> None:
        check_pictures("the test set", self.test, self.subject.classes, self.subject.model)
        check_numbers((*self.tuned, *self.numbers), start(self.subject, self.config))
        if len(self.tuned) != 2 or self.tuned[0] == self.tuned[1]:
            raise ValueError(f"numbers {', '.join(map(str, self.tuned))}: two different ones to tune for are needed")

    def key(self) -> str:
        """Returns what two sweeps with comparable cells share."""
        config = dataclasses.replace(self.config, seed=0)
        return f"{self.subject.key(config)} {self.test.digest()} {self.tuned} {self.numbers} {self.shares}"


def run(sweep: Sweep, *, seeds: Sequence[int], out: Path, report: Report) -> dict[str, Any]:
    """Tunes and tests what is missing, writes ``out/result.json``, ``.md`` and a picture, and returns the result."""
    made = made_by(out, report)
    cells = []
    for seed in seeds:
        path = out / "cells" / f"{seed}.json"
        if not path.is_file():
            cell = {"seed": seed, "accuracy": _cell(sweep, seed, out, report)}
            write_atomically(path, json.dumps({**cell, "key": sweep.key()}, indent=1))
        cells.append(read_cell(path, sweep.key(), under="key"))
    result: dict[str, Any] = {
        "what": "averages of two tuned models by fixed weights",
        "task": sweep.subject.task,
        "tuned": list(sweep.tuned),
        "numbers": list(sweep.numbers),
        "shares": list(sweep.shares),
        "pictures": {"learning": len(sweep.subject.learning), "test": len(sweep.test)},
        "train": dataclasses.asdict(sweep.config.train),
        "target": sweep.config.target,
        "merge_order": sweep.subject.model.merge_order,
        "seeds": list(seeds),
        "code": made,
        "torch": torch.__version__,
        "cells": cells,
    }
    plain: dict[str, Any] = json.loads(json.dumps(result))
    write_atomically(out / "result.json", json.dumps(plain, indent=1))
    write_atomically(out / "result.md", markdown(plain))
    draw(plain, out / "averages.png")
    return plain


def _cell(sweep: Sweep, seed: int, out: Path, report: Report) -> dict[str, dict[str, float]]:
    """Returns the test accuracy by share and number, and of the vanilla model."""
    subject, config = sweep.subject, dataclasses.replace(sweep.config, seed=seed)
    models = []
    for number in sweep.tuned:
        models.append(tune(subject, number, config, folder=out / f"tuning-{seed}")[0])
        report(f"seed {seed}: tuned for {number} merges")
    states = {str(place): tensors_of_model(model) for place, model in enumerate(models)}

    def tested(model: ElasticViT) -> dict[str, float]:
        found = accuracies(model, subject.pixels, sweep.test, sweep.numbers, device=subject.device)
        return {str(number): share for number, share in found.items()}

    found = {"vanilla": tested(subject.model)}
    mixed = start(subject, config).eval().requires_grad_(False)
    for share in sweep.shares:
        weights = {place: part for place, part in (("0", 1 - share), ("1", share)) if part > 0}
        tensors = average(states, weights)
        mixed.vit.load_state_dict({name: tensors[name] for name in mixed.vit.state_dict()})
        found[f"{share:g}"] = tested(mixed)
    report(f"seed {seed}: {len(sweep.shares)} averages tested")
    return found


def markdown(result: Mapping[str, Any]) -> str:
    """Returns the table: accuracy by share and number, and the best mixture over the better end, in pairs."""
    cells, numbers = result["cells"], [str(number) for number in result["numbers"]]
    shares = [f"{share:g}" for share in result["shares"]]
    low, high = result["tuned"]
    lines = [f"| share of the model tuned for {high} | {' | '.join(f'{number} merges' for number in numbers)} |"]
    lines.append(f"| --- |{' --- |' * len(numbers)}")
    for share in ("vanilla", *shares):
        means = [_mean(cells, share, number) for number in numbers]
        label = {"vanilla": "vanilla weights", shares[0]: f"0 (tuned for {low})"}.get(share, share)
        lines.append(f"| {label} | {' | '.join(f'{100 * mean:.2f}' for mean in means)} |")
    half = min(shares[1:-1], key=lambda share: abs(float(share) - 0.5), default=None)
    if half is not None:
        row = [in_points(_over_ends(cells, half, shares, number)) for number in numbers]
        lines.append(f"| {half}, over the better end, points | {' | '.join(row)} |")
        row = []
        for number in numbers:
            place = max(shares[1:-1], key=lambda share: _mean(cells, share, number))
            row.append(f"{place}: {in_points(_over_ends(cells, place, shares, number))}")
        lines.append(f"| best mixture in hindsight, the same | {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


def _mean(cells: Sequence[Mapping[str, Any]], share: str, number: str) -> float:
    return statistics.fmean(cell["accuracy"][share][number] for cell in cells)


def _over_ends(cells: Sequence[Mapping[str, Any]], share: str, shares: Sequence[str], number: str) -> list[float]:
    """Returns, for each seed, the gain of a mixture over the end that is better on the mean of all seeds."""
    end = max((shares[0], shares[-1]), key=lambda one: _mean(cells, one, number))
    return [cell["accuracy"][share][number] - cell["accuracy"][end][number] for cell in cells]


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Draws accuracy by share, a curve per number at inference: mean and range over seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    shares = [f"{share:g}" for share in result["shares"]]
    for number in map(str, result["numbers"]):
        of = 100 * np.array([[cell["accuracy"][share][number] for share in shares] for cell in result["cells"]])
        axes.plot(result["shares"], of.mean(axis=0), marker="o", label=f"{number} merges")
        axes.fill_between(result["shares"], of.min(axis=0), of.max(axis=0), alpha=0.15)
    low, high = result["tuned"]
    axes.set(xlabel=f"share of the model tuned for {high} (the rest: {low})", ylabel="accuracy, %")
    axes.grid(alpha=0.3)
    axes.legend()
    write_atomically(path, png(figure))
