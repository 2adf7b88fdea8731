"""Draws a grid's result like figures 4.7 (accuracy by method), 4.3 (heat map), 4.4 (best tuned number) and 4.8 (cost of
tuning) of J. Chen's thesis (PolyU, 2025)."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from isthmus.cloud.warmup.compare.comparison import METHODS
from isthmus.data.files import write_atomically
from isthmus.distill.figures import png


def draw(result: Mapping[str, Any], folder: Path) -> list[Path]:
    """Writes four PNG files with means over the seeds of a grid's result. Returns their paths."""
    from matplotlib.figure import Figure

    seeds: Sequence[Mapping[str, Any]] = result["seeds"]
    numbers: list[int] = list(result["numbers"])
    title = f"{result['task']}, {result['reducer']}"
    grid_TI = 100 * np.array(
        [
            [statistics.fmean(seed["grid"][str(tuned)][str(number)] for seed in seeds) for number in numbers]
            for tuned in numbers
        ]
    )
    written = []

    def save(figure: Any, name: str) -> None:
        figure.suptitle(title)
        figure.tight_layout()
        write_atomically(folder / name, png(figure))
        written.append(folder / name)

    figure = Figure(figsize=(7, 4.5))
    axis = figure.subplots()
    for method in METHODS:
        by_seed = np.array([[seed["accuracy"][method][str(number)] for number in numbers] for seed in seeds])
        axis.plot(numbers, 100 * by_seed.mean(axis=0), marker="o", label=method)
        axis.fill_between(numbers, 100 * by_seed.min(axis=0), 100 * by_seed.max(axis=0), alpha=0.15)
    axis.set(xlabel="reduction number at inference", ylabel="accuracy, %", title="Accuracy by method")
    axis.grid(alpha=0.3)
    axis.legend()
    save(figure, "accuracy_by_method.png")

    figure = Figure(figsize=(6, 5))
    axis = figure.subplots()
    shown = axis.imshow(grid_TI, origin="lower", aspect="auto")
    axis.set(xlabel="number at inference", ylabel="number tuned for", title="Accuracy, %")
    axis.set_xticks(range(len(numbers)), [str(number) for number in numbers])
    axis.set_yticks(range(len(numbers)), [str(number) for number in numbers])
    for row, of in enumerate(grid_TI):
        for column, value in enumerate(of):
            axis.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize="x-small")
    figure.colorbar(shown)
    save(figure, "tuned_by_inference.png")

    figure = Figure(figsize=(6, 4))
    axis = figure.subplots()
    best = [numbers[int(place)] for place in grid_TI.argmax(axis=0)]
    axis.plot(numbers, best, marker="o")
    axis.set(xlabel="number at inference", ylabel="best number to tune for", title="Best tuned number")
    axis.grid(alpha=0.3)
    save(figure, "best_tuned_number.png")

    figure = Figure(figsize=(6, 4))
    axis = figure.subplots()
    costs = {
        "exhaustive": statistics.fmean(seed["exhaustive_s"] for seed in seeds),
        "planned": statistics.fmean(seed["planned_s"] for seed in seeds),
        "maxprune": statistics.fmean(seed["seconds"][str(max(numbers))] for seed in seeds),
    }
    axis.bar(list(costs), list(costs.values()))
    axis.set(ylabel="seconds", title="Cost of tuning")
    axis.grid(alpha=0.3, axis="y")
    save(figure, "tuning_cost.png")
    return written
