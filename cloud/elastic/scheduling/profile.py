"""PURE: a profile: the measured accuracy, time and memory of one ViT on one machine by gamma. It has a JSON form.

Where we differ: OTAS keeps one latency per sample. The time of a batch is close to affine in its size, and a single
image costs several times its share of a large batch. So here time and memory are measured on a grid of batch sizes and
interpolated.
"""

import copy
import itertools
import json
import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Final

import numpy as np

from isthmus.cloud.elastic.scheduling.levels import MAX_EXPERTS, fewer_of
from isthmus.cloud.elastic.scheduling.merge_order import DEFAULT_ORDER, MergeOrder, order_in

MAX_BATCH: Final = 1_024
"""Largest batch. The times of all sizes up to this one are kept in a table."""
MAX_PROFILE_CHARS: Final = 4 << 20
FORMAT: Final = 1


class BadProfile(ValueError):
    """The text is not a profile, or its numbers are impossible."""


@dataclass(frozen=True)
class MachineKey:
    """What a profile is valid for. Another processor, thread count, number type or model needs another profile."""

    processor: str
    device: str
    threads: int
    number_type: str
    model_hash: str

    def differences(self, other: "MachineKey") -> tuple[str, ...]:
        """Returns one line of text per field that differs; an empty tuple means that the profile is valid here."""
        return tuple(
            f"{item.name}: measured with {getattr(self, item.name)!r}, here {getattr(other, item.name)!r}"
            for item in fields(self)
            if getattr(self, item.name) != getattr(other, item.name)
        )


@dataclass(frozen=True)
class Profile:
    """``latency_s[gamma]`` (seconds) and ``memory[gamma]`` (bytes) hold one number per batch size in ``sizes``.

    ``gammas`` and ``sizes`` ascend. Both tables are interpolated linearly between sizes. Above the last size the last
    slope continues; below the first size the first value is used.

    ``accuracy[task][gamma]`` is in [0, 1] for every gamma. It is 0 if the task cannot run at that gamma, so no planner
    picks it. ``memory`` may be empty: then no batch is split. ``schedules[gamma]`` holds the change of the token number
    at each layer; it is empty if all layers change alike. ``models[task][gamma]`` names the warmed model that the
    accuracy was measured with (see warm/profiled.py); without a name it is the served model itself. ``merge_order`` is
    the order in which the measured model handed merged tokens on; a server that uses the profile must use it too.

    If the model has experts, ``experts`` is how many a token usually uses, and all gammas are levels (levels.py).

    Raises BadProfile if one of these conditions is violated.

    >>> profile = paper_profile()
    >>> profile.accuracy_of("CIFAR10", 0), round(profile.batch_time_s(0, 64), 3)
    (0.965, 0.175)
    >>> Profile.from_json(profile.to_json()) == profile
    True
    """

    key: MachineKey
    gammas: tuple[int, ...]
    sizes: tuple[int, ...]
    accuracy: Mapping[str, Mapping[int, float]]
    latency_s: Mapping[int, tuple[float, ...]]
    memory: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    schedules: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    models: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    merge_order: MergeOrder = DEFAULT_ORDER
    experts: int = 0
    _times_s: Mapping[int, tuple[float, ...]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _check(self)
        times_s = {
            gamma: (0.0, *(_interpolated(self.sizes, self.latency_s[gamma], size) for size in range(1, MAX_BATCH + 1)))
            for gamma in self.gammas
        }
        object.__setattr__(self, "_times_s", times_s)

    def batch_time_s(self, gamma: int, size: int) -> float:
        """Returns the seconds for ``size`` images at ``gamma``.

        Raises KeyError for an unknown gamma, ValueError for a size outside [1, MAX_BATCH].
        """
        if not 0 < size <= MAX_BATCH:
            raise ValueError(f"a batch holds from 1 to {MAX_BATCH} images, not {size}")
        return self._times_s[gamma][size]

    def times_s(self, gamma: int) -> tuple[float, ...]:
        """Returns ``batch_time_s`` for every size from 0 (no time) to MAX_BATCH."""
        return self._times_s[gamma]

    def memory_bytes(self, gamma: int, size: int) -> int:
        """Returns the predicted device memory of a batch; 0 if it was not measured."""
        return math.ceil(_interpolated(self.sizes, self.memory[gamma], size)) if self.memory else 0

    def largest_batch(self, gamma: int, memory_limit_bytes: int | None, most: int = MAX_BATCH) -> int:
        """Returns how many images fit at ``gamma``, at most ``most`` and at least 1: a single image is always tried."""
        if memory_limit_bytes is None or not self.memory or self.memory_bytes(gamma, most) <= memory_limit_bytes:
            return most
        fits, fails = 1, most
        while fails - fits > 1:
            middle = (fits + fails) // 2
            fits, fails = (middle, fails) if self.memory_bytes(gamma, middle) <= memory_limit_bytes else (fits, middle)
        return fits

    def accuracy_of(self, task: str, gamma: int) -> float:
        """Returns the accuracy on the profiling set. Raises KeyError for a task that was not profiled."""
        return self.accuracy[task][gamma]

    def capacity_per_s(self, gamma: int, size: int | None = None) -> float:
        """Returns images per second in batches of ``size``, or in batches of the best measured size."""
        if size is not None:
            return size / self.batch_time_s(gamma, size)
        return max(measured / seconds for measured, seconds in zip(self.sizes, self.latency_s[gamma], strict=True))

    def with_task(self, task: str, accuracy: Mapping[int, float]) -> "Profile":
        """Returns the profile with ``task`` added or replaced."""
        return replace(self, accuracy={**self.accuracy, task: dict(accuracy)})

    def without_task(self, task: str) -> "Profile":
        """Returns the profile without ``task``."""
        return replace(
            self,
            accuracy={name: of for name, of in self.accuracy.items() if name != task},
            models={name: of for name, of in self.models.items() if name != task},
        )

    def slowed(self, factor: float) -> "Profile":
        """Returns a profile in which each batch takes ``factor`` times as long.

        An engine calls it after many batches, so nothing is checked or interpolated again. Raises BadProfile for a
        factor that is not positive.
        """
        if not 0 < factor < math.inf:
            raise BadProfile(f"batches cannot take {factor} times as long")
        slower = copy.copy(self)
        for name, table in (("latency_s", self.latency_s), ("_times_s", self._times_s)):
            scaled = {gamma: tuple((factor * np.array(row)).tolist()) for gamma, row in table.items()}
            object.__setattr__(slower, name, scaled)
        return slower

    def to_json(self) -> str:
        return json.dumps(
            {
                "format": FORMAT,
                "key": asdict(self.key),
                "gammas": self.gammas,
                "sizes": self.sizes,
                "accuracy": self.accuracy,
                "latency_s": self.latency_s,
                "memory": self.memory,
                "schedules": self.schedules,
                "models": self.models,
                "merge_order": self.merge_order,
                **({"experts": self.experts} if self.experts else {}),
            },
            indent=1,
        )

    @staticmethod
    def from_json(text: str) -> "Profile":
        """Reads what ``to_json`` wrote. Raises BadProfile for other text, another format, or impossible numbers."""
        if len(text) > MAX_PROFILE_CHARS:
            raise BadProfile(f"the profile has over {MAX_PROFILE_CHARS} characters")
        try:
            raw = json.loads(text)
            if raw["format"] != FORMAT:
                raise BadProfile(f"the profile has format {raw['format']!r}; this version reads format {FORMAT}")
            key = raw["key"]
            return Profile(
                key=MachineKey(
                    str(key["processor"]),
                    str(key["device"]),
                    int(key["threads"]),
                    str(key["number_type"]),
                    str(key["model_hash"]),
                ),
                gammas=tuple(map(int, raw["gammas"])),
                sizes=tuple(map(int, raw["sizes"])),
                accuracy={
                    str(task): {int(gamma): float(share) for gamma, share in of.items()}
                    for task, of in raw["accuracy"].items()
                },
                latency_s={int(gamma): tuple(map(float, row)) for gamma, row in raw["latency_s"].items()},
                memory={int(gamma): tuple(map(int, row)) for gamma, row in raw["memory"].items()},
                schedules={int(gamma): tuple(map(int, row)) for gamma, row in raw["schedules"].items()},
                models={
                    str(task): {int(gamma): str(name) for gamma, name in of.items()}
                    for task, of in raw.get("models", {}).items()
                },
                merge_order=order_in(raw),
                experts=int(raw.get("experts", 0)),
            )
        except BadProfile:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise BadProfile(f"not a profile: {error!r}") from error


def _interpolated(sizes: Sequence[int], values: Sequence[float], size: int) -> float:
    if size <= sizes[0]:
        return float(values[0])
    if len(sizes) == 1:
        return values[0] * size / sizes[0]
    right = min(max(bisect_left(sizes, size), 1), len(sizes) - 1)
    slope = (values[right] - values[right - 1]) / (sizes[right] - sizes[right - 1])
    if size > sizes[-1]:
        slope = max(slope, 0.0)
    return values[right] + slope * (size - sizes[right])


def _check(profile: Profile) -> None:
    gammas, sizes = profile.gammas, profile.sizes
    for name, values in (("gammas", gammas), ("sizes", sizes)):
        if not values or any(later <= earlier for earlier, later in itertools.pairwise(values)):
            raise BadProfile(f"{name} must ascend and must not be empty: {list(values)[:20]}")
    if not 1 <= sizes[0] <= sizes[-1] <= MAX_BATCH:
        raise BadProfile(f"sizes must be from 1 to {MAX_BATCH}: {list(sizes)[:20]}")
    tables: list[tuple[str, Mapping[int, tuple[Any, ...]]]] = [("latency_s", profile.latency_s)]
    if profile.memory:
        tables.append(("memory", profile.memory))
    for name, table in tables:
        if set(table) != set(gammas) or any(len(row) != len(sizes) for row in table.values()):
            raise BadProfile(f"{name} must hold one number per size at each gamma")
        if not all(math.isfinite(value) and value > 0 for row in table.values() for value in row):
            raise BadProfile(f"{name} must be positive")
    for task, shares in profile.accuracy.items():
        if set(shares) != set(gammas) or not all(0 <= share <= 1 for share in shares.values()):
            raise BadProfile(f"task {task!r} must have an accuracy from 0 to 1 at each gamma")
    if not set(profile.schedules) <= set(gammas):
        raise BadProfile("there are schedules for gammas that were not measured")
    if not 0 <= profile.experts <= MAX_EXPERTS:
        raise BadProfile(f"experts must be from 0 to {MAX_EXPERTS}, not {profile.experts}")
    if any(fewer_of(level) >= max(1, profile.experts) for level in gammas):
        raise BadProfile(f"a level leaves none of the {profile.experts} experts that a token usually uses")
    for task, names in profile.models.items():
        if task not in profile.accuracy or not set(names) <= set(gammas):
            raise BadProfile(f"there are models for a task or gammas that were not measured: {task!r}")


def paper_profile() -> Profile:
    """Returns a profile that resembles the paper's: batch time = 6 ms + size / rate.

    The rates and some accuracies are from OTAS (ViT-Base on an RTX 4080). We interpolated the others, so no result with
    this profile may be quoted as the paper's.

    >>> paper_profile().gammas
    (-20, -15, -10, -5, 0, 2, 4, 8)
    """
    rates = {-20: 1330, -15: 900, -10: 560, -5: 450, 0: 379, 2: 348, 4: 319, 8: 279}
    accuracy = {
        "CIFAR10": (0.765, 0.90, 0.95, 0.96, 0.965, 0.975, 0.977, 0.978),
        "CIFAR100": (0.527, 0.75, 0.84, 0.86, 0.87, 0.893, 0.896, 0.898),
        "EuroSAT": (0.85, 0.93, 0.955, 0.96, 0.965, 0.975, 0.978, 0.979),
    }
    sizes = (1, 64)
    return Profile(
        key=MachineKey("paper-like", "RTX 4080", 0, "unknown", "ViT-Base"),
        gammas=tuple(rates),
        sizes=sizes,
        accuracy={task: dict(zip(rates, shares, strict=True)) for task, shares in accuracy.items()},
        latency_s={gamma: tuple(0.006 + size / rate for size in sizes) for gamma, rate in rates.items()},
    )
