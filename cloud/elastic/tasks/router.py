"""The router of a task: which experts its tokens use. It is registered with the task, and checked like its prompts.

Axes: M layers that have experts, D width, E experts.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from isthmus.proto.errors import InvalidInput

WEIGHT: Final = "router.weight"
BIAS: Final = "router.bias"
WINDOW: Final = "router.window"
NAMES: Final = (WEIGHT, BIAS, WINDOW)


@dataclass(frozen=True)
class ExpertsShape:
    """The experts of a model: how many layers have some, how many each of them has, how many a token usually uses."""

    layers: int = 0
    experts: int = 0
    k: int = 0


NONE: Final = ExpertsShape()


@dataclass(frozen=True, eq=False)
class TaskRouter:
    """For each layer with experts, the probabilities of a token x are softmax(x ``weight_MDE`` + ``bias_ME``).

    The task uses the ``count`` experts from ``first`` on, its window, and no other.
    """

    weight_MDE: npt.NDArray[np.float32]
    bias_ME: npt.NDArray[np.float32]
    first: int
    count: int

    @staticmethod
    def blank(shape: ExpertsShape, width: int, seed: int = 0) -> "TaskRouter":
        """Makes a random router that uses all experts. It takes as long to run as a real one."""
        weight_MDE = np.random.default_rng(seed).standard_normal((shape.layers, width, shape.experts), np.float32)
        return TaskRouter(weight_MDE, np.zeros((shape.layers, shape.experts), np.float32), 0, shape.experts)

    def tensors(self) -> dict[str, npt.NDArray[Any]]:
        """Returns the tensors of a task's file."""
        window = np.array([self.first, self.count], np.int64)
        return {WEIGHT: self.weight_MDE, BIAS: self.bias_ME, WINDOW: window}


def router_of(tensors: Mapping[str, npt.NDArray[Any]], shape: ExpertsShape, width: int) -> TaskRouter | None:
    """Reads the router among a task's tensors; None for a model without experts.

    Raises InvalidInput that names the tensor: if the router is missing, does not fit the model, is not finite or names
    experts that are not there; and if there is one for a model without experts.
    """
    given = [name for name in NAMES if name in tensors]
    if not shape.experts:
        if given:
            raise InvalidInput(f"weights: {given[0]} is a router of experts, and this server's model has none")
        return None
    wanted = {
        WEIGHT: (shape.layers, width, shape.experts),
        BIAS: (shape.layers, shape.experts),
        WINDOW: (2,),
    }
    for name, sides in wanted.items():
        if name not in tensors:
            raise InvalidInput(
                f"weights: {name} is missing; this server's model has experts, and its tasks are made by "
                "'isthmus elastic experts'"
            )
        value, kind = tensors[name], np.int64 if name == WINDOW else np.float32
        if value.shape != sides:
            raise InvalidInput(f"weights: {name} is {_by(value.shape)}; this model's experts need {_by(sides)}")
        if value.dtype != kind:
            raise InvalidInput(f"weights: {name} is {value.dtype}; it must be {np.dtype(kind)}")
        if not np.isfinite(value).all():
            raise InvalidInput(f"weights: {name} holds NaN or infinity")
    first, count = map(int, tensors[WINDOW])
    if not (0 <= first < shape.experts and 1 <= count <= shape.experts - first):
        raise InvalidInput(
            f"weights: {WINDOW} names {count} experts from {first} on; this model has {shape.experts} experts"
        )
    return TaskRouter(tensors[WEIGHT], tensors[BIAS], first, count)


def windows(tasks: int, experts: int, count: int) -> tuple[int, ...]:
    """Returns the first expert of each task's window of ``count`` experts, spread evenly over all of them.

    ``start_t = t (E - m) / (T - 1)``, rounded down. M3ViT's code adds up such starts, which passes the last expert if
    there are more than two tasks; this is what it means. Raises ValueError for impossible numbers.

    >>> windows(4, experts=16, count=4)
    (0, 4, 8, 12)
    """
    if tasks < 1 or not 1 <= count <= experts:
        raise ValueError(f"windows of {count} among {experts} experts for {tasks} tasks are not possible")
    return tuple(task * (experts - count) // max(1, tasks - 1) for task in range(tasks))


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "a scalar"
