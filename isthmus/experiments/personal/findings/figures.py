"""The paper's figures 5.6 to 5.15 from cells, as PNG bytes, without pyplot's global state."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from isthmus.distill.figures import png
from isthmus.experiments.personal.cells.cells import Cell
from isthmus.experiments.personal.findings.paired import spread
from isthmus.experiments.personal.findings.tables import in_order, pick


def _panels(count: int, width: float = 4.6, height: float = 3.2) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width * count, height), layout="constrained")
    axes = [figure.add_subplot(1, count, place + 1) for place in range(count)]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.3)
    return figure, axes


def distillation_loss(cells: Sequence[Cell], methods: Sequence[str]) -> bytes:
    """Draw figures 5.6 to 5.9, 5.14 and 5.15: loss by epoch, one panel per client, mean over seeds."""
    clients = in_order(c.asked.client for c in cells)
    figure, axes = _panels(len(clients))
    for axis, client in zip(axes, clients, strict=True):
        for method in methods:
            curves = [c.losses for c in pick(cells, client=client, method=method) if c.losses]
            if curves:
                epochs = min(map(len, curves))
                mean = np.mean([curve[:epochs] for curve in curves], axis=0)
                axis.plot(range(1, epochs + 1), mean, label=method)
        axis.set(title=client, xlabel="epoch", ylabel="distillation loss")
    axes[0].legend(fontsize=8, frameon=False)
    return png(figure)


def selected_per_class(cells: Sequence[Cell], methods: Sequence[str], classes: Sequence[str]) -> bytes:
    """Draw figures 5.10 and 5.11: selected public clips per class, one panel per client, mean over seeds."""
    clients = in_order(c.asked.client for c in cells)
    figure, axes = _panels(len(clients))
    places = np.arange(len(classes))
    for axis, client in zip(axes, clients, strict=True):
        width = 0.8 / max(1, len(methods))
        for index, method in enumerate(methods):
            rows = [c.selected_per_class for c in pick(cells, client=client, method=method)]
            if rows:
                axis.bar(places + (index - (len(methods) - 1) / 2) * width, np.mean(rows, axis=0), width, label=method)
        axis.set_xticks(places, list(classes), fontsize=8, rotation=90 if len(classes) > 8 else 0)
        axis.set(title=client, ylabel="public clips selected")
    axes[0].legend(fontsize=8, frameon=False)
    return png(figure)


def accuracy_by(cells: Sequence[Cell], key: str, label: str) -> bytes:
    """Draw figures 5.12 and 5.13: accuracy against a setting of the upload, mean and standard deviation over seeds."""
    figure, (axis,) = _panels(1)
    for client in in_order(c.asked.client for c in cells):
        values = sorted({getattr(c.asked, key) for c in pick(cells, client=client)})
        found = [spread([100 * c.plain for c in pick(cells, client=client, **{key: value})]) for value in values]
        axis.errorbar(
            values, [f.mean for f in found], [f.deviation for f in found], marker="o", capsize=3, label=client
        )
    axis.set(xlabel=label, ylabel="accuracy, %")
    axis.legend(fontsize=8, frameon=False)
    return png(figure)


def accuracy_against_bytes(
    cells: Sequence[Cell], bytes_of: Mapping[str, Mapping[str, int]], knee: tuple[str, str]
) -> bytes:
    """Draw accuracy against bytes per clip for every ratio and number type, with the knee marked."""
    figure, (axis,) = _panels(1, 6.4, 3.6)
    for number_type, by_ratio in bytes_of.items():
        sizes = list(by_ratio.values())
        found = [spread([100 * c.accuracy[ratio][number_type] for c in cells]) for ratio in by_ratio]
        axis.plot(sizes, [each.mean for each in found], marker="o", label=number_type)
    ratio, number_type = knee
    level = spread([100 * c.accuracy[ratio][number_type] for c in cells]).mean
    axis.annotate(
        f"knee: ratio {ratio}, {number_type}",
        (bytes_of[number_type][ratio], level),
        xytext=(12, -24),
        textcoords="offset points",
        arrowprops={"arrowstyle": "->"},
        fontsize=8,
    )
    axis.set_xscale("log")
    axis.set(xlabel="bytes a clip (logarithmic)", ylabel="accuracy, %, mean over clients and seeds")
    axis.legend(fontsize=8, frameon=False)
    return png(figure)


def gain_by_client(cells: Sequence[Cell], methods: Sequence[str], baseline: str) -> bytes:
    """Draw accuracy minus the baseline's: a dot per client and seed, a bar for the mean."""
    figure, (axis,) = _panels(1, 7.5, 3.6)
    theirs = {(c.asked.client, c.asked.seed): c.plain for c in pick(cells, method=baseline)}
    for place, method in enumerate(methods):
        gains = [
            100 * (c.plain - theirs[c.asked.client, c.asked.seed])
            for c in pick(cells, method=method)
            if (c.asked.client, c.asked.seed) in theirs
        ]
        if gains:
            axis.bar(place, np.mean(gains), 0.7, alpha=0.5)
            axis.plot(place + np.linspace(-0.25, 0.25, len(gains)), gains, "o", markersize=3, color="black")
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set_xticks(range(len(methods)), list(methods), rotation=30, ha="right", fontsize=8)
    axis.set_ylabel(f"points over {baseline}")
    return png(figure)


def estimate_against_truth(pairs: Sequence[tuple[float, float]], estimate: str) -> bytes:
    """Draw a label-free estimate of the change against the true change in accuracy, one dot per update."""
    figure, (axis,) = _panels(1)
    axis.plot([100 * x for x, _ in pairs], [100 * y for _, y in pairs], "o", markersize=4, alpha=0.6)
    axis.axhline(0, color="black", linewidth=0.8)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set(xlabel=f"estimated change, points ({estimate})", ylabel="true change, points")
    return png(figure)
