"""A task: classes, a head, and prompts for some gammas. Its values and shapes are checked against bounds and the model.

Axes: C classes, D width of the model, L layers of the model, G prompts per layer.
"""

import dataclasses
import json
import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal, cast

import numpy as np
import numpy.typing as npt
import safetensors.numpy
from safetensors import SafetensorError

from isthmus.cloud.elastic.scheduling.levels import MAX_EXPERTS, STEP, fewer_of, gamma_of
from isthmus.cloud.elastic.scheduling.query import MAX_LATENCY_S, MAX_UTILITY
from isthmus.cloud.elastic.tasks.router import NAMES as ROUTER_NAMES
from isthmus.cloud.elastic.tasks.router import NONE, ExpertsShape, TaskRouter, router_of
from isthmus.proto.errors import InvalidInput, TooLarge
from isthmus.proto.limits import MAX_CLASS_NAME_CHARS, MAX_CLASSES, MAX_NAME_CHARS, MAX_TASK_WEIGHTS_BYTES

if TYPE_CHECKING:
    # A client registers tasks without the libraries that read pictures.
    from isthmus.data.images import LabelledImages

FloatArray = npt.NDArray[np.float32]
PromptMode = Literal["append", "replace"]
PROMPT_MODES: Final[tuple[PromptMode, ...]] = ("append", "replace")

DEFAULT_LATENCY_S: Final = 1.0
DEFAULT_UTILITY: Final = 1.0
MAX_GAMMA: Final = 1_024

PROFILING_PICTURES: Final = "profiling.pictures"
PROFILING_LABELS: Final = "profiling.labels"
MAX_PROFILING_PICTURES: Final = 10_000

_TASK_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_PROMPTS: Final = re.compile(r"prompts\.([1-9][0-9]{0,3})")
_MERGING_COSTS: Final = 0.01
"""Assumed loss of accuracy per token merged per layer, if neither this task nor any other was measured."""


@dataclass(frozen=True)
class ModelShape:
    """The dimensions of the served model that a task must fit."""

    layers: int
    width: int
    image_px: int
    experts: ExpertsShape = NONE


@dataclass(frozen=True)
class Measured:
    """The accuracy by gamma that the server measured itself, on ``pictures`` pictures of the owner's profiling set.

    ``chance`` is the share of the most frequent class in that set.
    """

    accuracy: Mapping[int, float]
    pictures: int
    chance: float

    @property
    def credible(self) -> bool:
        """Whether the labels fit the task: its best gamma beats always answering the most frequent class.

        By two standard errors. If it does not, the labels are wrong or the head is, and the figures say nothing about
        merging.
        """
        error = math.sqrt(self.chance * (1 - self.chance) / max(1, self.pictures))
        return max(self.accuracy.values(), default=0.0) > self.chance + 2 * error


@dataclass(frozen=True)
class TaskSpec:
    """The description of a task. ``accuracy`` holds what its owner measured, by gamma, for any number of gammas.

    For a model with experts, these are levels (scheduling/levels.py).

    ``measured`` is what the server measured; None if it measured nothing.

    Raises InvalidInput for impossible values, and TooLarge for values over a bound.

    >>> TaskSpec("pets", ("cat", "dog"), accuracy={0: 0.93, -5: 0.9}).classes
    ('cat', 'dog')
    """

    name: str
    classes: tuple[str, ...]
    prompt_mode: PromptMode = "append"
    accuracy: Mapping[int, float] = field(default_factory=dict)
    default_latency_s: float = DEFAULT_LATENCY_S
    default_utility: float = DEFAULT_UTILITY
    measured: Measured | None = None

    def __post_init__(self) -> None:
        check_names(self.name, self.classes)
        if self.prompt_mode not in PROMPT_MODES:
            raise InvalidInput(f"prompt mode: must be one of {', '.join(PROMPT_MODES)}")
        if len(self.accuracy) > MAX_GAMMA or any(
            abs(gamma_of(level)) > MAX_GAMMA or level <= -STEP * MAX_EXPERTS for level in self.accuracy
        ):
            raise TooLarge(f"accuracy: gammas must be from -{MAX_GAMMA} to {MAX_GAMMA}")
        if not all(0 <= share <= 1 for share in self.accuracy.values()):
            raise InvalidInput("accuracy: must be from 0 to 1")
        if not 0 < self.default_latency_s <= MAX_LATENCY_S:
            raise InvalidInput(f"default latency: must be above 0 and at most {MAX_LATENCY_S:g} s")
        if not 0 <= self.default_utility <= MAX_UTILITY:
            raise InvalidInput(f"default utility: must be from 0 to {MAX_UTILITY:g}")

    def to_json(self) -> str:
        return json.dumps(
            {
                "name": self.name,
                "classes": self.classes,
                "prompt_mode": self.prompt_mode,
                "accuracy": {str(gamma): share for gamma, share in sorted(self.accuracy.items())},
                "default_latency_s": self.default_latency_s,
                "default_utility": self.default_utility,
                "measured": None if self.measured is None else dataclasses.asdict(self.measured),
            }
        )

    @staticmethod
    def from_json(text: str) -> "TaskSpec":
        """Reads what ``to_json`` wrote."""
        raw = json.loads(text)
        return TaskSpec(
            name=raw["name"],
            classes=tuple(raw["classes"]),
            prompt_mode=raw["prompt_mode"],
            accuracy={int(gamma): float(share) for gamma, share in raw["accuracy"].items()},
            default_latency_s=raw["default_latency_s"],
            default_utility=raw["default_utility"],
            measured=_measured(raw.get("measured")),
        )


def _measured(raw: Any) -> Measured | None:
    if raw is None:
        return None
    accuracy = {int(gamma): float(share) for gamma, share in raw["accuracy"].items()}
    return Measured(accuracy, int(raw["pictures"]), float(raw["chance"]))


def check_names(task: str, classes: Sequence[str]) -> None:
    """Check the names of a task and its classes for everything that will be done with them.

    A task's name becomes a file name and an id on the wire. Raises InvalidInput or TooLarge that names the fault.
    """
    if len(task) > MAX_NAME_CHARS or not _TASK_NAME.fullmatch(task):
        raise InvalidInput(
            f"task name {task[:MAX_NAME_CHARS]!r}: use letters, digits, '_', '.' and '-', at most {MAX_NAME_CHARS} of "
            "them, a letter or digit first"
        )
    if len(classes) < 2:
        raise InvalidInput(f"classes: at least two are needed, not {len(classes)}")
    if len(classes) > MAX_CLASSES:
        raise TooLarge(f"classes: {len(classes)} are too many, at most {MAX_CLASSES} are accepted")
    for name in classes:
        if not name.strip() or not name.isprintable():
            raise InvalidInput(f"classes: {name[:MAX_NAME_CHARS]!r} is not a name that can be shown")
        if len(name) > MAX_CLASS_NAME_CHARS:
            raise TooLarge(f"classes: {name[:MAX_NAME_CHARS]!r}... is longer than {MAX_CLASS_NAME_CHARS} characters")
    twice = [name for name, count in Counter(classes).items() if count > 1]
    if twice:
        raise InvalidInput(f"classes: {twice[0]!r} is there {classes.count(twice[0])} times; names must differ")


@dataclass(frozen=True, eq=False)
class TaskWeights:
    """The weights of a task. ``prompts_LGD[gamma]`` holds gamma prompts for every layer.

    ``router`` says which experts the task's tokens use, if the model has experts.

    >>> head = TaskWeights(np.zeros((2, 192), np.float32), np.zeros(2, np.float32), prompts_LGD={})
    >>> head.to_bytes()[:8].hex()  # a safetensors file
    '8800000000000000'
    """

    head_weight_CD: FloatArray
    head_bias_C: FloatArray
    prompts_LGD: Mapping[int, FloatArray]
    router: TaskRouter | None = None

    def tensors(self) -> dict[str, npt.NDArray[Any]]:
        """Returns the tensors of the task's file: head.weight, head.bias, prompts.<gamma>, and those of the router."""
        tensors: dict[str, npt.NDArray[Any]] = {"head.weight": self.head_weight_CD, "head.bias": self.head_bias_C}
        tensors |= {f"prompts.{gamma}": prompts_LGD for gamma, prompts_LGD in self.prompts_LGD.items()}
        if self.router is not None:
            tensors |= self.router.tensors()
        return {name: np.ascontiguousarray(value) for name, value in tensors.items()}

    def to_bytes(self) -> bytes:
        """Returns the bytes of a safetensors file of ``tensors``."""
        return safetensors.numpy.save(self.tensors())

    @staticmethod
    def from_bytes(data: bytes, *, classes: int, model: ModelShape) -> "TaskWeights":
        """Reads and checks a safetensors file from a client.

        Raises TooLarge over the bound. Raises InvalidInput if ``data`` is not such a file, or if the head, the prompts
        or the router do not fit the model or the number of classes; the message names the tensor.
        """
        if len(data) > MAX_TASK_WEIGHTS_BYTES:
            raise TooLarge(f"weights: at most {MAX_TASK_WEIGHTS_BYTES} bytes are accepted")
        try:
            tensors: dict[str, npt.NDArray[Any]] = safetensors.numpy.load(data)
        # For a type that numpy lacks, the library raises KeyError or AttributeError, depending on its version.
        except (SafetensorError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise InvalidInput("weights: not a safetensors file of float32 tensors") from error
        prompts_LGD = {}
        for name, value in tensors.items():
            if name in ("head.weight", "head.bias", PROFILING_PICTURES, PROFILING_LABELS, *ROUTER_NAMES):
                continue
            matched = _PROMPTS.fullmatch(name)
            if matched is None or int(matched[1]) > MAX_GAMMA:
                raise InvalidInput(f"weights: unknown tensor {name[:MAX_NAME_CHARS]!r}")
            gamma = int(matched[1])
            prompts_LGD[gamma] = _checked(name, value, (model.layers, gamma, model.width))
        for name in ("head.weight", "head.bias"):
            if name not in tensors:
                raise InvalidInput(f"weights: {name} is missing")
        return TaskWeights(
            _checked("head.weight", tensors["head.weight"], (classes, model.width)),
            _checked("head.bias", tensors["head.bias"], (classes,)),
            dict(sorted(prompts_LGD.items())),
            router_of(tensors, model.experts, model.width),
        )


def with_profiling(weights: bytes, labelled: "LabelledImages") -> bytes:
    """Returns a safetensors file of weights with a profiling set in it, for a server that measures accuracy itself."""
    tensors = {
        **safetensors.numpy.load(weights),
        PROFILING_PICTURES: np.ascontiguousarray(labelled.pictures_NHWC),
        PROFILING_LABELS: labelled.labels_N.astype(np.int64),
    }
    return safetensors.numpy.save(tensors)


def profiling_of(data: bytes, *, classes: int, model: ModelShape) -> "LabelledImages | None":
    """Returns the profiling set in a task's file, which ``TaskWeights.from_bytes`` has read; None if there is none.

    Raises InvalidInput or TooLarge, naming the fault, for pictures of another size, labels beyond the classes, a set of
    one class, and too many pictures.
    """
    tensors = safetensors.numpy.load(data)
    pictures, labels = tensors.get(PROFILING_PICTURES), tensors.get(PROFILING_LABELS)
    if pictures is None and labels is None:
        return None
    if pictures is None or labels is None:
        raise InvalidInput(f"profiling: {PROFILING_PICTURES} and {PROFILING_LABELS} belong together")
    side = model.image_px
    if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[1:] != (side, side, 3):
        raise InvalidInput(
            f"profiling: pictures are {_by(pictures.shape)} {pictures.dtype}; this model needs N x {side} x {side} x 3 "
            "uint8"
        )
    if len(pictures) > MAX_PROFILING_PICTURES:
        raise TooLarge(f"profiling: {len(pictures)} pictures; at most {MAX_PROFILING_PICTURES} are accepted")
    if labels.dtype != np.int64 or labels.shape != (len(pictures),):
        raise InvalidInput(f"profiling: labels are {_by(labels.shape)} {labels.dtype}; one int64 per picture is needed")
    if not len(labels) or labels.min() < 0 or labels.max() >= classes:
        raise InvalidInput(f"profiling: labels must be from 0 to {classes - 1}, and there must be some")
    if labels.min() == labels.max():
        raise InvalidInput("profiling: all pictures are of one class, so accuracy would say nothing")
    from isthmus.data.images import LabelledImages

    return LabelledImages(pictures, labels)


@dataclass(frozen=True, eq=False)
class Task:
    """A task as it is served. ``version`` counts the registrations of its name, starting at 1.

    ``owner``: the tenant to which the task belongs, or "" for that of all that have no other.
    """

    spec: TaskSpec
    weights: TaskWeights
    version: int = 1
    owner: str = ""

    @property
    def name(self) -> str:
        """The name within the engine: that of the spec, with the owner in front."""
        return f"{self.owner}/{self.spec.name}" if self.owner else self.spec.name

    @property
    def prompted_gammas(self) -> tuple[int, ...]:
        """The gammas above 0 that the task has prompts for, ascending."""
        return tuple(self.weights.prompts_LGD)


def expected_accuracy(task: Task, gammas: Sequence[int], others: Collection[Mapping[int, float]]) -> dict[int, float]:
    """Returns the task's accuracy at each of ``gammas``: measured or estimated, and 0 if the task cannot run.

    What the server measured comes before the owner's figures, if it is credible.

    A task cannot run at a gamma above 0 for which it has no prompts. Between measured gammas the accuracy is
    interpolated linearly; outside them it is that of the nearest measured gamma. If nothing was measured, the mean of
    ``others`` is used. Without others, each token merged per layer costs 0.01.

    Levels with fewer experts than usual (scheduling/levels.py) are estimated from each other in the same way; if none
    with this number of experts was measured, the accuracy is 0, so that no policy uses it.
    """
    spec = task.spec
    measured = spec.measured.accuracy if spec.measured is not None and spec.measured.credible else spec.accuracy
    known = {gamma: share for gamma, share in measured.items() if gamma <= 0 or gamma in task.prompted_gammas}
    if not known:
        known = _mean(others) or {
            gamma: max(0.0, 1 + _MERGING_COSTS * min(gamma, 0)) for gamma in gammas if not fewer_of(gamma)
        }
    return {gamma: _between(known, gamma) if gamma <= 0 or gamma in task.prompted_gammas else 0.0 for gamma in gammas}


def _between(known: Mapping[int, float], level: int) -> float:
    alike = sorted(gamma for gamma in known if fewer_of(gamma) == fewer_of(level))
    return float(np.interp(level, alike, [known[gamma] for gamma in alike])) if alike else 0.0


def _mean(tables: Collection[Mapping[int, float]]) -> dict[int, float]:
    gammas = {gamma for table in tables for gamma in table}
    return {
        gamma: math.fsum(known) / len(known)
        for gamma in gammas
        if (known := [table[gamma] for table in tables if gamma in table])
    }


def _checked(name: str, value: npt.NDArray[Any], shape: tuple[int, ...]) -> FloatArray:
    if value.shape != shape:
        raise InvalidInput(f"weights: {name} is {_by(value.shape)}; this model and these classes need {_by(shape)}")
    if value.dtype != np.float32:
        raise InvalidInput(f"weights: {name} is {value.dtype}; it must be float32")
    if not np.isfinite(value).all():
        raise InvalidInput(f"weights: {name} holds NaN or infinity")
    return cast(FloatArray, value)


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "a scalar"
