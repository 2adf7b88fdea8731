"""PURE: what a machine was measured to do with one ViT: accuracy, time and memory by gamma. And its JSON.

The paper keeps one latency a sample. A batch's time is close to affine in its size, and one image alone costs several
times its share of a large batch, so here time and memory stand on a grid of sizes and are interpolated (spec 2,
section 3).
"""

import itertools
import json
import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Final

MAX_BATCH: Final = 1_024
"""No batch is larger: times of all sizes up to here are kept as a table."""
MAX_PROFILE_CHARS: Final = 4 << 20
FORMAT: Final = 1


class BadProfile(ValueError):
    """No profile, or one whose numbers cannot be."""


@dataclass(frozen=True)
class MachineKey:
    """What a profile holds for. Another processor, thread count, number type or model needs another profile."""

    processor: str
    device: str
    threads: int
    number_type: str
    model_hash: str

    def differences(self, other: "MachineKey") -> tuple[str, ...]:
        """One line for each field that differs, fit to be shown; none: the profile holds."""
        return tuple(
            f"{item.name}: measured with {getattr(self, item.name)!r}, here {getattr(other, item.name)!r}"
            for item in fields(self)
            if getattr(self, item.name) != getattr(other, item.name)
        )


@dataclass(frozen=True)
class Profile:
    """Axes: gammas ascend; ``latency_s[gamma]`` and ``memory[gamma]`` hold one number for each of ``sizes``, which
    ascend too. Between sizes both are linear, past the last they go on with the last slope, before the first they stay.

    ``accuracy[task][gamma]`` is in [0, 1] and known for every gamma; a task that cannot run at one has 0 there, so no
    planner picks it. ``memory`` may be empty: then nothing is known of it and nothing is split. ``schedules[gamma]``
    holds the change of token number at each layer; empty where layers are alike. ``models[task][gamma]`` names the
    warmed model that accuracy is of (see warmup/reduction.py); where none is named it is of the model itself.

    Raises BadProfile where that does not hold.
    """

    key: MachineKey
    gammas: tuple[int, ...]
    sizes: tuple[int, ...]
    accuracy: Mapping[str, Mapping[int, float]]
    latency_s: Mapping[int, tuple[float, ...]]
    memory: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    schedules: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    models: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    _times_s: Mapping[int, tuple[float, ...]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _check(self)
        times_s = {
            gamma: (0.0, *(_interpolated(self.sizes, self.latency_s[gamma], size) for size in range(1, MAX_BATCH + 1)))
            for gamma in self.gammas
        }
        object.__setattr__(self, "_times_s", times_s)

    def batch_time_s(self, gamma: int, size: int) -> float:
        """Seconds for ``size`` images at ``gamma``. Raises KeyError for an unknown gamma."""
        if not 0 < size <= MAX_BATCH:
            raise ValueError(f"a batch holds from 1 to {MAX_BATCH} images, not {size}")
        return self._times_s[gamma][size]

    def times_s(self, gamma: int) -> tuple[float, ...]:
        """``batch_time_s`` of every size from 0 (no time) to MAX_BATCH."""
        return self._times_s[gamma]

    def memory_bytes(self, gamma: int, size: int) -> int:
        """Predicted device memory of a batch; 0 where it was not measured."""
        return math.ceil(_interpolated(self.sizes, self.memory[gamma], size)) if self.memory else 0

    def largest_batch(self, gamma: int, memory_limit_bytes: int | None, most: int = MAX_BATCH) -> int:
        """How many images fit at ``gamma``, at most ``most`` and never fewer than one: a lone image is always tried."""
        if memory_limit_bytes is None or not self.memory or self.memory_bytes(gamma, most) <= memory_limit_bytes:
            return most
        fits, fails = 1, most
        while fails - fits > 1:
            middle = (fits + fails) // 2
            fits, fails = (middle, fails) if self.memory_bytes(gamma, middle) <= memory_limit_bytes else (fits, middle)
        return fits

    def accuracy_of(self, task: str, gamma: int) -> float:
        """Share of the profiling set that is right. Raises KeyError for a task that was not profiled."""
        return self.accuracy[task][gamma]

    def capacity_per_s(self, gamma: int, size: int | None = None) -> float:
        """Images a second in batches of ``size``; without one, of the measured size that does best."""
        if size is not None:
            return size / self.batch_time_s(gamma, size)
        return max(measured / seconds for measured, seconds in zip(self.sizes, self.latency_s[gamma], strict=True))

    def with_task(self, task: str, accuracy: Mapping[int, float]) -> "Profile":
        """The same machine with one task more, or measured anew."""
        return replace(self, accuracy={**self.accuracy, task: dict(accuracy)})

    def without_task(self, task: str) -> "Profile":
        return replace(
            self,
            accuracy={name: of for name, of in self.accuracy.items() if name != task},
            models={name: of for name, of in self.models.items() if name != task},
        )

    def slowed(self, factor: float) -> "Profile":
        """The same machine, each batch taking ``factor`` times as long: a margin for times that vary from run to run.

        Raises BadProfile for a factor that is not positive.
        """
        slower = {gamma: tuple(factor * seconds for seconds in row) for gamma, row in self.latency_s.items()}
        return replace(self, latency_s=slower)

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
            },
            indent=1,
        )

    @staticmethod
    def from_json(text: str) -> "Profile":
        """Raises BadProfile for text that is no profile of this format, or whose numbers cannot be."""
        if len(text) > MAX_PROFILE_CHARS:
            raise BadProfile(f"a profile of over {MAX_PROFILE_CHARS} characters")
        try:
            raw = json.loads(text)
            if raw["format"] != FORMAT:
                raise BadProfile(f"a profile of format {raw['format']!r}, and this reads {FORMAT}")
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
            )
        except BadProfile:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise BadProfile(f"no profile: {error!r}") from error


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
            raise BadProfile(f"{name} must ascend, and there must be some: {list(values)[:20]}")
    if not 1 <= sizes[0] <= sizes[-1] <= MAX_BATCH:
        raise BadProfile(f"sizes must lie from 1 to {MAX_BATCH}: {list(sizes)[:20]}")
    tables: list[tuple[str, Mapping[int, tuple[Any, ...]]]] = [("latency_s", profile.latency_s)]
    if profile.memory:
        tables.append(("memory", profile.memory))
    for name, table in tables:
        if set(table) != set(gammas) or any(len(row) != len(sizes) for row in table.values()):
            raise BadProfile(f"{name} must hold one number for each of the sizes at each of the gammas")
        if not all(math.isfinite(value) and value > 0 for row in table.values() for value in row):
            raise BadProfile(f"{name} must be positive")
    for task, shares in profile.accuracy.items():
        if set(shares) != set(gammas) or not all(0 <= share <= 1 for share in shares.values()):
            raise BadProfile(f"task {task!r} must have an accuracy from 0 to 1 at each of the gammas")
    if not set(profile.schedules) <= set(gammas):
        raise BadProfile("schedules for gammas that are not measured")
    for task, names in profile.models.items():
        if task not in profile.accuracy or not set(names) <= set(gammas):
            raise BadProfile(f"models for a task or gammas that are not measured: {task!r}")


def paper_profile() -> Profile:
    """The paper-like profile of spec 2, section 9: batch time = 6 ms + size / rate.

    Rates and some accuracies are as the paper tells them (ViT-Base, RTX 4080); the others were interpolated by us, so
    no figure of it may be quoted as the paper's.
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
