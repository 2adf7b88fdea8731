"""Fine-tunes a model with its tokens reduced by a fixed number, and predicts the time of that from a short probe.

Everything is tuned except the embedding, which precedes the first reduction. So the embedding has the same tensors in
every model and is stored once. A run that was stopped resumes from its last checkpoint when it is called again.
"""

import copy
import itertools
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from isthmus.cloud.elastic.model.pruning import Pruning
from isthmus.cloud.elastic.model.runner import ElasticRunner
from isthmus.cloud.elastic.model.vit import ElasticViT
from isthmus.cloud.elastic.prepare.prompts import Pictures
from isthmus.cloud.elastic.tasks.task import FloatArray
from isthmus.cloud.elastic.warm.store import ReducerName
from isthmus.cloud.warmup.profiling import check_numbers, check_pictures
from isthmus.cloud.warmup.pruning_training import PrunedPictures, PruningLoss
from isthmus.data.cache.keys import digest
from isthmus.data.files import write_atomically
from isthmus.data.images import LabelledImages, PixelSpec
from isthmus.distill.recipes import TrainConfig
from isthmus.distill.training.checkpoint import state_hash
from isthmus.distill.training.loop import EpochReport, OnEpoch, SeededDataset, fit, ignore_epochs, optimizer_for

TUNE: Final = TrainConfig(
    epochs=30,
    batch_size=64,
    optimizer="adamw",
    learning_rate=2e-4,
    weight_decay=0.05,
    schedule="cosine",
    label_smoothing=0.1,
)
"""30 epochs are the paper's. It does not name the optimiser and learning rate."""
FROZEN: Final = ("patch_embed.", "pos_embed", "cls_token", "dist_token", "reg_token", "norm_pre.")
PROBE_STEPS: Final = 3
ANSWERS_BATCH: Final = 100

Losses = Callable[[Sequence[Tensor]], Tensor]
Target = Literal["both", "vanilla", "labels"]
TARGETS: Final = get_args(Target)
LABELS_WEIGHT: Final = 0.5
"""Weight of the cross entropy, relative to the loss against the vanilla model's answers."""


@dataclass(frozen=True)
class TuneConfig:
    """How to tune. Parameters whose timm names start with one of ``frozen`` do not change.

    ``target`` is what a merging model learns from:

    - "labels": the labels, as in the paper.
    - "vanilla": the answers of the vanilla model, with all its tokens, to the same pictures (Kullback-Leibler
      divergence). They show for every class what the model lost by the reduction.
    - "both": "vanilla" plus half of "labels". It recovers the most accuracy if there are not many more pictures than
      the vanilla model was trained on (docs/log.md).

    The vanilla model answers each picture once, before timing starts, or in every step if pictures are augmented. A
    pruning model always learns from both, with the weights of its paper (pruning_training.py).
    """

    train: TrainConfig = TUNE
    reducer: ReducerName = "merging"
    frozen: tuple[str, ...] = FROZEN
    seed: int = 0
    target: Target = "both"


DEFAULT: Final = TuneConfig()


@dataclass(frozen=True, eq=False)
class Subject:
    """The subject of a warm-up: a vanilla model with a head for the task's classes, and pictures to learn and profile.

    ``model`` is never changed. Raises ValueError if the parts do not belong together.
    """

    task: str
    classes: tuple[str, ...]
    model: ElasticViT
    pixels: PixelSpec
    learning: LabelledImages
    profiling: LabelledImages
    device: torch.device

    def __post_init__(self) -> None:
        if self.model.classes != len(self.classes):
            raise ValueError(
                f"the model's head has {self.model.classes} classes; task {self.task!r} has {len(self.classes)}"
            )
        check_pictures("the pictures to learn from", self.learning, self.classes, self.model)
        check_pictures("the profiling set", self.profiling, self.classes, self.model)

    @cached_property
    def answers_NC(self) -> Tensor:
        """The vanilla model's logits (N, C) on the pictures to learn from, with all tokens; computed once."""
        runner = ElasticRunner(self.model, self.pixels, device=str(self.device), graphs=False)
        task, pictures_NHWC = runner.own_task(), self.learning.pictures_NHWC
        answers: list[FloatArray] = []
        for first in range(0, len(self.learning), ANSWERS_BATCH):
            batch_BHWC = pictures_NHWC[first : first + ANSWERS_BATCH]
            answers += runner.answer(batch_BHWC, 0, [task] * len(batch_BHWC))
        return torch.from_numpy(np.stack(answers))

    def key(self, config: TuneConfig) -> str:
        """Returns 16 hex digits that depend on everything that determines a tuned model, except its number."""
        parts = [state_hash([self.model]), repr(config), repr(self.pixels), self.learning.digest(), str(self.classes)]
        return digest(parts)[:16]


class Taught(SeededDataset[Sequence[Tensor]]):
    """Pictures, labels and the vanilla model's logits (C,) for each picture."""

    def __init__(self, pictures: Pictures, answers_NC: Tensor, seed: int):
        super().__init__(len(pictures), seed)
        self._pictures, self._answers_NC = pictures, answers_NC

    def sample(self, index: int, rng: np.random.Generator) -> Sequence[Tensor]:
        return *self._pictures.sample(index, rng), self._answers_NC[index]


class GivenUp(Exception):
    """Tuning was stopped because it would exceed its allowance. ``seconds`` is the time that it took."""

    def __init__(self, number: int, seconds: float) -> None:
        super().__init__(f"tuning for {number} was stopped after {seconds:.1f} s: the time budget is spent")
        self.seconds = seconds


def start(subject: Subject, config: TuneConfig) -> ElasticViT:
    """Returns a trainable copy of the vanilla model, with predictors if it prunes. Frozen parameters stay frozen."""
    vit = copy.deepcopy(subject.model.vit)
    pruning: Pruning | None = None
    if config.reducer == "pruning":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            pruning = Pruning(vit)
    schedules = subject.model.schedules if pruning is None else None
    model = ElasticViT(vit, schedules, pruning, subject.model.merge_order).to(subject.device)
    model.requires_grad_(True)
    for name, parameter in vit.named_parameters():
        if name.startswith(config.frozen):
            parameter.requires_grad_(False)
    return model


def with_head(model: ElasticViT, classes: int, seed: int) -> ElasticViT:
    """Returns a copy of the model with a new, random head for ``classes`` classes."""
    vit = copy.deepcopy(model.vit)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vit.head = nn.Linear(model.width, classes)
        nn.init.trunc_normal_(vit.head.weight, std=0.02)
        nn.init.zeros_(vit.head.bias)
    vit.num_classes = classes
    return ElasticViT(vit, model.schedules, merge_order=model.merge_order).eval().requires_grad_(False)


def tune(
    subject: Subject,
    number: int,
    config: TuneConfig,
    *,
    folder: Path,
    allowance_s: float = math.inf,
    on_epoch: OnEpoch = ignore_epochs,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[ElasticViT, float]:
    """Tunes a model at ``number``. Returns it with the seconds it took, including those before an interruption.

    At number 0 with target "vanilla" there is nothing to learn, so the result is the vanilla model after 0 seconds.

    Raises GivenUp as soon as the next epoch would exceed ``allowance_s``, ValueError for a number beyond the model's
    tokens, TrainingDiverged, CheckpointError if ``folder`` belongs to another run, and DiskFull.
    """
    model = start(subject, config)
    check_numbers([number], model)
    if number == 0 and config.target == "vanilla" and config.reducer == "merging":
        return model.eval().requires_grad_(False), 0.0
    dataset, loss = learning_of(subject, model, number, config)
    timing = folder / f"{number}.seconds.json"
    before_s = _seconds(timing)
    began_s = last_s = clock()

    def after(report: EpochReport) -> None:
        nonlocal last_s
        now_s = clock()
        spent_s, epoch_s, last_s = before_s + now_s - began_s, now_s - last_s, now_s
        write_atomically(timing, json.dumps({"seconds": spent_s}))
        on_epoch(report)
        if report.epoch < report.epochs and spent_s + epoch_s > allowance_s:
            raise GivenUp(number, min(spent_s, allowance_s))

    fit(
        model,
        dataset,
        loss,
        config.train,
        seed=config.seed,
        run=f"number {number} {subject.key(config)}",
        checkpoint=folder / f"{number}.safetensors",
        device=subject.device,
        on_epoch=after,
    )
    spent_s = _seconds(timing)
    if spent_s > allowance_s:
        raise GivenUp(number, allowance_s)
    return model.eval().requires_grad_(False), spent_s


def learning_of(
    subject: Subject, model: ElasticViT, number: int, config: TuneConfig
) -> tuple[SeededDataset[Sequence[Tensor]], Losses]:
    """Returns the data set and the loss for tuning ``model``."""
    train = config.train
    pictures = Pictures(subject.learning, subject.pixels, augment=train.augment, seed=config.seed)
    teacher = subject.model.to(subject.device).eval().requires_grad_(False)
    if isinstance(model.reducer, Pruning):
        return PrunedPictures(pictures, model.reducer, config.seed), PruningLoss(model, teacher, number, train)

    def from_labels(logits_BC: Tensor, batch: Sequence[Tensor]) -> Tensor:
        return functional.cross_entropy(logits_BC, batch[1], label_smoothing=train.label_smoothing)

    def from_vanilla(logits_BC: Tensor, batch: Sequence[Tensor]) -> Tensor:
        if len(batch) > 2:
            vanilla_BC = batch[2]
        else:
            with torch.no_grad():
                vanilla_BC = teacher(batch[0])
        log_BC, vanilla_BC = logits_BC.log_softmax(dim=-1), vanilla_BC.log_softmax(dim=-1)
        return functional.kl_div(log_BC, vanilla_BC, reduction="batchmean", log_target=True)

    def loss(batch: Sequence[Tensor]) -> Tensor:
        logits_BC = model(batch[0], -number)
        match config.target:
            case "labels":
                return from_labels(logits_BC, batch)
            case "vanilla":
                return from_vanilla(logits_BC, batch)
            case "both":
                return from_vanilla(logits_BC, batch) + LABELS_WEIGHT * from_labels(logits_BC, batch)

    if config.target == "labels" or train.augment:
        return pictures, loss
    return Taught(pictures, subject.answers_NC, config.seed), loss


@dataclass(frozen=True)
class Probe:
    """The result of probing. ``step_s[number]`` is the measured time of a step, ``seconds`` the time of the probe."""

    step_s: Mapping[int, float]
    seconds: float


def probe(
    subject: Subject,
    numbers: Sequence[int],
    config: TuneConfig,
    *,
    steps: int = PROBE_STEPS,
    clock: Callable[[], float] = time.perf_counter,
) -> Probe:
    """Measures a step at the smallest and the largest of ``numbers``: the fastest of ``steps`` steps after a first one.

    Raises ValueError for numbers beyond the model's tokens.
    """
    steps_of = {number: one_step(subject, number, config) for number in sorted({min(numbers), max(numbers)})}
    began_s = clock()
    measured: dict[int, float] = {}
    for number, step in steps_of.items():
        step()
        took = []
        for _ in range(steps):
            step_began_s = clock()
            step()
            took.append(clock() - step_began_s)
        measured[number] = min(took)
    return Probe(measured, clock() - began_s)


def one_step(subject: Subject, number: int, config: TuneConfig) -> Callable[[], None]:
    """Returns a function that does one step like ``tune``: read and shift pictures, forward, backward, update."""
    model = start(subject, config)
    check_numbers([number], model)
    dataset, loss = learning_of(subject, model, number, config)
    optimizer = optimizer_for(model, config.train)
    indices = itertools.cycle(range(len(dataset)))
    size = min(config.train.batch_size, len(dataset))

    def step() -> None:
        samples = [dataset[next(indices)] for _ in range(size)]
        batch = [torch.stack(column).to(subject.device) for column in zip(*samples, strict=True)]
        value = loss(batch)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        optimizer.step()
        value.item()  # waits for the device

    return step


def predicted_seconds(
    subject: Subject, measured: Probe, numbers: Sequence[int], config: TuneConfig
) -> dict[int, float]:
    """Predicts the seconds of tuning at each of ``numbers``.

    The time of a step is linear in the operations of the model, through the two probed numbers. The number of steps
    follows from the pictures and epochs.
    """
    model = start(subject, config)
    steps = config.train.epochs * math.ceil(len(subject.learning) / config.train.batch_size)
    low, high = min(measured.step_s), max(measured.step_s)
    dear, cheap = model.operations(-low), model.operations(-high)
    slope = 0.0 if dear == cheap else (measured.step_s[low] - measured.step_s[high]) / (dear - cheap)
    least_s = min(measured.step_s.values()) / 10
    return {
        number: steps * max(least_s, measured.step_s[high] + slope * (model.operations(-number) - cheap))
        for number in numbers
    }


def tensors_of_model(model: ElasticViT) -> dict[str, Tensor]:
    """Returns the model's tensors as a store keeps them: with timm's names, and ``reducer.*``."""
    reducer = model.reducer.state_dict() if isinstance(model.reducer, nn.Module) else {}
    return {**model.vit.state_dict(), **{f"reducer.{name}": tensor for name, tensor in reducer.items()}}


def _seconds(path: Path) -> float:
    try:
        return float(json.loads(path.read_text(encoding="utf-8"))["seconds"])
    except FileNotFoundError:
        return 0.0
