"""Makes a task of a checkpoint's own head, so that a trained classifier answers without any further training."""

import json
from pathlib import Path
from typing import Any

import torch

from isthmus.cloud.elastic.model.weights import ModelError, class_names, load_vit
from isthmus.cloud.elastic.tasks.task import TaskSpec, TaskWeights
from isthmus.data.files import read_text
from isthmus.proto.limits import MAX_CLASSES

MAX_CLASSES_BYTES = 8 << 20


def own_head(source: str, name: str, classes: Path | None = None) -> tuple[TaskSpec, TaskWeights]:
    """Returns the task ``name`` of the model's own head.

    ``source`` is as for ``load_vit``. ``classes`` is a file with the names of the classes, in the order of the head: a
    JSON list, or one name per line. Without it they are those of the model's configuration.
    Raises ValueError if the model is not available, has no head that a task can use, or its classes have no names.
    """
    vit: Any = load_vit(source)
    head = vit.head
    if not isinstance(head, torch.nn.Linear) or hasattr(vit, "head_dist"):
        raise ModelError(f"{source} has no head of one linear layer that a task can use")
    count = head.out_features
    if count > MAX_CLASSES:
        raise ModelError(f"the head has {count} classes; a task has at most {MAX_CLASSES}")
    names = class_names(vit, source) if classes is None else read_classes(classes)
    if not names:
        raise ModelError(
            f"nothing names the {count} classes of the head: give --classes with a file of names, one per line, or put "
            'a config.json with "label_names" beside the model'
        )
    if len(names) != count:
        raise ModelError(f"{len(names)} names of classes for a head of {count} classes")
    weight_CD = head.weight.detach().float().numpy().copy()
    bias = torch.zeros(count) if vit.head.bias is None else head.bias.detach().float()
    return TaskSpec(name, names), TaskWeights(weight_CD, bias.numpy().copy(), {})


def read_classes(path: Path) -> tuple[str, ...]:
    """Reads names of classes: a JSON list, or one name per line. Raises ValueError for another file, OSError."""
    text = read_text(path, limit_bytes=MAX_CLASSES_BYTES)
    if text.lstrip().startswith("["):
        try:
            return tuple(map(str, json.loads(text)))
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{path.name} is not a JSON list: {error}") from error
    return tuple(line.strip() for line in text.splitlines() if line.strip())
