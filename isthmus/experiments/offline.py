"""The device's half and the cloud's half of one personalisation, in one process, by the functions both shores use."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from isthmus.data.stored import ClipArrays
from isthmus.distill.evaluate import student_outputs
from isthmus.distill.models.heads import HeadBank
from isthmus.distill.models.trunk import EncoderPair
from isthmus.distill.personalise import distil_round, select_round, train_heads
from isthmus.distill.release import Release
from isthmus.distill.selection import Selection, Strategy, Wanted
from isthmus.edge.prototypes import each_clip, make_prototypes

METHODS: Final = ("all", "random", "select", "cluster")


@dataclass(frozen=True)
class Personalised:
    """A finished student, and how it came about. ``stage_s``: seconds by stage. ``losses``: per epoch."""

    student: EncoderPair
    heads: HeadBank
    stage_s: dict[str, float]
    losses: tuple[float, ...]
    selected_per_class: tuple[int, ...]
    smallest_cluster: int


def personalise(
    release: Release,
    selection_clips: ClipArrays,
    method: str,
    *,
    seed: int,
    start: EncoderPair,
    work_dir: Path,
    device: torch.device,
    strategy: str | Strategy = "cosine",
    features: bool = False,
) -> Personalised:
    """One cell of the paper's tables (Alg. 7 and 8) for one client.

    ``all`` is the AllDistill student with heads trained on all public clips. The others select about as
    many public clips as one another: ``cluster`` and ``random`` take the recipe's n for each prototype, ``select``
    takes n divided by the clips per cluster for each clip. Labels of ``selection_clips`` are not read.
    ``strategy`` is that of ``select`` and ``cluster``; with ``features``, ``cluster`` sends its clusters' features too.

    Raises ValueError for an unknown method.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; known: {', '.join(METHODS)}")
    config = release.recipe.personalise
    rounds = config.rounds
    stage_s = dict.fromkeys(("prototypes", "select", "distil", "heads"), 0.0)
    losses: list[float] = []
    smallest = 0
    clock = _Stopwatch(stage_s)
    student = start
    if method == "all":
        selection = Selection.of(np.arange(len(release.public.names), dtype=np.int64))
        rounds = 0
    for number in range(rounds):
        with clock.running("prototypes"):
            outputs = student_outputs(student, release.teacher_head, selection_clips, device)
            if method == "select":
                sent = each_clip(outputs.probabilities_NC)
                samples_per_row = max(1, round(config.samples_per_row / config.clips_per_cluster))
            else:
                sent = make_prototypes(
                    outputs.probabilities_NC,
                    seed=seed,
                    min_cluster=config.min_cluster,
                    clip_per_cluster=config.clips_per_cluster,
                    features_NE=np.concatenate([outputs.audio_ND, outputs.visual_ND], axis=1) if features else None,
                )
                samples_per_row = config.samples_per_row
                smallest = int(sent.sizes_K.min())
        with clock.running("select"):
            selection = select_round(
                release,
                Wanted(sent.values_KC, sent.sizes_K, sent.features_KE),
                round=number,
                seed=seed,
                strategy="random" if method == "random" else strategy,
                samples_per_row=samples_per_row,
            )
        with clock.running("distil"):
            student = distil_round(
                release,
                selection,
                round=number,
                rounds=rounds,
                seed=seed,
                checkpoint=work_dir / "checkpoint.safetensors",
                on_epoch=lambda report: losses.append(report.loss),
                start=start,
                device=device,
            )
    with clock.running("heads"):
        heads = train_heads(release, student, selection, seed=seed, device=device)
    counts: npt.NDArray[np.int64] = np.bincount(
        release.labels()[selection.indices_S], minlength=len(release.recipe.classes)
    )
    return Personalised(student, heads, stage_s, tuple(losses), tuple(map(int, counts)), smallest)


class _Stopwatch:
    def __init__(self, totals_s: dict[str, float]):
        self._totals_s = totals_s
        self._name, self._began_s = "", 0.0

    def running(self, name: str) -> "_Stopwatch":
        self._name = name
        return self

    def __enter__(self) -> None:
        self._began_s = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._totals_s[self._name] += time.perf_counter() - self._began_s
