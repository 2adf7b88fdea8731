"""Makes and saves the vanilla model of a task. It starts the warm-up, and serves if no warmed model is better."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from isthmus.cloud.elastic.model.vit import ElasticViT
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
    """Returns the subject of a task's warm-up.

    With ``epochs`` 0 it is the model itself, which must have a head for the task's classes. Otherwise the model gets a
    new head, and all its weights are tuned with all tokens for this many epochs. After an interruption, the same call
    resumes from ``folder``. Raises ValueError for a head with other classes, TrainingDiverged, and CheckpointError.
    """
    if epochs == 0:
        if model.classes != len(recipe.classes):
            raise ValueError(
                f"the model's head has {model.classes} classes and task {recipe.name!r} has {len(recipe.classes)}: "
                "give --vanilla-epochs to learn the task first with all tokens"
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
    headed.vit.load_state_dict(safetensors.torch.load_file(path))
    return dataclasses.replace(subject, model=headed)


def save_task(subject: Subject, recipe: TaskRecipe, accuracy: Mapping[int, float], folder: Path) -> Path:
    """Saves the task, with the vanilla model's head, as files for 'isthmus elastic register'. Returns their path.

    ``accuracy`` is that of the vanilla model by reduction number.
    """
    head: Any = subject.model.vit.head
    weights = TaskWeights(
        head.weight.detach().float().cpu().numpy().copy(), head.bias.detach().float().cpu().numpy().copy(), {}
    )
    spec = TaskSpec(recipe.name, recipe.classes, accuracy={-number: share for number, share in accuracy.items()})
    return TaskFiles(recipe, spec, weights).save(folder, subject.model.merge_order)


def _is_of(path: Path, key: str) -> bool:
    """Returns True if the file exists and belongs to this run."""
    if not path.exists():
        return False
    with safetensors.safe_open(path, framework="pt") as file:
        return bool((file.metadata() or {}).get("key") == key)
