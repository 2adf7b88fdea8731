"""Tasks as files. `isthmus elastic prompts` writes them, and `isthmus elastic register` sends them to a server.

NAME.safetensors   head.weight, head.bias, prompts.<gamma>, router.*; as metadata: classes, mode, accuracy, and the
                   order of merging that the accuracy was measured with
NAME.json          the task's description (TaskSpec), with the measured accuracy
NAME.recipe.json   which labels of the data set belong to which class, to measure the accuracy again
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors.numpy
from safetensors import SafetensorError, safe_open

from isthmus.cloud.elastic.scheduling.merge_order import MergeOrder, order_in
from isthmus.cloud.elastic.tasks.recipes import TaskRecipe, read_recipe
from isthmus.cloud.elastic.tasks.task import ModelShape, TaskSpec, TaskWeights
from isthmus.data.files import read_bytes, read_text, write_atomically
from isthmus.proto.errors import IsthmusError


@dataclass(frozen=True, eq=False)
class TaskFiles:
    """A task with the recipe that it was made by."""

    recipe: TaskRecipe
    spec: TaskSpec
    weights: TaskWeights

    def save(self, folder: Path, merge_order: MergeOrder) -> Path:
        """Writes the three files and returns the path of the weights. Raises DiskFull.

        ``merge_order`` is the order that the accuracy was measured with.
        """
        weights, spec = self.weights, self.spec
        metadata = {
            "classes": json.dumps(spec.classes),
            "mode": spec.prompt_mode,
            "accuracy": json.dumps({str(gamma): share for gamma, share in spec.accuracy.items()}),
            "merge_order": merge_order,
        }
        path = folder / f"{spec.name}.safetensors"
        write_atomically(path, safetensors.numpy.save(weights.tensors(), metadata))
        write_atomically(folder / f"{spec.name}.recipe.json", json.dumps(asdict(self.recipe), indent=1))
        write_atomically(folder / f"{spec.name}.json", spec.to_json())
        return path


def order_of_task(folder: Path, name: str) -> MergeOrder | None:
    """Returns the order of merging that the task's accuracy was measured with; None if there is no such task.

    Raises ValueError if the file is damaged.
    """
    path = folder / f"{name}.safetensors"
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="np") as file:
            return order_in(file.metadata() or {})
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}; remove it to learn the task anew") from error


def load_tasks(folder: Path, model: ModelShape) -> list[TaskFiles]:
    """Returns all tasks of a folder, by name.

    Raises ValueError, with the task's name, if its files are missing, damaged, or do not fit the model.
    """
    found = []
    for path in sorted(folder.glob("*.recipe.json")):
        name = path.name.removesuffix(".recipe.json")
        try:
            recipe = read_recipe(str(path))
            spec = TaskSpec.from_json(read_text(folder / f"{name}.json"))
            data = read_bytes(folder / f"{name}.safetensors")
            weights = TaskWeights.from_bytes(data, classes=len(spec.classes), model=model)
        except (OSError, ValueError, KeyError, TypeError, IsthmusError) as error:
            raise ValueError(f"task {name!r} in {folder.name}: {error}") from error
        found.append(TaskFiles(recipe, spec, weights))
    return found
