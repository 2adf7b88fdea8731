"""The work of one process in a study: make a cell, or the student and heads that all cells of a seed start from."""

import dataclasses
import functools
import math
import shutil
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from isthmus.data.cache.keys import digest
from isthmus.data.cache.read import ClipArrays
from isthmus.data.splits import latency_halves
from isthmus.distill.models.heads import HeadBank
from isthmus.distill.models.trunk import EncoderPair, weights_file
from isthmus.distill.release import Release
from isthmus.distill.selection import Selection
from isthmus.distill.student.base import base_heads, make_base, make_student
from isthmus.distill.student.evaluate import StudentOutputs, accuracy, bank_probabilities, student_outputs
from isthmus.distill.student.measure import head_shares
from isthmus.distill.teacher.teach import cache_teacher_outputs, train_teacher
from isthmus.distill.training.checkpoint import state_hash
from isthmus.distill.training.loop import pick_device
from isthmus.distill.training.teacher_cache import encode_clips, evaluation_mean, head_probabilities
from isthmus.edge.own_clips.habits import learn
from isthmus.experiments.personal.cells import cells, measure, offset
from isthmus.experiments.personal.cells.cells import Asked, Cell, Outputs
from isthmus.experiments.personal.cells.methods import METHODS, Sent
from isthmus.experiments.personal.cells.offline import Setting, Trace, personalise
from isthmus.proto.person import Centred

Labels = npt.NDArray[np.int64]

MIN_CLASS_CLIPS: Final = 2
"""Fewest clips of a class that a user of few classes may have: one for each half."""


@dataclass(frozen=True)
class TeachTask:
    """Train the teacher, unless the release has one."""

    release: str
    seed: int
    device: str = "cpu"
    weights: Path | None = None
    """ImageNet weights, as ``weights_file`` takes them."""
    trunk_files: tuple[Path, Path] | None = None
    """The files of the recipe's pretrained trunks."""

    def __str__(self) -> str:
        return f"the teacher of {self.release}"


@dataclass(frozen=True)
class StudentTask:
    """Make the AllDistill student of a seed with its heads; with seed 0 also the base student."""

    release: str
    seed: int
    device: str = "cpu"
    weights: Path | None = None

    def __str__(self) -> str:
        return f"student {self.seed} of {self.release}"


@dataclass(frozen=True)
class CellTask:
    """Make a cell. ``clips``: folder with all decoded clips of the client. ``cells``: folder of the finished cell."""

    asked: Asked
    release: str
    clips: str
    cells: str
    work: str
    device: str = "cpu"

    def __str__(self) -> str:
        return self.asked.name


def teach(task: TeachTask) -> str:
    release, device = Release.open(Path(task.release)), pick_device(task.device)
    if not release.teacher_path.exists():
        weights = weights_file(task.weights, release.recipe.teacher_trunk)
        train_teacher(release, seed=task.seed, device=device, weights=weights, trunks=task.trunk_files)
    cache_teacher_outputs(release, device)
    return f"teacher: {release.teacher_path}"


def make_seed(task: StudentTask) -> str:
    release, device = _release(task.release), pick_device(task.device)
    weights = None if release.recipe.shares_encoders else weights_file(task.weights, release.recipe.student_trunk)
    make_student(release, task.seed, device, weights=weights)
    base_heads(release, task.seed, device)
    if task.seed == 0:
        make_base(release, device)
    return f"AllDistill student of seed {task.seed}: {release.student_path(task.seed)}"


def make_cell(task: CellTask) -> str:
    """Make and measure one student, unless that was done. Returns a line about it."""
    folder = Path(task.cells)
    if not cells.done(folder, task.asked, functools.partial(made_of, task.release, task.clips, task.asked.seed)):
        _make_cell(task, folder)
    cell = cells.load(folder, task.asked)
    return (
        f"{task.asked.name}: {100 * cell.before:.1f} to {100 * cell.plain:.1f} % of {cell.test_clips} clips, "
        f"{cell.selected} selected, {sum(cell.stage_s.values()):.0f} s"
    )


def _make_cell(task: CellTask, folder: Path) -> None:
    asked, device = task.asked, pick_device(task.device)
    release, everyone = _release(task.release), _clips(task.clips)
    chosen, tested = halves(everyone, asked)
    selection_clips, test_clips = everyone.subset(chosen), everyone.subset(tested)
    start, start_heads = _base(task.release, asked.seed, task.device)
    method = METHODS[asked.method]
    of = made_of(task.release, task.clips, asked.seed)
    work_dir = Path(task.work) / f"{asked.name}.{of}"
    student, heads, trace = start, start_heads, Trace(selections=[Selection.whole(len(release.public.names))])
    if method.sent is not Sent.NOTHING:
        student, heads, trace = personalise(
            release,
            selection_clips,
            method,
            Setting(asked.seed, asked.clips_per_cluster, picks=picks_of(release, everyone, asked)),
            start=start,
            work_dir=work_dir,
            device=device,
        )
    labels_T = np.asarray(test_clips.labels_N)
    after = student_outputs(student, release.teacher_head, test_clips, device)
    before = _before(task.release, task.clips, asked.seed, task.device)
    after_selection = student_outputs(student, release.teacher_head, selection_clips, device)
    on_test = _both(before.only(tested), start_heads, after, heads, labels_T)
    on_selection = _both(before.only(chosen), start_heads, after_selection, heads, np.asarray(selection_clips.labels_N))
    last = trace.selections[-1] if trace.selections else None
    everything = Selection.whole(len(release.public.names))
    shares_C = head_shares(release, everything) if method.heads_on == "all" else ()
    habits = learn(asked.name, on_selection.new_local_NC, shares_C) if shares_C else None
    sizes_K = trace.sent.sizes_K if trace.sent is not None else np.zeros(0, np.int32)
    cell = Cell(
        asked=asked,
        selection_clips=len(chosen),
        test_clips=len(tested),
        before=accuracy(on_test.old_local_NC, labels_T),
        accuracy=measure.accuracy_on_the_wire(heads, after, labels_T),
        teacher_head=accuracy(after.probabilities_NC, labels_T),
        teacher=accuracy(_teacher(task.release, task.clips, task.device)[tested], labels_T),
        selected=len(last) if last is not None else 0,
        selected_per_class=measure.per_class(release, trace),
        effective_samples=last.effective_size if last is not None else 0.0,
        rows_sent=len(sizes_K),
        smallest_cluster=int(sizes_K.min()) if len(sizes_K) else 0,
        upload_bytes=trace.upload_bytes,
        overlap=trace.overlap,
        a_distance=measure.a_distances(release, trace, asked.seed),
        stage_s=trace.stage_s,
        losses=tuple(trace.losses),
        masks=measure.accuracy_by_mask(heads, after, labels_T),
        masks_read=measure.accuracy_by_mask(heads, after, labels_T, habits) if habits is not None else {},
        steps=trace.steps,
        of=of,
    )
    if offset.can_be_measured(release, everyone):
        of_base = _person_model(task.release, asked.seed, task.device)
        made = of_base
        if student is not start:
            made = offset.person_model(release, encode_clips(student, release.public, device))
        if made is not None and of_base is not None:
            cell = dataclasses.replace(
                cell,
                offset_before=offset.accuracy_with_offset(of_base, before.only(chosen), before.only(tested), labels_T),
                offset=offset.accuracy_with_offset(made, after_selection, after, labels_T),
            )
    cells.save(folder, cell, on_selection, on_test)
    shutil.rmtree(work_dir, ignore_errors=True)


@functools.lru_cache(maxsize=1_024)
def made_of(release: str, clips: str, seed: int) -> str:
    """Return 16 hex digits over recipe, teacher, public clips, the seed's base student, and the client's clips.

    Another data set, preset or training in the same folder has another hash. ``clips``: see CellTask.
    """
    opened, own = _release(release), _clips(clips)
    return opened.recipe.hash(opened.outputs_key(), _student_hash(release, seed), digest(own.identity))


@functools.lru_cache(maxsize=64)
def _student_hash(release: str, seed: int) -> str:
    return state_hash([_release(release).student(seed)])


def picks_of(release: Release, everyone: ClipArrays, asked: Asked) -> int:
    """Return the number of public clips that every method picks for a client: the recipe's number per prototype, for
    as many prototypes as all selection clips give at the usual clips per cluster, whatever the cell uploads."""
    chosen, _ = halves(everyone, dataclasses.replace(asked, upload_share=1.0))
    config = release.recipe.personalise
    return min(math.ceil(len(chosen) / config.clips_per_cluster) * config.samples_per_row, len(release.public))


def too_few(release: Release, everyone: ClipArrays, asked: Asked) -> bool:
    """Return whether a smaller share of the client's clips is below the floor of a prototype, so that none is sent."""
    return asked.upload_share < 1 and len(halves(everyone, asked)[0]) < release.recipe.personalise.min_cluster


def halves(everyone: ClipArrays, asked: Asked) -> tuple[Labels, Labels]:
    """Return the rows for selection and the rows for testing. A smaller upload share is drawn with the seed.

    Raises ValueError if the client has fewer classes of MIN_CLASS_CLIPS clips than asked for.
    """
    labels_N = np.asarray(everyone.labels_N)
    rows = np.flatnonzero(np.isin(labels_N, drawn_classes(labels_N, asked)))
    if asked.scenario == "insensitive":
        chosen, tested = rows, rows
    else:
        names = latency_halves([everyone.names[row] for row in rows], labels_N[rows].tolist(), asked.seed)
        chosen, tested = (everyone.indices(half) for half in names)
    if asked.upload_share < 1:
        kept = max(1, round(asked.upload_share * len(chosen)))
        chosen = np.sort(np.random.default_rng((asked.seed, 12)).permutation(chosen)[:kept])
    return chosen, tested


def drawn_classes(labels_N: Labels, asked: Asked) -> Labels:
    """Return the classes that the simulated user has: drawn from the client's name and the seed, equal for every
    method."""
    found, counts = np.unique(labels_N, return_counts=True)
    if not asked.classes:
        return found
    enough = found[counts >= MIN_CLASS_CLIPS]
    if len(enough) < asked.classes:
        raise ValueError(f"client {asked.client} has {len(enough)} classes of {MIN_CLASS_CLIPS} clips or more")
    rng = np.random.default_rng((zlib.crc32(asked.client.encode()), asked.classes, asked.seed))
    return np.sort(rng.choice(enough, asked.classes, replace=False))


def _both(
    before: StudentOutputs, before_heads: HeadBank, after: StudentOutputs, after_heads: HeadBank, labels_N: Labels
) -> Outputs:
    return Outputs(
        bank_probabilities(before_heads, before, 1.0),
        bank_probabilities(after_heads, after, 1.0),
        before.probabilities_NC,
        after.probabilities_NC,
        labels_N,
    )


@functools.lru_cache(maxsize=4)
def _release(root: str) -> Release:
    return Release.open(Path(root))


@functools.lru_cache(maxsize=8)
def _clips(folder: str) -> ClipArrays:
    return ClipArrays.open(Path(folder))


@functools.lru_cache(maxsize=4)
def _base(release: str, seed: int, device: str) -> tuple[EncoderPair, HeadBank]:
    return _release(release).student(seed), base_heads(_release(release), seed, pick_device(device))


@functools.lru_cache(maxsize=4)
def _person_model(release: str, seed: int, device: str) -> Centred | None:
    """Return the person model of the base student of a seed: the same for every method and client."""
    opened = _release(release)
    return offset.person_model(opened, encode_clips(opened.student(seed), opened.public, pick_device(device)))


@functools.lru_cache(maxsize=8)
def _before(release: str, clips: str, seed: int, device: str) -> StudentOutputs:
    """Return the base student's outputs on all clips of a client: the same for every method."""
    opened = _release(release)
    return student_outputs(opened.student(seed), opened.teacher_head, _clips(clips), pick_device(device))


@functools.lru_cache(maxsize=8)
def _teacher(release: str, clips: str, device: str) -> npt.NDArray[np.float32]:
    """Return the teacher's probabilities on all clips of a client."""
    teacher, everyone = _release(release).teacher, _clips(clips)
    audio_ND, visual_NKD = encode_clips(teacher.encoders, everyone, pick_device(device))
    return head_probabilities(teacher.head, audio_ND, evaluation_mean(visual_NKD, everyone))
