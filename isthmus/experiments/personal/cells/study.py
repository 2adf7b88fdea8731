"""A study is a list of cells on one or more releases: prepared, run on every core, and read back."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from rich.progress import Progress

from isthmus.data.cache.read import ClipArrays
from isthmus.data.clip import Listing
from isthmus.distill.prepare import decode
from isthmus.distill.release import Release
from isthmus.experiments.personal.cells import cells
from isthmus.experiments.personal.cells.cells import Asked, Cell
from isthmus.experiments.personal.cells.methods import METHODS, Sent
from isthmus.experiments.personal.cells.pool import Report, run_all
from isthmus.experiments.personal.cells.work import (
    CellTask,
    StudentTask,
    TeachTask,
    halves,
    made_of,
    make_cell,
    make_seed,
    teach,
    too_few,
)


@dataclass(frozen=True)
class Part:
    """Cells of one release. ``clients``: name -> folder with all decoded clips of the client. ``teacher_seed`` is that
    of a teacher that is still to be trained."""

    release: Release
    clients: dict[str, str]
    asked: tuple[Asked, ...]
    teacher_seed: int = 0


def decoded(release: Release, listing: Listing, clients: dict[str, tuple[str, ...]]) -> dict[str, str]:
    """Decode the clips of each client, unless that was done, and return their folders."""
    return {
        client: str(decode(listing, names, release.recipe, release.root / "private").folder)
        for client, names in clients.items()
    }


def check_clips(release: Release, clients: Mapping[str, str], asked: Sequence[Asked]) -> None:
    """Raise ValueError if a client has too few clips for a cell, so that nothing is trained in vain.

    ``clients``: name -> folder with all decoded clips of the client.
    """
    clips = {client: ClipArrays.open(Path(folder)) for client, folder in clients.items()}
    floor = release.recipe.personalise.min_cluster
    for each in dict.fromkeys(replace(one, upload_share=1.0) for one in asked):
        chosen, tested = halves(clips[each.client], each)
        fewest = 1 if METHODS[each.method].sent in (Sent.NOTHING, Sent.PROBABILITIES, Sent.CLIPS) else floor
        if len(chosen) < fewest or len(tested) == 0:
            raise ValueError(
                f"{each.client} would have {len(chosen)} clips to select with and {len(tested)} to test "
                f"({each.name}), and {fewest} and 1 are needed: add clips, or begin a release with more private clips"
            )


def possible(
    release: Release, clients: Mapping[str, str], asked: Sequence[Asked]
) -> tuple[tuple[Asked, ...], tuple[Asked, ...]]:
    """Return the cells that can be made, and those whose share of the client's clips is too few for a prototype.

    ``clients``: name -> folder with all decoded clips of the client.
    """
    clips = {client: ClipArrays.open(Path(folder)) for client, folder in clients.items()}
    without = tuple(each for each in asked if too_few(release, clips[each.client], each))
    return tuple(each for each in asked if each not in without), without


def run(
    parts: Sequence[Part],
    out: Path,
    *,
    workers: int,
    report: Report,
    progress: Progress | None,
    device: str = "cpu",
    weights: Path | None = None,
    trunk_files: tuple[Path, Path] | None = None,
) -> list[Cell]:
    """Make the missing teachers, then students, then cells, and return the cells in the order asked for.

    ``weights`` are ImageNet weights for new teachers and students, ``trunk_files`` those of the recipes' pretrained
    trunks. Raises CellsFailed if some could not be made.
    """
    everywhere = partial(run_all, workers=workers, report=report, progress=progress)
    untaught = [
        TeachTask(str(part.release.root), part.teacher_seed, device, weights, trunk_files)
        for part in parts
        if not part.release.teacher_path.exists()
    ]
    everywhere(teach, untaught, what="teachers")
    seeds = {(str(part.release.root), asked.seed) for part in parts for asked in part.asked}
    wanted = [
        StudentTask(root, seed, device, weights) for root, seed in sorted(seeds) if not _has_student(Path(root), seed)
    ]
    everywhere(make_seed, wanted, what="base students")
    tasks = [
        CellTask(
            asked, str(part.release.root), part.clients[asked.client], str(out / "cells"), str(out / "work"), device
        )
        for part in parts
        for asked in part.asked
        if not cells.done(
            out / "cells", asked, partial(made_of, str(part.release.root), part.clients[asked.client], asked.seed)
        )
    ]
    everywhere(make_cell, tasks, what="cells")
    return [cells.load(out / "cells", asked) for part in parts for asked in part.asked]


def _has_student(root: Path, seed: int) -> bool:
    release = Release(root, Release.open(root).recipe)
    return release.heads_path(seed).exists() and (seed != 0 or release.base_dir.exists())
