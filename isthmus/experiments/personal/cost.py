"""The cost of one personalisation: the paper's loop as a reader would first write it, and ours, in one run.

The plain loop runs the teacher on every batch of every epoch and selects again in each round. The short loop reads the
teacher's cached outputs and uses the recipe's rounds and epochs; in everything else it follows the paper. The default
loop is what a device gets: the short loop that keeps half of the base student and trains heads on all public clips. All
start from the same student, use the same device's upload and are measured on the same clips. Cost is processor time of
one process with one thread. The teacher's cache is built once for all devices and is reported separately.
"""

import copy
import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor

from isthmus.data.cache.read import ClipArrays
from isthmus.data.files import write_atomically
from isthmus.distill.models.heads import HeadBank
from isthmus.distill.models.trunk import EncoderPair
from isthmus.distill.release import Release
from isthmus.distill.selection import Selection, Wanted
from isthmus.distill.student.base import base_heads
from isthmus.distill.student.evaluate import accuracy, bank_probabilities, student_outputs
from isthmus.distill.student.personalise import select_round, train_heads
from isthmus.distill.training.datasets import DistillationClips
from isthmus.distill.training.loop import fit
from isthmus.distill.training.losses import feature_distillation_loss
from isthmus.distill.training.teacher_cache import encode_clips
from isthmus.experiments.personal.cells.cells import Asked
from isthmus.experiments.personal.cells.methods import METHODS, Method
from isthmus.experiments.personal.cells.offline import Setting, personalise, upload
from isthmus.experiments.personal.cells.work import halves, made_of
from isthmus.experiments.personal.findings.paired import difference, spread
from isthmus.experiments.personal.findings.tables import Table, points

CPU = torch.device("cpu")
LOOPS: Final[Mapping[str, Method]] = {
    "plain": METHODS["cluster"],
    "short": METHODS["cluster"],
    "default": METHODS["kept"],
}
"""The method of each loop."""


@dataclass(frozen=True)
class Spent:
    """One personalisation: processor seconds by part, student downloads and accuracy on the test clips."""

    loop: str
    client: str
    seed: int
    rounds: int
    epochs: int
    downloads: int
    compute_s: dict[str, float]
    accuracy: float
    before: float

    @property
    def total_s(self) -> float:
        return sum(self.compute_s.values())


def plain_loop(
    release: Release, clips: ClipArrays, setting: Setting, *, start: EncoderPair, rounds: int, epochs: int
) -> tuple[EncoderPair, HeadBank, dict[str, float]]:
    """Run Alg. 7 with the teacher in the loop: ``epochs`` over ``rounds`` rounds, one optimiser state per round."""
    method, teacher = LOOPS["plain"], release.teacher.encoders
    student = copy.deepcopy(start)
    spent = dict.fromkeys(("prototypes", "select", "distil", "heads"), 0.0)
    config = dataclasses.replace(release.recipe.personalise.train, epochs=epochs)
    selection = Selection.of(np.zeros(0, np.int64))

    def loss(batch: Sequence[Tensor]) -> Tensor:
        spectrogram_BFT, frames_BKCHW, *_ = batch  # the plain loop does not read the cache
        teacher.eval()
        with torch.no_grad():
            audio_BD, visual_BD = teacher.audio(spectrogram_BFT), teacher.visual(frames_BKCHW).mean(dim=1)
        return feature_distillation_loss(student.audio(spectrogram_BFT), audio_BD) + feature_distillation_loss(
            student.visual(frames_BKCHW).mean(dim=1), visual_BD
        )

    for number in range(rounds):
        with _timed(spent, "prototypes"):
            sent = upload(student_outputs(student, release.teacher_head, clips, CPU), method.sent, release, setting)
        with _timed(spent, "select"):
            selection = select_round(
                release,
                Wanted(sent.values_KC, sent.sizes_K),
                round=number,
                seed=setting.seed,
                strategy=method.strategy,
            )
        with _timed(spent, "distil"):
            fit(
                student,
                DistillationClips(release.public, release.teacher_outputs, selection, setting.seed + 1),
                loss,
                config,
                seed=setting.seed + 1,
                run="plain loop",
                from_epoch=epochs * number // rounds,
                until_epoch=epochs * (number + 1) // rounds,
                device=CPU,
            )
    with _timed(spent, "heads"):
        heads = train_heads(release, student, selection, seed=setting.seed, device=CPU)
    return student, heads, spent


def measure(
    release: Release,
    clients: dict[str, str],
    *,
    seeds: Sequence[int],
    plain_rounds: int,
    plain_epochs: int,
    out: Path,
    report: Callable[[str], None],
) -> list[Spent]:
    """Measure all loops for every client and seed in turn. Earlier measurements of the same data are kept."""
    found = []
    for seed in seeds:
        start, start_heads = release.student(seed), base_heads(release, seed, CPU)
        for client, folder in clients.items():
            everyone = ClipArrays.open(Path(folder))
            chosen, tested = halves(everyone, Asked(client, "sensitive", "cluster", seed))
            own, test_clips = everyone.subset(chosen), everyone.subset(tested)
            labels_T = np.asarray(test_clips.labels_N)
            before = accuracy(
                bank_probabilities(start_heads, student_outputs(start, release.teacher_head, test_clips, CPU), 1.0),
                labels_T,
            )
            setting, of = Setting(seed), made_of(str(release.root), folder, seed)
            for loop, method in LOOPS.items():
                path = out / "runs" / f"{loop}-{client}-{seed}-{plain_rounds}x{plain_epochs}.json"
                done = _kept(path, of)
                if done is None:
                    if loop == "plain":
                        rounds, epochs = plain_rounds, plain_epochs
                        student, heads, spent = plain_loop(
                            method.on(release), own, setting, start=start, rounds=rounds, epochs=epochs
                        )
                    else:
                        epochs, work_dir = release.recipe.personalise.train.epochs, out / "work" / path.stem
                        # A run that was killed leaves a checkpoint, and what goes on from it would seem to cost less.
                        shutil.rmtree(work_dir, ignore_errors=True)
                        student, heads, trace = personalise(
                            release, own, method, setting, start=start, work_dir=work_dir, device=CPU
                        )
                        shutil.rmtree(work_dir, ignore_errors=True)
                        rounds, spent = len(trace.selections), trace.compute_s
                    right = accuracy(
                        bank_probabilities(heads, student_outputs(student, release.teacher_head, test_clips, CPU), 1.0),
                        labels_T,
                    )
                    done = Spent(loop, client, seed, rounds, epochs, rounds, spent, right, before)
                    write_atomically(path, json.dumps({"of": of, **asdict(done)}, indent=1))
                found.append(done)
                report(
                    f"{loop}, client {client}, seed {seed}: {found[-1].total_s:.0f} s of processor time, "
                    f"{100 * found[-1].accuracy:.1f} %"
                )
    return found


def _kept(path: Path, of: str) -> Spent | None:
    """Return what was measured before, if it was of the same data, release and student (``made_of``).

    What was measured before the hash was noted is taken by its name.
    """
    if not path.exists():
        return None
    kept = json.loads(path.read_text())
    return Spent(**kept) if kept.pop("of", of) == of else None


def cache_compute_s(release: Release) -> float:
    """Return the processor seconds of running the teacher once over the public clips, measured on a part of them."""
    part = release.public.subset(np.arange(min(64, len(release.public.names))))
    began_s = time.process_time()
    encode_clips(release.teacher.encoders, part, CPU)
    return (time.process_time() - began_s) * len(release.public.names) / len(part)


def table(found: Sequence[Spent], cache_s: float) -> Table:
    by_loop = {loop: {(each.client, each.seed): each for each in found if each.loop == loop} for loop in LOOPS}
    rows = []
    for loop, of_pair in by_loop.items():
        own = list(of_pair.values())
        totals, shares = spread([each.total_s for each in own]), spread([100 * each.accuracy for each in own])
        parts = [f"{spread([each.compute_s[part] for each in own]).mean:.1f}" for part in own[0].compute_s]
        rows.append(
            (
                f"{loop}, {own[0].rounds} rounds, {own[0].epochs} epochs",
                f"{totals.mean:.0f} ± {totals.deviation:.0f}",
                *parts,
                f"{spread([float(each.downloads) for each in own]).mean:.1f}",
                f"{shares.mean:.1f} ± {shares.deviation:.1f}",
            )
        )
    header = (
        "loop", "processor s", *(f"{part}, s" for part in found[0].compute_s), "students down", "accuracy, %",
    )  # fmt: skip
    plain = by_loop["plain"]
    notes = []
    for loop in ("short", "default"):
        ratios = spread([plain[pair].total_s / each.total_s for pair, each in by_loop[loop].items()])
        gap = difference(
            {pair: each.accuracy for pair, each in by_loop[loop].items()},
            {pair: each.accuracy for pair, each in plain.items()},
        )
        notes.append(
            f"The {loop} loop costs {ratios.mean:.1f} ± {ratios.deviation:.1f} times less than the plain one; accuracy "
            f"minus the plain one's: {points(gap)} points over {gap.pairs} pairs."
        )
    before = spread([100 * each.before for each in plain.values()])
    notes.append(
        f"Before, with the base student: {before.mean:.1f} ± {before.deviation:.1f} %. The teacher's cache costs "
        f"{cache_s:.0f} s once, for all devices."
    )
    return Table("Processor time of one personalisation", header, tuple(rows), " ".join(notes))


@contextmanager
def _timed(totals_s: dict[str, float], part: str) -> Iterator[None]:
    """Add processor seconds to one part."""
    began_s = time.process_time()
    try:
        yield
    finally:
        totals_s[part] += time.process_time() - began_s
