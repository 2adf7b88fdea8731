"""Progress of long training for people: a bar with rate and time left, and loss curves as PNG and JSON."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from isthmus.data.files import write_atomically
from isthmus.distill.figures import png
from isthmus.distill.training.loop import EpochReport


@contextmanager
def bars() -> Iterator[Progress]:
    """Show progress bars on standard error; show nothing if that is not a terminal."""
    console = Console(stderr=True)
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description:<28}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    ) as progress:
        yield progress


class EpochBars:
    """Turn epoch reports into one bar per stage, or without a terminal into one line per stage and epoch."""

    def __init__(self, progress: Progress, samples: int, unit: str = "clips"):
        self._progress = progress
        self._samples = samples
        self._unit = unit
        self._tasks: dict[str, TaskID] = {}
        self._lines = Console(stderr=True)

    def __call__(self, stage: str, report: EpochReport) -> None:
        rate = self._samples / max(report.seconds, 1e-9)
        note = f"loss {report.loss:.4f}, {rate:.0f} {self._unit}/s"
        if self._progress.disable:
            left_s = report.seconds * (report.epochs - report.epoch)
            self._lines.print(
                f"{stage}: epoch {report.epoch}/{report.epochs}, {note}, about {left_s:.0f} s left",
                highlight=False,
                markup=False,
            )
            return
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage, total=report.epochs, note="")
        self._progress.update(self._tasks[stage], completed=report.epoch, note=note)


def save_loss_curves(folder: Path, losses: Mapping[str, Sequence[float]], title: str) -> None:
    """Write ``history.json`` and ``loss.png``: one curve per stage, loss against epoch."""
    from matplotlib.figure import Figure

    write_atomically(folder / "history.json", json.dumps({k: list(v) for k, v in losses.items()}, indent=1))
    shown = {stage: values for stage, values in losses.items() if values}
    figure = Figure(figsize=(4 * max(1, len(shown)), 3))
    axes = figure.subplots(1, max(1, len(shown)), squeeze=False)
    for axis, (stage, values) in zip(axes[0], shown.items(), strict=False):
        axis.plot(range(1, len(values) + 1), values)
        axis.set(title=stage, xlabel="epoch", ylabel="loss")
        axis.grid(alpha=0.3)
    figure.suptitle(title)
    figure.tight_layout()
    write_atomically(folder / "loss.png", png(figure))
