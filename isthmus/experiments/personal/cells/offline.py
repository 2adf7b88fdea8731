"""Both halves of one personalisation in one process, with the functions that device and cloud use."""

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
import torch

from isthmus.data.cache.read import ClipArrays
from isthmus.distill.models.heads import HeadBank
from isthmus.distill.models.trunk import EncoderPair
from isthmus.distill.release import Release
from isthmus.distill.selection import Selection, Strategy, Wanted, class_oracle
from isthmus.distill.student.evaluate import StudentOutputs, student_outputs
from isthmus.distill.student.personalise import distil_round, select_round, train_heads
from isthmus.distill.student.settling import overlap, settled
from isthmus.distill.training.loop import EpochReport, OnEpoch
from isthmus.distill.training.teacher_cache import TeacherOutputs, encode_clips, evaluation_mean, head_probabilities
from isthmus.edge.own_clips.prototypes import each_clip, make_prototypes
from isthmus.experiments.personal.cells.methods import Method, Sent
from isthmus.proto.convert import prototypes_to_pb
from isthmus.proto.messages import Prototypes, UploadMode

STAGES: Final = ("prototypes", "select", "distil", "heads")


@dataclass
class Trace:
    """Record of one personalisation. ``stage_s``: wall seconds by stage. ``compute_s``: processor seconds of this
    process by stage. ``losses``: per epoch of distillation. ``steps``: gradient steps of distillation.

    ``selections``: one per round. ``sent``: the upload of the last round.
    """

    stage_s: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    compute_s: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    losses: list[float] = field(default_factory=list)
    steps: int = 0
    selections: list[Selection] = field(default_factory=list)
    sent: Prototypes | None = None
    upload_bytes: int = 0

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        began_s, worked_s = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            self.stage_s[stage] += time.perf_counter() - began_s
            self.compute_s[stage] += time.process_time() - worked_s

    @property
    def overlap(self) -> tuple[float, ...]:
        """Jaccard index of each round's selection with the previous round's."""
        return tuple(
            overlap(before.indices_S, after.indices_S)
            for before, after in zip(self.selections, self.selections[1:], strict=False)
        )

    def on_epoch(self, clips: int, release: Release) -> OnEpoch:
        """Return a watcher of distillation on ``clips`` clips."""
        steps = steps_per_epoch(clips, release.recipe.personalise.train.batch_size)

        def watch(report: EpochReport) -> None:
            self.losses.append(report.loss)
            self.steps += steps

        return watch

    def settled(self, threshold: float | None) -> bool:
        """Return whether the last two selections overlap by at least ``threshold``. None: never."""
        if threshold is None or len(self.selections) < 2:
            return False
        return settled(self.selections[-2].indices_S, self.selections[-1].indices_S, threshold)


@dataclass(frozen=True)
class Setting:
    """What a cell changes in the recipe. ``rounds`` 0: the recipe's number.

    ``picks`` is the number of public clips that every method picks, whatever its number of rows; 0: the recipe's number
    per row. With ``picks``, methods that cannot pick so many, or weight more, train for other numbers of epochs: as
    many gradient steps as the others, or as near as whole epochs come.
    """

    seed: int
    clips_per_cluster: int = 3
    rounds: int = 0
    picks: int = 0


def personalise(
    release: Release,
    clips: ClipArrays,
    method: Method,
    setting: Setting,
    *,
    start: EncoderPair,
    work_dir: Path,
    device: torch.device,
) -> tuple[EncoderPair, HeadBank, Trace]:
    """Make one student for the person of ``clips`` (Alg. 7 and 8), starting from ``start``.

    ``method`` must send something; AllDistill, where all methods start, needs no personalisation. Only the controls
    ``oracle`` and ``own`` read the labels of ``clips``. Methods take equal numbers of public clips and of gradient
    steps if ``setting.picks`` says how many. Otherwise the numbers are about the same: n per prototype, or n divided by
    the clips per cluster for each clip.

    Raises TrainingDiverged, CheckpointError, BadPrototypes (too few clips), ValueError.
    """
    trace = Trace()
    release = method.on(release)
    if method.sent is Sent.CLIPS:
        return _own(release, clips, setting, start, work_dir, device, trace)
    rounds = setting.rounds or release.recipe.personalise.rounds
    student = start
    for number in range(rounds):
        with trace.timed("prototypes"):
            outputs = student_outputs(student, release.teacher_head, clips, device)
            trace.sent = upload(outputs, method.sent, release, setting)
        if method.sent not in (Sent.LABELS, Sent.CLIPS):
            trace.upload_bytes += prototypes_to_pb(trace.sent).ByteSize()
        with trace.timed("select"):
            trace.selections.append(_select(release, clips, method, trace.sent, setting, number))
        if number == 0:
            release = at_equal_steps(release, len(trace.selections[0]), setting.picks)
        # As in the cloud: if the selection has settled, this round is the last and trains the remaining epochs.
        last = trace.settled(release.recipe.personalise.settled_at)
        with trace.timed("distil"):
            student = distil_round(
                release,
                trace.selections[-1],
                round=rounds - 1 if last else number,
                rounds=rounds,
                seed=setting.seed,
                checkpoint=work_dir / "checkpoint.safetensors",
                on_epoch=trace.on_epoch(len(trace.selections[-1]), release),
                start=start,
                device=device,
            )
        if last:
            break
    with trace.timed("heads"):
        heads = train_heads(release, student, trace.selections[-1], seed=setting.seed, device=device)
    return student, heads, trace


def steps_per_epoch(clips: int, batch_size: int) -> int:
    """Return the gradient steps of one epoch. A last batch of a single clip is left out (``loop.fit``)."""
    whole, rest = divmod(clips, batch_size)
    return max(1, whole + (rest > 1))


def at_equal_steps(release: Release, clips: int, picks: int) -> Release:
    """Return the release with as many epochs for ``clips`` clips as give the gradient steps of ``picks`` clips.

    The schedule of the learning rate stretches with the epochs. There is at least one epoch per round. ``picks`` 0
    changes nothing.
    """
    config = release.recipe.personalise
    train = config.train
    if not picks or clips == 0:
        return release
    steps = train.epochs * steps_per_epoch(picks, train.batch_size)
    epochs = max(config.rounds, round(steps / steps_per_epoch(clips, train.batch_size)))
    if epochs == train.epochs:
        return release
    changed = dataclasses.replace(config, train=dataclasses.replace(train, epochs=epochs))
    return release.under(dataclasses.replace(release.recipe, personalise=changed))


def upload(outputs: StudentOutputs, sent: Sent, release: Release, setting: Setting) -> Prototypes:
    """Return what the device would send. Controls make prototypes too, so that they select equally many clips."""
    if sent is Sent.PROBABILITIES:
        return each_clip(outputs.probabilities_NC)
    return make_prototypes(
        outputs.probabilities_NC,
        seed=setting.seed,
        min_cluster=release.recipe.personalise.min_cluster,
        clip_per_cluster=setting.clips_per_cluster,
        features_NE=np.hstack([outputs.audio_ND, outputs.visual_ND]) if sent is Sent.FEATURES else None,
    )


def _select(
    release: Release, clips: ClipArrays, method: Method, sent: Prototypes, setting: Setting, number: int
) -> Selection:
    config = release.recipe.personalise
    samples_per_row = config.samples_per_row
    if setting.picks:
        samples_per_row = -(-setting.picks // len(sent.values_KC))
    elif sent.mode is UploadMode.PROBABILITIES:
        samples_per_row = max(1, round(samples_per_row / config.clips_per_cluster))
    strategy: str | Strategy = method.strategy
    if method.sent is Sent.LABELS:
        strategy = class_oracle(np.bincount(clips.labels_N, minlength=len(release.recipe.classes)).astype(np.int64))
    found = select_round(
        release,
        Wanted(sent.values_KC, sent.sizes_K, sent.features_KE),
        round=number,
        seed=setting.seed,
        strategy=strategy,
        samples_per_row=samples_per_row,
    )
    return found if found.weighted or not setting.picks else cut(found, setting.picks, samples_per_row)


def cut(found: Selection, picks: int, samples_per_row: int) -> Selection:
    """Return the first ``picks`` clips of a hard pick: the nearest of every row, then the second nearest, and so on.

    Strategies that do not take row by row lose clips spread over the whole pick.
    """
    turns_S = np.argsort(np.arange(len(found)) % samples_per_row, kind="stable")[:picks]
    return Selection.of(found.indices_S[np.sort(turns_S)], found.notes)


def _own(
    release: Release,
    clips: ClipArrays,
    setting: Setting,
    start: EncoderPair,
    work_dir: Path,
    device: torch.device,
    trace: Trace,
) -> tuple[EncoderPair, HeadBank, Trace]:
    """Distil on the user's own labelled clips: an upper bound that no cloud can reach, because it needs the clips."""
    teacher = release.teacher
    audio_ND, visual_NKD = encode_clips(teacher.encoders, clips, device)
    taught_NC = head_probabilities(teacher.head, audio_ND, evaluation_mean(visual_NKD, clips))
    own = at_equal_steps(release, len(clips), setting.picks).over(
        clips, TeacherOutputs(audio_ND, visual_NKD, taught_NC)
    )
    everything = Selection.whole(len(clips))
    with trace.timed("distil"):
        student = distil_round(
            own,
            everything,
            round=0,
            rounds=1,
            seed=setting.seed,
            checkpoint=work_dir / "checkpoint.safetensors",
            on_epoch=trace.on_epoch(len(clips), own),
            start=start,
            device=device,
        )
    with trace.timed("heads"):
        heads = train_heads(own, student, everything, seed=setting.seed, device=device)
    return student, heads, trace
