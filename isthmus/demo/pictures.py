"""The report's pictures: each function turns plain data into PNG bytes, without pyplot's global state."""

from collections.abc import Mapping, Sequence
from typing import Final

import librosa
import librosa.display
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from isthmus.demo.outcome import ClientOutcome, KeptClip, readable_bytes
from isthmus.demo.stages import StageRecord
from isthmus.distill.figures import png

COLOURS: Final = ("#94a3b8", "#1d4ed8", "#60a5fa", "#15803d", "#b45309", "#7c3aed")


def _one(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _grouped_bars(
    axes: Axes, groups: Sequence[str], series: Mapping[str, Sequence[float]], label: str = "{:.0f}"
) -> None:
    width = 0.8 / max(1, len(series))
    places = np.arange(len(groups), dtype=np.float64)
    for index, (name, values) in enumerate(series.items()):
        offset = (index - (len(series) - 1) / 2) * width
        bars = axes.bar(places + offset, values, width * 0.92, label=name, color=COLOURS[index % len(COLOURS)])
        axes.bar_label(bars, labels=[label.format(value) for value in values], fontsize=8, padding=2)
    axes.set_xticks(places, list(groups))


def accuracy(clients: Sequence[ClientOutcome]) -> bytes:
    """Draw accuracy in percent, per client and way of answering."""
    figure, axes = _one(7.5, 3.6)
    names = [way.name for way in clients[0].answering]
    series = {name: [100 * client.answering[i].accuracy for client in clients] for i, name in enumerate(names)}
    _grouped_bars(axes, [f"{client.name} ({client.test_clips} clips)" for client in clients], series)
    axes.set_ylabel("accuracy, %")
    axes.set_ylim(0, 112)
    axes.legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.1), frameon=False)
    return png(figure)


def by_class(client: ClientOutcome, classes: Sequence[str]) -> bytes:
    """Draw the share of clips of each class that a client's device answered rightly, in each of its states."""
    figure, axes = _one(7.5, 2.8)
    counts = {way: client.tested.by_class(way) for way in client.ways}
    labels = list(counts[client.ways[0]])
    series = {
        way.replace("_", " "): [100 * found[label][0] / found[label][1] for label in labels]
        for way, found in counts.items()
    }
    _grouped_bars(axes, [f"{classes[label]} ({counts[client.ways[0]][label][1]} clips)" for label in labels], series)
    axes.set_ylabel("right, %")
    axes.set_ylim(0, 118)
    axes.set_title(client.name, fontsize=10, parse_math=False)
    axes.legend(fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.14), frameon=False)
    return png(figure)


def bytes_per_clip(clients: Sequence[ClientOutcome]) -> bytes:
    """Draw bytes per clip, raw and as features, on a logarithmic axis."""
    figure, axes = _one(7.5, 2.8)
    client = clients[0]
    rows = [("raw clip", client.raw_bytes_per_clip)]
    rows += [(way.name, way.bytes_up) for way in client.answering if way.bytes_up > 0]
    rows.append(("prototypes, per selection clip", client.prototype_bytes / max(1, client.selection_clips)))
    names, counts = [name for name, _ in rows], [count for _, count in rows]
    bars = axes.barh(names, counts, color=["#b91c1c", *["#1d4ed8"] * (len(rows) - 1)])
    axes.bar_label(bars, labels=[readable_bytes(count) for count in counts], padding=3, fontsize=9)
    axes.set_xscale("log")
    axes.set_xlim(right=max(counts) * 6)
    axes.invert_yaxis()
    axes.set_xlabel("bytes (logarithmic)")
    return png(figure)


def selected(clients: Sequence[ClientOutcome], classes: Sequence[str]) -> bytes:
    """Draw how many public clips of each class were selected for each client."""
    figure, axes = _one(7.5, 3.0)
    _grouped_bars(axes, classes, {client.name: client.selected_per_class for client in clients})
    axes.set_ylabel("public clips selected")
    axes.legend(fontsize=8, frameon=False)
    return png(figure)


def prototypes(client: ClientOutcome, classes: Sequence[str]) -> bytes:
    """Draw everything that one device sent of its selection clips: a row per prototype, a column per class."""
    count = len(client.sizes_K)
    figure = Figure(figsize=(6.0, max(1.8, 0.26 * count + 1.1)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(client.prototypes_KC, vmin=0, vmax=1, cmap="YlOrBr", aspect="auto")
    axes.set_xticks(range(len(classes)), list(classes))
    axes.set_yticks(range(count), [f"{size} clips" for size in client.sizes_K], fontsize=8)
    for row, values_C in enumerate(client.prototypes_KC):
        for column, value in enumerate(values_C):
            colour = "white" if value > 0.6 else "#44403c"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)
    axes.set_title(f"{client.name}: {count} prototypes", fontsize=10)
    figure.colorbar(image, ax=axes, label="probability", shrink=0.8)
    return png(figure)


def kept(clip: KeptClip, shown: int = 5) -> bytes:
    """Draw a clip that stayed on its device: some frames above, its sound as a mel spectrogram below."""
    figure = Figure(figsize=(6.0, 3.4), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1, 1.3), squeeze=False).flat
    places = np.linspace(0, len(clip.pictures_KHWC) - 1, shown).astype(int)
    for axes, place in zip(above.subplots(1, shown), places, strict=True):
        axes.imshow(clip.pictures_KHWC[place])
        axes.set_axis_off()
    power_MT = librosa.feature.melspectrogram(y=clip.waveform_T, sr=clip.sample_rate_hz, n_mels=80)
    axes = below.subplots()
    librosa.display.specshow(
        librosa.power_to_db(power_MT, ref=np.max),
        sr=clip.sample_rate_hz,
        x_axis="time",
        y_axis="mel",
        cmap="magma",
        ax=axes,
    )
    axes.set(xlabel="seconds", ylabel="hertz (mel scale)")
    above.suptitle(clip.name, fontsize=10, parse_math=False)
    return png(figure)


def losses(curves: Mapping[str, Sequence[float]]) -> bytes:
    """Draw one small plot per training, because their losses are not comparable."""
    columns = min(3, len(curves))
    rows = -(-len(curves) // columns)
    figure = Figure(figsize=(2.7 * columns, 2.1 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(curves) :]:
        axes.set_visible(False)
    for axes, (name, values) in zip(grid.flat, curves.items(), strict=False):
        axes.plot(range(1, len(values) + 1), values, marker="o", markersize=3, color="#1d4ed8")
        axes.set_title(name, fontsize=9)
        axes.tick_params(labelsize=7)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("epoch", fontsize=9)
    return png(figure)


def wall_times(stages: Sequence[StageRecord]) -> bytes:
    """Draw the wall time of each stage. Stages reused from an earlier run are pale."""
    figure, axes = _one(7.5, 0.35 * len(stages) + 1.0)
    bars = axes.barh(
        [stage.name for stage in stages],
        [stage.seconds for stage in stages],
        color=["#cbd5e1" if stage.reused else "#1d4ed8" for stage in stages],
    )
    axes.bar_label(
        bars, labels=[f"{s.seconds:.1f} s{' (reused)' if s.reused else ''}" for s in stages], padding=3, fontsize=9
    )
    axes.set_xlim(right=1.25 * max(stage.seconds for stage in stages))
    axes.invert_yaxis()
    axes.set_xlabel("seconds")
    return png(figure)
