"""Opens one variant: its file, on a device, with the model's own head as the task's."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from isthmus.cloud.elastic.model.runner import ElasticRunner, NumberType, ServedTask
from isthmus.cloud.elastic.model.vit import ElasticViT
from isthmus.cloud.elastic.model.weights import ModelError, load_vit, pixel_spec


@dataclass(frozen=True, eq=False)
class Ready:
    """A model on its device, with its own head as a task."""

    runner: ElasticRunner
    task: ServedTask

    @property
    def bytes(self) -> int:
        """Bytes of the model's weights on its device."""
        vit = self.runner.model.vit
        return sum(tensor.nbytes for tensor in (*vit.parameters(), *vit.buffers()))


def opened(file: Path | str, *, pixels: str | None, device: str, number_type: NumberType) -> Ready:
    """Opens a model. Weights are not packed, which would double their memory.

    Raises ModelError or ValueError for a model that is not available, has experts or no head of its own, and for int8.
    """
    if number_type == "int8":
        raise ValueError("variants run in float32 or bfloat16: making int8 weights takes longer than loading a model")
    vit: Any = load_vit(file)
    if getattr(vit, "identity", None) is not None:
        raise ModelError(f"{file} has experts; a variant is a dense model")
    runner = ElasticRunner(
        ElasticViT(vit),
        pixel_spec(vit, file, pixels),
        device=device,
        number_type=number_type,
        graphs=False,  # capturing a graph takes longer than a batch
    )
    return Ready(runner, runner.own_task())


def classes_of(ready: Ready) -> int:
    """Returns the number of classes of a model's head."""
    return len(ready.task.head_bias_C)


def shapes_of(ready: Ready) -> dict[str, tuple[int, ...]]:
    """Returns what two models of one size must share: the shapes of all weights but the head's, and the heads."""
    found = {
        name: tuple(tensor.shape)
        for name, tensor in ready.runner.model.vit.state_dict().items()
        if not name.startswith("head.")
    }
    return {**found, "heads": (ready.runner.model.heads,)}


def same_pictures(one: ElasticRunner, other: ElasticRunner) -> bool:
    """Returns whether two models read pictures alike."""
    return (one.pixels, one.pixels.crop) == (other.pixels, other.pixels.crop)


def is_cuda(device: str) -> bool:
    """Returns whether a device is a GPU, which computes after a call has returned."""
    return torch.device(device).type == "cuda"
