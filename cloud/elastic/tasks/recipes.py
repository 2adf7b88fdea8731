"""Tasks made of a labelled set: which of its labels count as which class."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from isthmus.data.images import CIFAR10_CLASSES, LabelledImages

LEFT_OUT: Final = -1


@dataclass(frozen=True)
class TaskRecipe:
    """``class_of_label[label]`` is a position in ``classes``, or -1 for pictures that the task does not know.

    Raises ValueError for fewer than two classes, a position beyond them, and a class without a label.
    """

    name: str
    classes: tuple[str, ...]
    class_of_label: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.classes) < 2 or len(set(self.classes)) != len(self.classes):
            raise ValueError(f"task {self.name!r}: at least two different classes are wanted")
        wanted = set(range(len(self.classes)))
        if set(self.class_of_label) - {LEFT_OUT} != wanted:
            raise ValueError(f"task {self.name!r}: labels stand for classes {sorted(set(self.class_of_label))}")

    def apply(self, labelled: LabelledImages) -> LabelledImages:
        """The pictures that the task knows, with its own classes. Raises ValueError for labels it was not told of, and
        where no picture is left."""
        if labelled.labels_N.max() >= len(self.class_of_label):
            raise ValueError(f"task {self.name!r} knows labels below {len(self.class_of_label)}; the set has more")
        classes_N = np.array(self.class_of_label, np.int64)[labelled.labels_N]
        known = np.flatnonzero(classes_N != LEFT_OUT)
        if not len(known):
            raise ValueError(f"task {self.name!r} knows none of the set's labels")
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
"""Tasks made of CIFAR-10's labels."""


def read_recipe(source: str) -> TaskRecipe:
    """A recipe by its name, or from a JSON file: {"name": ..., "classes": [...], "class_of_label": [...]}, where null
    (or -1) stands for a label whose pictures are left out.

    Raises ValueError for a name that is neither, and a file that holds no recipe.
    """
    if source in RECIPES:
        return RECIPES[source]
    path = Path(source)
    if not path.is_file():
        raise ValueError(f"task {source!r}: neither a file nor one of {', '.join(RECIPES)}")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        name, classes, of_label = str(raw["name"]), raw["classes"], raw["class_of_label"]
        positions = tuple(LEFT_OUT if label is None else int(label) for label in of_label)
        return TaskRecipe(name, tuple(map(str, classes)), positions)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path.name} holds no task: {error}") from error


def split(labelled: LabelledImages, *, held_share: float, seed: int) -> tuple[LabelledImages, LabelledImages]:
    """(to learn from, held back) by chance; the paper holds a fifth back to profile. Raises ValueError where either
    would be empty."""
    held = round(held_share * len(labelled))
    if not 0 < held < len(labelled):
        raise ValueError(f"a share of {held_share} of {len(labelled)} pictures leaves one side empty")
    order_N = np.random.default_rng(seed).permutation(len(labelled))
    return labelled.only(np.sort(order_N[held:])), labelled.only(np.sort(order_N[:held]))
