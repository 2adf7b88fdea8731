"""The report's pictures as PNG bytes: originals beside reconstructions, and both attacks beside chance."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure

from isthmus.distill.figures import png

if TYPE_CHECKING:
    from isthmus.privacy.report import ModeSummary

DPI = 100
_INK, _ACCENT, _CHANCE = "#1d4ed8", "#b91c1c", "#78716c"


def draw(result: dict[str, Any], summaries: Sequence["ModeSummary"], out: Path) -> dict[str, bytes]:
    """Draw ``overview`` (every mode, one client, first seed), a grid per mode, ``membership`` and ``identification``.

    The clips shown are the first of each class of the first client.
    """
    base = next(cell for cell in result["cells"] if cell["kind"] == "baselines")
    shown = [
        cell
        for cell in result["cells"]
        if cell["kind"] == "mode"
        and cell["inversion"] is not None
        and (cell["client"], cell["seed"]) == (base["client"], base["seed"])
    ]
    originals = _load(out / base["pictures"])
    rows = {"the clips themselves": (originals["frames"], originals["spectrograms"])}
    mean = (originals["mean_frames"], originals["mean_spectrograms"])
    drawn = {}
    made = {}
    for cell in shown:
        arrays = _load(out / cell["pictures"])
        made[cell["mode"]] = (arrays["frames"], arrays["spectrograms"])
        drawn[f"mode-{cell['slug']}"] = _grid({**rows, cell["mode"]: made[cell["mode"]]})
    drawn["overview"] = _grid({**rows, "no upload: mean of the class": mean, **made})
    drawn["membership"] = _membership(summaries)
    drawn["identification"] = _identification(summaries)
    return drawn


def _load(path: Path) -> dict[str, Any]:
    with np.load(path, allow_pickle=False) as kept:
        return {key: kept[key] for key in kept.files}


def _grid(rows: dict[str, tuple[Any, Any]]) -> bytes:
    """Draw one line per entry: pictures on the left, spectrograms on the right."""
    count = len(next(iter(rows.values()))[0])
    figure = Figure(figsize=(1.02 * 2 * count + 1.8, 1.05 * len(rows) + 0.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    frames = _mosaic([np.clip(frames_EHWC, 0, 1) for frames_EHWC, _ in rows.values()], blank=1.0)
    left.imshow(frames, aspect="auto")
    spectrograms = _mosaic([each[:, ::-1, :, np.newaxis] for _, each in rows.values()], blank=np.nan)
    right.imshow(spectrograms[..., 0], aspect="auto", cmap="magma", vmin=-2.5, vmax=2.5)
    for axes in (left, right):
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
    labels = [name.replace(", ", ",\n").replace(": ", ":\n") for name in rows]
    left.set_yticks((np.arange(len(rows)) + 0.5) * frames.shape[0] / len(rows), labels, fontsize=7)
    left.tick_params(length=0)
    return png(figure, dpi=DPI)


def _mosaic(lines: Sequence[Any], blank: float) -> Any:
    """Arrange the pictures (E, H, W, C) of each line side by side, lines below each other, with thin gaps."""
    gap = ((0, 0), (1, 1), (1, 1), (0, 0))
    padded = [np.pad(np.asarray(line, np.float32), gap, constant_values=blank) for line in lines]
    return np.concatenate([np.concatenate(list(line), axis=1) for line in padded], axis=0)


def _membership(summaries: Sequence["ModeSummary"]) -> bytes:
    kinds = list(dict.fromkeys(kind for summary in summaries for kind in summary.membership))
    return _dots(
        [(summary.name, [summary.membership.get(kind) for kind in kinds]) for summary in summaries],
        kinds,
        "area under the curve: was this clip among those sent?",
    )


def _identification(summaries: Sequence["ModeSummary"]) -> bytes:
    rows = [
        (summary.name, [summary.inversion["sound_same_class"], summary.inversion["picture_same_class"]])
        for summary in summaries
        if summary.inversion is not None
    ]
    return _dots(rows, ["sound", "picture"], "reconstruction nearer to its own clip than to another of its class")


def _dots(rows: Sequence[tuple[str, Sequence[Any]]], kinds: Sequence[str], label: str) -> bytes:
    figure = Figure(figsize=(8.5, 0.34 * len(rows) + 1.6), layout="constrained")
    axes = figure.subplots()
    styles = ((_INK, "o"), (_ACCENT, "s"), ("#60a5fa", "o"), ("#fca5a5", "s"))
    for index, kind in enumerate(kinds):
        colour, marker = styles[index % len(styles)]
        for place, (_, values) in enumerate(rows):
            value = values[index]
            if value is not None and value.count:
                axes.errorbar(
                    value.mean,
                    place + 0.13 * (index - (len(kinds) - 1) / 2),
                    xerr=value.deviation,
                    color=colour,
                    marker=marker,
                    markersize=5,
                    capsize=2,
                    linestyle="none",
                    label=kind if place == 0 else None,
                )
    axes.axvline(0.5, color=_CHANCE, linestyle="--", linewidth=1)
    axes.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0.3, 1.03)
    axes.set_xlabel(f"{label} (dashed: chance)", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, frameon=False, loc="lower right")
    return png(figure, dpi=DPI)
