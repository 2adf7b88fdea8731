"""Tasks from a labelled data set: which of its labels belong to which class."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from isthmus.cloud.elastic.tasks.task import check_names
from isthmus.data.files import read_text
from isthmus.data.images import CIFAR10_CLASSES, LabelledImages
from isthmus.proto.errors import IsthmusError

LEFT_OUT: Final = -1


@dataclass(frozen=True)
class TaskRecipe:
    """``class_of_label[label]`` is an index into ``classes``, or -1 for a label whose pictures are left out.

    Raises ValueError for names that cannot be registered later (``check_names``), an index beyond the classes, and a
    class without a label.
    """

    name: str
    classes: tuple[str, ...]
    class_of_label: tuple[int, ...]

    def __post_init__(self) -> None:
        try:
            check_names(self.name, self.classes)
        except IsthmusError as error:
            raise ValueError(f"task {self.name!r}: {error}") from error
        wanted = set(range(len(self.classes)))
        if set(self.class_of_label) - {LEFT_OUT} != wanted:
            raise ValueError(
                f"task {self.name!r} has {len(self.classes)} classes, but its labels belong to "
                f"{sorted(set(self.class_of_label) - {LEFT_OUT})}"
            )

    def apply(self, labelled: LabelledImages) -> LabelledImages:
        """Returns the pictures of the task's labels, with the task's classes as labels.

        Raises ValueError for labels that the recipe does not list, and if no picture is left.
        """
        if labelled.labels_N.max() >= len(self.class_of_label):
            raise ValueError(
                f"task {self.name!r} lists labels below {len(self.class_of_label)}; the data set has higher ones"
            )
        classes_N = np.array(self.class_of_label, np.int64)[labelled.labels_N]
        known = np.flatnonzero(classes_N != LEFT_OUT)
        if not len(known):
            raise ValueError(f"task {self.name!r} lists none of the data set's labels")
        return LabelledImages(labelled.pictures_NHWC[known], classes_N[known])


def _grouped(name: str, labels: tuple[str, ...], groups: Mapping[str, tuple[str, ...]]) -> TaskRecipe:
    of_label = {label: position for position, members in enumerate(groups.values()) for label in members}
    return TaskRecipe(name, tuple(groups), tuple(of_label.get(label, LEFT_OUT) for label in labels))


_ANIMALS: Final = ("bird", "cat", "deer", "dog", "frog", "horse")
RECIPES: Final[dict[str, TaskRecipe]] = {
    recipe.name: recipe
    for recipe in (
        _grouped("cifar10", CIFAR10_CLASSES, {name: (name,) for name in CIFAR10_CLASSES}),
        _grouped(
            "animals-vehicles",
            CIFAR10_CLASSES,
            {"animal": _ANIMALS, "vehicle": ("airplane", "automobile", "ship", "truck")},
        ),
        _grouped("animals", CIFAR10_CLASSES, {name: (name,) for name in _ANIMALS}),
    )
}
"""The built-in tasks. All use CIFAR-10's labels."""


def read_recipe(source: str) -> TaskRecipe:
    """Returns a built-in recipe by its name, or reads one from a JSON file.

    The file holds {"name": ..., "classes": [...], "class_of_label": [...]}. In ``class_of_label``, null or -1 means
    that the label's pictures are left out. Raises ValueError for an unknown name, and a file that holds no recipe.
    """
    if source in RECIPES:
        return RECIPES[source]
    path = Path(source)
    if not path.is_file():
        raise ValueError(f"task {source!r} is neither a file nor one of {', '.join(RECIPES)}")
    try:
        raw = json.loads(read_text(path))
        name, classes, of_label = str(raw["name"]), raw["classes"], raw["class_of_label"]
        if not isinstance(classes, list) or not isinstance(of_label, list):
            raise ValueError(f"{path.name} is not a task recipe: classes and class_of_label must be lists")
        positions = tuple(LEFT_OUT if label is None else int(label) for label in of_label)
        return TaskRecipe(name, tuple(map(str, classes)), positions)
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path.name} is not a task recipe: {error}") from error


def split(labelled: LabelledImages, *, held_share: float, seed: int) -> tuple[LabelledImages, LabelledImages]:
    """Splits at random into (pictures to learn from, held-out pictures). OTAS holds out a fifth for profiling.

    Raises ValueError if either part would be empty.
    """
    held = round(held_share * len(labelled))
    if not 0 < held < len(labelled):
        raise ValueError(f"a share of {held_share} of {len(labelled)} pictures leaves one side empty")
    order_N = np.random.default_rng(seed).permutation(len(labelled))
    return labelled.only(np.sort(order_N[held:])), labelled.only(np.sort(order_N[:held]))
