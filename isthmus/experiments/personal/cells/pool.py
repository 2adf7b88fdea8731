"""Runs the missing tasks of a list in processes of one compute thread each, so that every core has work."""

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from typing import Final, TypeVar

import torch
from rich.progress import Progress

Task = TypeVar("Task")
Report = Callable[[str], None]


_NAMED: Final = 5
"""Failed tasks that the message names."""


class CellsFailed(Exception):
    """Some tasks failed; the message names them with the reason. The others are finished and kept."""


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_all(
    work: Callable[[Task], str],
    tasks: Sequence[Task],
    *,
    workers: int,
    report: Report,
    progress: Progress | None = None,
    what: str = "cells",
) -> None:
    """Run ``work`` (importable, as are its tasks) once per task, and report the line that it returns.

    With one worker everything runs in this process. A failed task is reported at once and does not stop the others;
    at the end CellsFailed names the failed tasks. Ctrl-C stops after the running tasks; finished ones are kept.
    """
    if not tasks:
        return
    bar = progress.add_task(what, total=len(tasks), note="") if progress is not None else None
    failed: list[str] = []

    def finished(task: Task, result: Callable[[], str]) -> None:
        try:
            report(result())
        except Exception as error:
            failed.append(f"{task}: {error}")
            report(f"FAILED {task}: {type(error).__name__}: {error}")
        if progress is not None and bar is not None:
            progress.advance(bar)

    if workers <= 1:
        for task in tasks:
            finished(task, lambda task=task: work(task))  # type: ignore[misc]
    else:
        with ProcessPoolExecutor(
            min(workers, len(tasks)), mp_context=multiprocessing.get_context("spawn"), initializer=_one_thread
        ) as pool:
            futures: dict[Future[str], Task] = {pool.submit(work, task): task for task in tasks}
            try:
                for future in as_completed(futures):
                    finished(futures[future], future.result)
            except KeyboardInterrupt:
                pool.shutdown(cancel_futures=True)
                raise
    if failed:
        first, others = failed[:_NAMED], len(failed) - _NAMED
        rest = f"; and {others} more, as printed above" if others > 0 else ""
        raise CellsFailed(
            f"{len(failed)} of {len(tasks)} {what} failed; run again to retry them: {'; '.join(first)}{rest}"
        )


def _one_thread() -> None:
    torch.set_num_threads(1)
