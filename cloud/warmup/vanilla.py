"""The vanilla model of a task: what is warmed, and what serves where nothing warmed is better. And its files."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from isthmus.cloud.elastic.model.vit import ElasticViT
from isthmus.cloud.elastic.model.weights import load_vit
from isthmus.cloud.elastic.tasks.files import TaskFiles
from isthmus.cloud.elastic.tasks.recipes import TaskRecipe
from isthmus.cloud.elastic.tasks.task import TaskSpec, TaskWeights
from isthmus.cloud.warmup.compare.claims import in_turn
from isthmus.cloud.warmup.tuning import Subject, TuneConfig, tensors_of_model, tune, with_head
from isthmus.data.files import write_atomically
from isthmus.data.images import LabelledImages, PixelSpec
from isthmus.distill.training.loop import OnEpoch, ignore_epochs


def vanilla_subject(
    model: ElasticViT,
    pixels: PixelSpec,
    recipe: TaskRecipe,
    learning: LabelledImages,
    profiling: LabelledImages,
    config: TuneConfig,
    *,
    epochs: int,
    folder: Path,
    device: torch.device,
    on_epoch: OnEpoch = ignore_epochs,
) -> Subject:
    """What is warmed for a task. With ``epochs`` 0 the model as it is, which must have a head for the task's classes;
    else one with a new head, tuned for so many with all of its tokens and all of its weights.

    Interrupted, the same call goes on in ``folder``. Raises ValueError for a head of other classes, TrainingDiverged,
    CheckpointError.
    """
    if epochs == 0:
        if model.classes != len(recipe.classes):
            raise ValueError(
                f"the model's head is for {model.classes} classes and task {recipe.name!r} has {len(recipe.classes)}: "
                "give --vanilla-epochs, to learn the task first with all tokens"
            )
        return Subject(recipe.name, recipe.classes, model, pixels, learning, profiling, device)
    headed = with_head(model, len(recipe.classes), config.seed)
    subject = Subject(recipe.name, recipe.classes, headed, pixels, learning, profiling, device)
    path = folder / "vanilla.safetensors"
    whole = TuneConfig(
        dataclasses.replace(config.train, epochs=epochs, warmup_epochs=0.0),
        frozen=(),
        seed=config.seed,
        target="labels",
    )
    key = subject.key(whole)
    with in_turn(folder / "vanilla.lock"):  # several processes may evaluate in one folder
        if not _is_of(path, key):
            learned, _ = tune(subject, 0, whole, folder=folder / "vanilla", on_epoch=on_epoch)
            tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors_of_model(learned).items()}
            write_atomically(path, safetensors.torch.save(tensors, {"key": key}))
            for left in (folder / "vanilla").glob("0.*"):
                left.unlink()
    vit = load_vit(path, heads=model.heads)
    return dataclasses.replace(subject, model=ElasticViT(vit, model.schedules))


def save_task(subject: Subject, recipe: TaskRecipe, accuracy: Mapping[int, float], folder: Path) -> Path:
    """The task with the vanilla model's head as files that register it with a server; returns the weights' path.

    ``accuracy``: the vanilla model's, by number of merges.
    """
    head: Any = subject.model.vit.head
    weights = TaskWeights(
        head.weight.detach().float().cpu().numpy().copy(), head.bias.detach().float().cpu().numpy().copy(), {}
    )
    spec = TaskSpec(recipe.name, recipe.classes, accuracy={-number: share for number, share in accuracy.items()})
    return TaskFiles(recipe, spec, weights).save(folder)


def _is_of(path: Path, key: str) -> bool:
    """Whether the file is there, and of this run."""
    if not path.exists():
        return False
    with safetensors.safe_open(path, framework="pt") as file:
        return bool((file.metadata() or {}).get("key") == key)
