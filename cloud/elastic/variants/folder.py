"""A folder of model variants: for each task a small, a base and a large model, and what they take on this machine.

variants.json               sizes, times and accuracies (``Variants``)
TASK.recipe.json            which labels of a data set belong to which class
TASK/SIZE/model.safetensors the weights, and a config.json if there was one

``isthmus elastic variants`` writes it. All tasks have the same sizes, and a size has the same shape in all tasks.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

from isthmus.cloud.elastic.policies.infaas import SIZE_NAMES, ModelSize
from isthmus.cloud.elastic.scheduling.profile import Profile
from isthmus.cloud.elastic.tasks.task import TaskSpec, check_names
from isthmus.data.files import read_text, write_atomically
from isthmus.proto.errors import IsthmusError

FORMAT: Final = 1
FILE: Final = "variants.json"
WEIGHTS: Final = "model.safetensors"
MOST_BYTES: Final = 1 << 40


class BadVariants(ValueError):
    """A folder of variants that is missing, damaged or contradicts itself. The message says the way out."""


@dataclass(frozen=True)
class TaskVariants:
    """The variants of one task: its classes, and the hash of the weights by level."""

    classes: tuple[str, ...]
    hashes: Mapping[int, str]


@dataclass(frozen=True)
class Variants:
    """What is known of a folder of variants.

    ``profile`` has the level of a size (-1 small, 0 base, 1 large) in the place of gamma. ``pixels`` names how all
    models read pictures; None: as their config.json says.

    Raises BadVariants if sizes, tasks and profile contradict each other.
    """

    folder: Path
    profile: Profile
    sizes: tuple[ModelSize, ...]
    tasks: Mapping[str, TaskVariants]
    pixels: str | None = None

    def __post_init__(self) -> None:
        levels = tuple(size.level for size in self.sizes)
        if not set(levels) <= SIZE_NAMES.keys() or 0 not in levels or levels != self.profile.gammas:
            raise BadVariants("sizes must be small, base and large as they were profiled, with base among them")
        if not all(0 < size.memory_bytes <= MOST_BYTES and 0 < size.load_s < 1e6 for size in self.sizes):
            raise BadVariants("bytes and seconds of loading must be positive")
        if not self.tasks or self.tasks.keys() != self.profile.accuracy.keys():
            raise BadVariants("there must be a task, and an accuracy for each")
        for name, task in self.tasks.items():
            if set(task.hashes) != set(levels):
                raise BadVariants(f"task {name!r} lacks a size that others have")

    def file(self, task: str, level: int) -> Path:
        """Returns the file of weights of a task's model of a size."""
        return file_in(self.folder, task, level)

    def spec(self, task: str) -> TaskSpec:
        """Returns the description of a task. Its accuracy is by level."""
        return TaskSpec(task, self.tasks[task].classes, accuracy=dict(self.profile.accuracy[task]))

    def size(self, level: int) -> ModelSize:
        """Returns the size of a level. Raises KeyError if there is none."""
        return {size.level: size for size in self.sizes}[level]

    def with_task(self, name: str, task: TaskVariants, accuracy: Mapping[int, float]) -> "Variants":
        """Returns the variants with one task added or replaced."""
        return replace(self, profile=self.profile.with_task(name, accuracy), tasks={**self.tasks, name: task})

    def write(self) -> Path:
        """Writes variants.json and returns its path. Raises DiskFull or OSError."""
        raw = {
            "format": FORMAT,
            "pixels": self.pixels,
            "sizes": [asdict(size) for size in self.sizes],
            "tasks": {name: asdict(task) for name, task in self.tasks.items()},
            "profile": json.loads(self.profile.to_json()),
        }
        path = self.folder / FILE
        write_atomically(path, json.dumps(raw, indent=1) + "\n")
        return path

    @staticmethod
    def read(folder: Path) -> "Variants":
        """Reads what ``write`` wrote. Raises BadVariants."""
        path = folder / FILE
        way_out = "make the folder with 'isthmus elastic variants'"
        try:
            raw = json.loads(read_text(path))
            if raw["format"] != FORMAT:
                raise BadVariants(f"{path} has format {raw['format']!r}; this version reads format {FORMAT}")
            tasks = {}
            for name, task in raw["tasks"].items():
                check_names(name, task["classes"])
                hashes = {int(level): str(of) for level, of in task["hashes"].items()}
                tasks[name] = TaskVariants(tuple(task["classes"]), hashes)
            return Variants(
                folder,
                Profile.from_json(json.dumps(raw["profile"])),
                tuple(
                    ModelSize(int(of["level"]), int(of["memory_bytes"]), *map(float, (of["load_s"], of["cost"])))
                    for of in raw["sizes"]
                ),
                tasks,
                None if raw["pixels"] is None else str(raw["pixels"]),
            )
        except FileNotFoundError as error:
            raise BadVariants(f"there is no {path}; {way_out}") from error
        except BadVariants:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise BadVariants(f"{path} cannot be read: {error}; {way_out}") from error
        except IsthmusError as error:
            raise BadVariants(f"{path}: {error}; {way_out}") from error


def file_in(folder: Path, task: str, level: int) -> Path:
    """Returns where the weights of a task's model of a size are in ``folder``."""
    return folder / task / SIZE_NAMES[level] / WEIGHTS
