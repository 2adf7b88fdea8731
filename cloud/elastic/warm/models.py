"""Serves each batch on the warmed model that is best for its gamma, and loads the next models before they are needed.

A query never waits for a file. If the best model is not in memory, the best one in memory answers. If none is in
memory, the vanilla model answers with the task's own head; if the store's models prune, it keeps all tokens, since it
cannot prune. After every batch, the models for its gamma and for the nearest gammas are announced, as many as fit,
because load rises and falls gradually.
"""

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from isthmus.cloud.elastic.model.executor import Image, Item, ModelExecutor, stacked
from isthmus.cloud.elastic.model.pruning import pruning_of
from isthmus.cloud.elastic.model.runner import DTYPES, ElasticRunner, ServedTask
from isthmus.cloud.elastic.model.vit import ElasticViT
from isthmus.cloud.elastic.model.weights import like
from isthmus.cloud.elastic.tasks.task import FloatArray, Task
from isthmus.cloud.elastic.warm.residency import Residency
from isthmus.cloud.elastic.warm.store import TYPES, Card, Common, Stored, StoreError, WarmStore, profiled
from isthmus.data.images import PixelSpec

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Ready:
    """A warmed model on its device, with its own head."""

    runner: ElasticRunner
    task: ServedTask


def model_of(
    card: Card, tensors: Mapping[str, Tensor], base: ElasticViT, schedules: Mapping[int, Sequence[int]] | None = None
) -> ElasticViT:
    """Builds the model of a card with the architecture of ``base``. It uses the given tensors without a copy.

    Raises StoreError if the tensors do not form such a model.
    """
    try:
        plain = {name: tensor for name, tensor in tensors.items() if not name.startswith("reducer.")}
        vit = like(base.vit, {name: tuple(tensor.shape) for name, tensor in plain.items()})
        with torch.device("meta"):  # allocates nothing, since all tensors are given
            pruning = pruning_of(vit, tensors)
        vit.load_state_dict(plain, assign=True)
        if pruning is not None:
            own = {name.removeprefix("reducer."): tensor for name, tensor in tensors.items() if name not in plain}
            pruning.load_state_dict(own, assign=True)
        made = ElasticViT(vit, schedules if pruning is None else None, pruning, base.merge_order)
        return made.eval().requires_grad_(False)
    except (KeyError, RuntimeError, AssertionError, ZeroDivisionError, ValueError) as error:
        raise StoreError(f"model {card.name} does not hold the weights of the served architecture: {error}") from error


def timed_model(store: WarmStore, base: ElasticViT) -> ElasticViT:
    """Returns the model to measure times with: ``base`` if the store's models merge, one of them if they prune.

    Raises StoreError.
    """
    if store.common().reducer == "merging":
        return base
    name = min(store.profiled().accuracy)
    return model_of(store.card(name), store.load(name), base)


class WarmModels:
    """The warmed models of a store, in memory up to ``limit_bytes``. ``base`` runs the vanilla model.

    Raises StoreError for a store that cannot be read or has no usable model, and for a limit that is too small for the
    largest model. Raises ValueError for int8 and for compiled code, which belong to the weights of one model.
    """

    def __init__(self, path: Path, base: ElasticRunner, *, limit_bytes: int | None = None) -> None:
        self.store = WarmStore(path)
        self.common: Common = self.store.common()
        if base.number_type == "int8" or base.compiled:
            raise ValueError(
                "warmed models are served in float32 or bfloat16, and not compiled: measure the profile with "
                "--number-type float32 or bfloat16"
            )
        if base.model.expert_layers:
            raise StoreError("warmed models are dense: a model with experts is served without them")
        if self.common.reducer == "merging" and self.common.merge_order != base.model.merge_order:
            raise StoreError(
                f"the warmed models were tuned with tokens merged in the order {self.common.merge_order!r}, and the "
                f"profile was measured with {base.model.merge_order!r}: measure one with --merge-order "
                f"{self.common.merge_order}"
            )
        self._base = base
        good, bad = self.store.usable()
        for name, card in list(good.items()):
            if (why := self._foreign(card)) is not None:
                bad[name] = why
                del good[name]
        for name, why in bad.items():
            log.error("the warmed model %s is left out, others serve on: %s", name, why)
        if not good:
            raise StoreError(f"{path} holds no model that can be used: {'; '.join(bad.values()) or 'it is empty'}")
        self.left_out = bad
        self._ranked: dict[int, tuple[str, ...]] = {}
        self._near: dict[tuple[int, tuple[int, ...], int], tuple[str, ...]] = {}
        self.switches = 0
        """Number of batches that ran on another model than the batch before."""
        self.missed = 0
        """Number of batches that another model answered, because the best one was not in memory."""
        self.latest: str | None = None
        self.cards = good
        self.profiled = profiled(good.values())
        dtype = DTYPES[base.number_type]

        def placed(tensor: Tensor) -> Tensor:
            return tensor.to(base.device, dtype)

        def bytes_of(stored: Stored) -> int:
            return stored.bytes // TYPES[stored.dtype].itemsize * dtype.itemsize

        self.residency: Residency[Ready] = Residency(
            self.store, good, self._built, limit_bytes=limit_bytes, placed=placed, bytes_of=bytes_of
        )

    @property
    def pixels(self) -> PixelSpec:
        """How the models read pictures."""
        return self._base.pixels

    def serves(self, task: Task) -> bool:
        """Returns True if the models belong to this task, by its name and classes."""
        return self.fits(task.name, task.spec.classes)

    def fits(self, name: str, classes: Sequence[str]) -> bool:
        """Returns True if the models belong to the task with this name and these classes."""
        return (name, tuple(classes)) == (self.common.task, self.common.classes)

    def accuracy(self, task: Task, gammas: Collection[int]) -> dict[int, float]:
        """Returns the accuracy to plan with, by gamma; empty for another task."""
        return self.profiled.warmed(gammas) if self.serves(task) else {}

    def announce_near(self, gamma: int, gammas: Sequence[int]) -> None:
        """Starts loading the best models for ``gamma`` and the gammas nearest to it, as many as fit."""
        key = (gamma, tuple(gammas), len(self.residency.broken))
        if key not in self._near:
            wanted: list[str] = []
            for near in sorted((each for each in gammas if each <= 0), key=lambda each: (abs(each - gamma), each)):
                best = next((name for name in self._best(-near) if name not in self.residency.broken), None)
                if best is not None and best not in wanted:
                    wanted.append(best)
            self._near[key] = self.residency.fitting(wanted)
        self.residency.announce(self._near[key])

    def _best(self, number: int) -> tuple[str, ...]:
        if number not in self._ranked:
            self._ranked[number] = self.profiled.ranked(number)
        return self._ranked[number]

    def answer(self, images: Image, gamma: int) -> list[FloatArray] | None:
        """Returns the logits of each image from the best model in memory, or None. It never waits for a file."""
        for place, name in enumerate(self._best(-gamma)):
            with self.residency.using(name) as ready:
                if ready is not None:
                    self.missed += place > 0
                    self.switches += name != self.latest
                    self.latest = name
                    return ready.runner.answer(images, gamma, [ready.task] * len(images))
        self.missed += 1
        return None

    def wait(self, timeout_s: float | None = None) -> bool:
        """Waits until the announced models are in memory. Use it before serving, never while queries wait."""
        return self.residency.wait(timeout_s=timeout_s)

    def close(self) -> None:
        """Stops loading and releases all models."""
        self.residency.close()

    def _built(self, card: Card, tensors: Mapping[str, Tensor]) -> Ready:
        model = model_of(card, tensors, self._base.model, self._base.model.schedules)
        runner = ElasticRunner(
            model,
            self._base.pixels,
            device=str(self._base.device),
            number_type=self._base.number_type,
            graphs=False,  # capturing a graph takes longer than a batch
        )
        return Ready(runner, runner.own_task())

    def _foreign(self, card: Card) -> str | None:
        """Returns why these weights do not belong to the served model's architecture; None: they do."""
        wanted = {name: tuple(tensor.shape) for name, tensor in self._base.model.vit.state_dict().items()}
        own = {name: stored.shape for name, stored in card.tensors.items() if not name.startswith("reducer.")}
        for name in sorted(wanted.keys() | own.keys()):
            if not name.startswith("head.") and wanted.get(name) != own.get(name):
                return f"{card.name}.json is of another model: {name} is {own.get(name)}, here {wanted.get(name)}"
        classes = len(self.common.classes)
        if own.get("head.weight") != (classes, self._base.model.width) or own.get("head.bias") != (classes,):
            return f"{card.name}.json has no head for the {classes} classes of {self.common.task}"
        if card.heads != self._base.model.heads:
            return f"{card.name}.json is of another model: {card.heads} heads of attention"
        if (self.common.reducer == "pruning") != any(name.startswith("reducer.") for name in card.tensors):
            return f"{card.name}.json does not reduce by {self.common.reducer}"
        return None


class WarmExecutor:
    """An executor (see model/executor.py) that runs the warmed task on warmed models, all others on ``base``."""

    def __init__(self, base: ModelExecutor, warm: WarmModels, gammas: Sequence[int]) -> None:
        self._base, self._warm, self._gammas = base, warm, tuple(gammas)
        warm.announce_near(0, self._gammas)

    def prepare(self, task: Task) -> None:
        self._base.prepare(task)

    def run(self, items: Sequence[Item], gamma: int) -> list[FloatArray]:
        warmed = [index for index, item in enumerate(items) if gamma <= 0 and self._warm.serves(item.task)]
        answers: list[FloatArray | None] = [None] * len(items)
        if warmed:
            found = self._warm.answer(stacked([items[index] for index in warmed], self._warm.pixels), gamma)
            for index, logits_C in zip(warmed, found or (), strict=found is not None):
                answers[index] = logits_C
            self._warm.announce_near(gamma, self._gammas)
        rest = [index for index, logits_C in enumerate(answers) if logits_C is None]
        if rest:
            able = gamma if self._warm.common.reducer == "merging" else max(gamma, 0)
            for index, logits_C in zip(rest, self._base.run([items[index] for index in rest], able), strict=True):
                answers[index] = logits_C
        return [logits_C for logits_C in answers if logits_C is not None]
