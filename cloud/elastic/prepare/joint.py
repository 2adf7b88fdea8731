"""Trains one model for several tasks at once, with experts or without: backbone, heads and routers together.

M3ViT's training: the loss of a batch of all tasks, plus what keeps the experts evenly used (experts/balance.py), with
noise on the routers' logits. Additions of ours:

- A task's router begins on experts that together are the dense MLP (``start`` "apart"), so training begins with the
  dense model's answers; neighbouring tasks begin on other experts as long as there are some. With "even" all experts
  begin alike: then a token of 4 experts among 16 begins with a quarter of the dense MLP.
- In half of the batches fewer experts than usual are used, drawn at random, so that a server may use fewer as well.

Axes: B pictures, T tasks, M layers with experts, D width, E experts, C classes, V width of a task's embedding.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from isthmus.cloud.elastic.experts import balance
from isthmus.cloud.elastic.experts.convert import group
from isthmus.cloud.elastic.experts.layer import Routing, Seen
from isthmus.cloud.elastic.model.vit import ElasticViT
from isthmus.cloud.elastic.prepare.prompts import HEAD, Pictures, Rows, all_features
from isthmus.cloud.elastic.tasks.router import ExpertsShape, TaskRouter, windows
from isthmus.cloud.elastic.tasks.task import TaskWeights
from isthmus.data.cache.keys import digest
from isthmus.data.images import LabelledImages, PixelSpec
from isthmus.distill.recipes import TrainConfig
from isthmus.distill.training.checkpoint import state_hash
from isthmus.distill.training.loop import EpochReport, SeededDataset, fit

JOINT: Final = TrainConfig(
    epochs=10, batch_size=64, optimizer="adamw", learning_rate=2e-4, weight_decay=0.05, schedule="cosine"
)
FROZEN: Final = ("patch_embed.", "pos_embed", "cls_token", "dist_token", "reg_token", "norm_pre.")
EMBEDDING: Final = 16
START_LOGIT: Final = 4.0
"""How much larger the logits of a task's first experts begin, if tasks begin apart: with 4 of 16 experts, they begin
with 95 % of the weight."""
ROUTER_DEVIATION: Final = 0.02


@dataclass(frozen=True)
class JointTask:
    """A task to learn: its name, how many classes it has, and its pictures."""

    name: str
    classes: int
    labelled: LabelledImages


@dataclass(frozen=True)
class JointConfig:
    """How to train. Parameters of the backbone whose timm names start with one of ``frozen`` do not change.

    ``router``: one router per task, or one shared, which reads the token beside an embedding of the task. ``window``:
    how many experts a task may use; None: all. ``noise``: deviation of the noise on logits, times the number of
    experts. ``any_k``: train with fewer experts, too.
    """

    train: TrainConfig = JOINT
    router: Literal["task", "shared"] = "task"
    start: Literal["apart", "even"] = "apart"
    window: int | None = None
    noise: float = 1.0
    balance: float = balance.WEIGHT
    any_k: bool = True
    frozen: tuple[str, ...] = FROZEN
    seed: int = 0


class Routers(nn.Module):
    """The routers of all tasks as they are trained."""

    def __init__(self, shape: ExpertsShape, width: int, hidden: int, units: int, tasks: int, config: JointConfig):
        super().__init__()
        self.shared = config.router == "shared"
        count = shape.experts if config.window is None else config.window
        self.spans = [(first, count) for first in windows(tasks, shape.experts, count)]
        rng = torch.Generator().manual_seed(config.seed)
        copies = 1 if self.shared else tasks
        weight = torch.randn(copies, shape.layers, width, shape.experts, generator=rng) * ROUTER_DEVIATION
        self.weight_TMDE = nn.Parameter(weight)
        bias_TE = torch.zeros(tasks, shape.experts)
        if config.start == "apart":
            for task, (first, span) in enumerate(self.spans):
                start, many = group(task, shape, hidden, units) if config.window is None else (first, span)
                bias_TE[task, start : start + many] = START_LOGIT
        bias_TME = bias_TE[:, None].repeat(1, shape.layers, 1)
        if self.shared:
            embedding_TV = torch.randn(tasks, max(tasks, EMBEDDING), generator=rng)
            self.embedding_TV = nn.Parameter(embedding_TV)
            inverse_VT = torch.linalg.pinv(embedding_TV)
            self.of_embedding_MVE = nn.Parameter(torch.einsum("vt,tme->mve", inverse_VT, bias_TME))
        else:
            self.bias_TME = nn.Parameter(bias_TME)
        outside_TE = torch.full((tasks, shape.experts), -torch.inf)
        for task, (first, span) in enumerate(self.spans):
            outside_TE[task, first : first + span] = 0
        self.register_buffer("outside_TE", outside_TE, persistent=False)

    def biases(self) -> Tensor:
        """Returns the bias of each task, layer and expert (T, M, E), as if all experts were in its window."""
        if not self.shared:
            return self.bias_TME
        return torch.einsum("tv,mve->tme", self.embedding_TV, self.of_embedding_MVE)

    def tables(self) -> tuple[Tensor, Tensor]:
        """Returns (T, M, D, E) and (T, M, E), minus infinity outside of windows."""
        bias_TME = self.biases()
        outside_TE: Tensor = self.get_buffer("outside_TE")
        return self.weight_TMDE.expand(len(bias_TME), -1, -1, -1), bias_TME + outside_TE[:, None]

    def of(self, task: int) -> TaskRouter:
        """Returns the router of one task, as it is served."""
        weight_MDE = self.weight_TMDE[0 if self.shared else task].detach().cpu().numpy().copy()
        bias_ME = self.biases()[task].detach().cpu().numpy().copy()
        return TaskRouter(weight_MDE, bias_ME, *self.spans[task])


class Joint(nn.Module):
    """A model with a head per task and, if it has experts, their routers."""

    def __init__(self, model: ElasticViT, heads: Sequence[nn.Linear], units: int, config: JointConfig) -> None:
        super().__init__()
        self.model, self.heads, self.config = model, nn.ModuleList(heads), config
        self.routers: Routers | None = None
        if model.expert_layers:
            hidden = model.expert_layers[0].hidden
            self.routers = Routers(model.experts, model.width, hidden, units, len(heads), config)

    def forward(
        self, images_BCHW: Tensor, tasks_B: Tensor, rng: torch.Generator | None = None
    ) -> tuple[Tensor, list[Seen]]:
        """Returns the features (B, D), and what the layers with experts decided. ``rng``: train, with noise."""
        seen: list[Seen] = []
        if self.routers is None:
            return self.model.features(images_BCHW), seen
        k, noise = self.model.experts.k, None
        if rng is not None:
            deviation = self.config.noise / self.model.experts.experts
            if self.config.any_k and torch.rand((), generator=rng) < 0.5:
                k = int(torch.randint(1, k + 1, (), generator=rng))

            def noise(logits_NE: Tensor) -> Tensor:
                drawn_NE = torch.randn(logits_NE.shape, generator=rng).to(logits_NE.device)
                return logits_NE + deviation * drawn_NE

        routing = Routing(*self.routers.tables(), k, tasks_B, noise=noise, seen=seen.append)
        return self.model.features(images_BCHW, routing=routing), seen

    def loss(self, batch: Sequence[Tensor]) -> Tensor:
        """Returns the loss of (pictures, labels, tasks, keys); the noise depends on the keys alone."""
        images_BCHW, labels_B, tasks_B, keys_B = batch
        rng = torch.Generator().manual_seed(int(keys_B.sum()))
        features_BD, seen = self(images_BCHW, tasks_B, rng)
        total = self.errors(features_BD, labels_B, tasks_B).mean()
        if self.routers is not None and self.config.balance:
            deviation = self.config.noise / self.model.experts.experts
            for each in seen:
                experts, k = self.model.experts.experts, each.experts_NK.shape[1]
                used_E = balance.importance(each.experts_NK, each.weights_NK, experts)
                load_E = balance.load(each.clean_NE, each.noisy_NE, k, deviation)
                total = total + balance.loss(used_E, load_E, self.config.balance)
        return total

    def errors(self, features_BD: Tensor, labels_B: Tensor, tasks_B: Tensor) -> Tensor:
        """Returns the cross entropy of each picture (B,), by the head of its task."""
        found_B = features_BD.new_zeros(len(labels_B))
        for task, head in enumerate(self.heads):
            mine = (tasks_B == task).nonzero()[:, 0]
            if len(mine):
                smoothing = self.config.train.label_smoothing
                errors = functional.cross_entropy(
                    head(features_BD[mine]), labels_B[mine], reduction="none", label_smoothing=smoothing
                )
                found_B = found_B.index_put((mine,), errors)
        return found_B


class Mixed(SeededDataset[Sequence[Tensor]]):
    """``pictures`` of each task, drawn again in each epoch: picture, label, task, random key."""

    def __init__(self, tasks: Sequence[JointTask], pixels: PixelSpec, pictures: int, *, augment: bool, seed: int):
        super().__init__(len(tasks) * pictures, seed)
        self._sets = [Pictures(task.labelled, pixels, augment=augment, seed=seed) for task in tasks]

    def sample(self, index: int, rng: np.random.Generator) -> Sequence[Tensor]:
        task = index % len(self._sets)
        picture = int(rng.integers(len(self._sets[task])))
        key = torch.tensor(int(rng.integers(1 << 40)))
        return *self._sets[task].sample(picture, rng), torch.tensor(task), key


def first_heads(
    model: ElasticViT,
    pixels: PixelSpec,
    tasks: Sequence[JointTask],
    *,
    device: torch.device,
    seed: int = 0,
    config: TrainConfig = HEAD,
) -> list[nn.Linear]:
    """Learns a head per task on the features of a dense model, which does not change. Training goes on from there.

    Pictures that several tasks share are computed once. Raises TrainingDiverged.
    """
    known: dict[str, Tensor] = {}
    heads = []
    for task in tasks:
        unlabelled = LabelledImages(task.labelled.pictures_NHWC, np.zeros(len(task.labelled), np.int64))
        of_pictures = unlabelled.digest()
        if of_pictures not in known:
            known[of_pictures] = all_features(model, pixels, task.labelled, device)
        head = nn.Linear(model.width, task.classes)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)

        def loss(batch: Sequence[Tensor], head: nn.Linear = head) -> Tensor:
            return functional.cross_entropy(head(batch[0]), batch[1])

        rows = Rows(known[of_pictures], torch.from_numpy(task.labelled.labels_N), seed)
        fit(head, rows, loss, config, seed=seed, run=f"head {task.name}", device=device)
        heads.append(head.cpu())
    return heads


def learn_together(
    model: ElasticViT,
    pixels: PixelSpec,
    tasks: Sequence[JointTask],
    config: JointConfig,
    *,
    heads: Sequence[nn.Linear],
    units: int,
    pictures: int,
    device: torch.device,
    checkpoint: Path | None = None,
    on_epoch: Callable[[EpochReport], None] = lambda _report: None,
) -> tuple[ElasticViT, dict[str, TaskWeights], Joint]:
    """Trains ``model`` in place for all tasks, ``pictures`` of each per epoch. Returns it with each task's weights.

    ``heads`` are where the heads begin (``first_heads``); they are changed. ``units`` is the hidden width of the dense
    MLPs. With ``checkpoint``, the same call goes on after an interruption. Raises ValueError for labels beyond the
    classes, pictures of another size, or a window that does not fit; TrainingDiverged; CheckpointError if the
    checkpoint belongs to another run; and DiskFull.
    """
    check_tasks(model, tasks)
    model = model.to(device).requires_grad_(True)
    for name, parameter in model.vit.named_parameters():
        if name.startswith(config.frozen):
            parameter.requires_grad_(False)
    joint = Joint(model, heads, units, config)
    sets = [task.labelled.digest() for task in tasks]
    key = digest([state_hash([joint]), repr(config), repr(pixels), str(sets), str(pictures)])[:16]
    fit(
        joint,
        Mixed(tasks, pixels, pictures, augment=config.train.augment, seed=config.seed),
        joint.loss,
        config.train,
        seed=config.seed,
        run=f"joint {key}",
        checkpoint=checkpoint,
        device=device,
        on_epoch=on_epoch,
    )
    joint.eval().requires_grad_(False)
    learned = {}
    for place, (task, head) in enumerate(zip(tasks, joint.heads, strict=True)):
        assert isinstance(head, nn.Linear)
        router = None if joint.routers is None else joint.routers.of(place)
        weight_CD, bias_C = (tensor.detach().cpu().numpy().copy() for tensor in (head.weight, head.bias))
        learned[task.name] = TaskWeights(weight_CD, bias_C, {}, router)
    return model, learned, joint


def check_tasks(model: ElasticViT, tasks: Sequence[JointTask]) -> None:
    """Raises ValueError for tasks that cannot be learned together on this model."""
    names = [task.name for task in tasks]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"tasks {', '.join(names) or 'none'}: each must be there once, and there must be one")
    side = model.image_px
    for task in tasks:
        shape, labels_N = task.labelled.pictures_NHWC.shape[1:], task.labelled.labels_N
        if shape != (side, side, 3):
            raise ValueError(f"task {task.name}: pictures of shape {shape}; the model reads {(side, side, 3)}")
        least, most = labels_N.min(), labels_N.max()
        if least < 0 or most >= task.classes:
            raise ValueError(f"task {task.name}: labels from {least} to {most} for {task.classes} classes")
