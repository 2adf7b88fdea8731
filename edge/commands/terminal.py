"""Output of a device on a terminal: progress while it works, tables when it is done."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from isthmus.data.clip import Damage
from isthmus.edge.agent.progress import Observer
from isthmus.edge.own_clips.disclosure import Disclosure
from isthmus.proto.messages import JobStatus

_STAGES = {
    "enrol": "enrolling",
    "fetch_base": "fetching the base student",
    "follow_release": "following the cloud to another base student",
    "fetch_interim": "fetching this round's student",
    "fetch_final": "fetching the finished student",
    "make_prototypes": "encoding selection clips",
    "make_prototypes_again": "encoding selection clips again",
    "judge": "comparing the new student with the present one",
    "upload": "sending prototypes",
    "watch": "the cloud is at work",
    "infer_before": "answering with the base student",
    "infer": "answering with the finished student",
}
_SHOWN_ROWS = 12
_SHOWN_SHARES = 3


def plain(text: str) -> str:
    """Return foreign text as one line without escape codes. Print it with ``markup=False``, or as a ``Text``."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


@contextlib.contextmanager
def terminal_observer(console: Console) -> Iterator[Observer]:
    """Show progress if ``console`` is a terminal. Damaged clips and waits are printed on any console."""
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[detail]}"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with progress:
        yield _observer(console, progress, progress.add_task("starting", total=None, detail=""))


def _observer(console: Console, progress: Progress, task: TaskID) -> Observer:
    def stage(name: str) -> None:
        progress.reset(task, description=_STAGES.get(name, name.replace("_", " ")), total=None, detail="")

    def job(status: JobStatus) -> None:
        detail = f"{status.stage.value.replace('_', ' ')}, round {status.round + 1} of {status.rounds}"
        if status.settled:
            detail += " (the last: the selection has settled)"
        if status.eta_s > 0:
            detail += f", {status.eta_s:.0f} s left"
        progress.update(task, total=1.0, completed=status.progress, detail=detail)

    def transferred(here: int, total: int) -> None:
        progress.update(task, total=total, completed=here, detail=f"{here / 1e6:.1f} of {total / 1e6:.1f} MB")

    def clip(done: int, total: int) -> None:
        progress.update(task, total=total, completed=done, detail=f"{done} of {total} clips")

    def damage(clip: Damage) -> None:
        console.print(plain(f"skipped {clip.name}: {clip.reason}"), markup=False)

    def wait(seconds: float, reason: str) -> None:
        console.print(plain(f"{reason or 'the cloud ended the stream'}; again in {seconds:.1f} s"), markup=False)

    return Observer(on_stage=stage, on_job=job, on_bytes=transferred, on_clip=clip, on_damage=damage, on_wait=wait)


def print_result(console: Console, report: Mapping[str, Any]) -> None:
    """Print accuracies, if labels are known, with their cost in bytes and time."""
    accuracy, sent, ms = report["accuracy"], report["bytes"]["up_per_clip"], report["ms_per_clip"]
    table = Table(title=f"{len(report['clips']['test'])} test clips")
    for column in ("answered by", "accuracy", "bytes up per clip", "ms per clip (median)"):
        table.add_column(column, justify="left" if column == "answered by" else "right")
    table.add_row("base student, on the device", _percent(accuracy["before"]), "0", "")
    local = _median(ms["encode"]), _median(ms["local_head"])
    finished = "base student again (the new one was refused)" if report["students"]["refused"] else "finished student"
    if report["person"] is not None:
        table.add_row("base student, your voice and face known", _percent(accuracy["before_without_labels"]), "0", "")
        table.add_row(f"{finished}, as it is", _percent(accuracy["without_habits"]), "0", _sum_ms(*local))
    if report["habits"] is not None:
        table.add_row(f"{finished}, without habits", _percent(accuracy["without_habits"]), "0", _sum_ms(*local))
    if report["accuracy"]["with_corrections"] is not None:
        table.add_row(
            f"{finished}, without your corrections", _percent(accuracy["without_labels"]), "0", _sum_ms(*local)
        )
    table.add_row(f"{finished}, on the device", _percent(accuracy["local"]), "0", _sum_ms(*local))
    for ratio, value in accuracy["cloud"].items():
        parts = _median(ms["encode"]), _median(ms["compress"][ratio]), _median(ms["round_trip"][ratio])
        table.add_row(f"through the cloud, ratio {ratio}", _percent(value), f"{sent[ratio]:,.0f}", _sum_ms(*parts))
    console.print(table)
    if report["guard"] is not None:
        console.print(plain(_verdict(report["guard"])), markup=False)
    if report["habits"] is not None:
        console.print(plain(_habits(report["habits"], report["classes"])), markup=False)
    if report["person"] is not None:
        console.print(plain(" ".join(report["person"]["sentences"])), markup=False)
    prototypes = report["prototypes"]
    console.print(
        f"Sent: {report['bytes']['up']['prototypes']:,} bytes of prototypes "
        f"({prototypes['count']}, each the mean of at least {prototypes['min_size']} clips). "
        f"Kept on the device: {report['bytes']['raw_test_clips']:,} bytes of raw test clips."
    )


def print_disclosure(console: Console, disclosure: Disclosure) -> None:
    """Print what would leave the device, in words and numbers."""
    console.print("What would leave this device:")
    for sentence in disclosure.sentences:
        console.print(f"  - {sentence}", markup=False)
    table = Table(title="The prototypes")
    table.add_column("clips", justify="right")
    table.add_column("likeliest classes")
    for row in disclosure.rows[:_SHOWN_ROWS]:
        likeliest = ", ".join(f"{name} {share:.0%}" for name, share in row.shares[:_SHOWN_SHARES])
        table.add_row(str(row.clips), Text(plain(likeliest)))
    console.print(table)
    if len(disclosure.rows) > _SHOWN_ROWS:
        console.print(f"and {len(disclosure.rows) - _SHOWN_ROWS} more; --json prints every number")


def _verdict(guard: Mapping[str, Any]) -> str:
    text = f"The new student was {'taken' if guard['accepted'] else 'refused'}: {guard['reason']}."
    if guard["right"] is None:
        return text
    measured = f"{_percent(guard['true_accuracy']['old'])} before, {_percent(guard['true_accuracy']['new'])} after"
    right = "right" if guard["right"] else "wrong"
    return f"{text} On the labelled test clips, without the cloud: {measured}; the guard was {right}."


def _habits(habits: Mapping[str, Any], classes: Sequence[str]) -> str:
    ranked = sorted(zip(habits["shares"], classes, strict=True), reverse=True)
    named = ", ".join(f"{name} {share:.0%}" for share, name in ranked[:_SHOWN_SHARES])
    return (
        f"How often you are in each state, estimated from {habits['clips']} clips (this stays on the device): {named}."
    )


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _median(spread: Mapping[str, float] | None) -> float | None:
    return None if spread is None else spread["median"]


def _sum_ms(*parts: float | None) -> str:
    return "-" if any(part is None for part in parts) else f"{sum(part or 0.0 for part in parts):.1f}"
