"""PURE: INFaaS (Romero et al., USENIX ATC 2021) as a baseline: it switches between three model sizes, not token counts.

Every task has its own fine-tuned models, so a batch holds one task. The policy decides the size by the load: the
largest model whose throughput is above the arrival rate. A model that is not in memory is loaded first, which takes
its loading time. The least recently used model is removed to make room.

With several executors, each has memory of its own for models, the load is that of all of them, and a batch runs on a
free executor that holds its model, if there is one.

The model size takes the place of gamma (-1 small, 0 base, 1 large), with a profile of its own.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from isthmus.cloud.elastic.policies.arrivals import ArrivalRate
from isthmus.cloud.elastic.policies.baselines import in_time
from isthmus.cloud.elastic.scheduling.engine import Work
from isthmus.cloud.elastic.scheduling.policy import EPSILON, Choice
from isthmus.cloud.elastic.scheduling.profile import Profile
from isthmus.cloud.elastic.scheduling.query import Query

RATE_WINDOW_S: Final = 1.0
PATIENCE_S: Final = 2.0
"""The load must allow a larger size for this long before the policy takes it. A smaller size is taken at once."""


@dataclass(frozen=True)
class ModelSize:
    """One size of the model. ``load_s`` is the time from disk to ready.

    ``cost`` (seconds per image) and ``error`` (share of wrong answers) are relative to the base model at gamma 0. They
    are used only to derive the profile of sizes that were not measured (``sizes_profile``).
    """

    level: int
    memory_bytes: int
    load_s: float
    cost: float = 1.0
    error: float = 1.0


SIZE_NAMES: Final[Mapping[int, str]] = {-1: "small", 0: "base", 1: "large"}
LOAD_BYTES_PER_S: Final = 6e8
SIZES: Final = tuple(
    ModelSize(level, memory_bytes, memory_bytes / LOAD_BYTES_PER_S, cost, error)
    for level, cost, error, memory_bytes in (
        (-1, 0.28, 1.35, 88_000_000),
        (0, 1.0, 1.0, 346_000_000),
        (1, 3.6, 0.9, 1_217_000_000),
    )
)
"""ViT-S, ViT-B and ViT-L for 224 pixels, in float32. tests/bench/elastic/model_sizes.py measures costs, bytes and
loading: 330 to 620 MB/s in several runs on one core, from cached files to a model that answers. The best run is used.
The errors are our assumption, so no figure here may be quoted as the paper's."""
LITTLE_MEMORY_BYTES: Final = 3 * 346_000_000
"""Room for one base model of each of three tasks."""
PAPER_MEMORY_BYTES: Final = 16_000_000_000
"""Memory of the RTX 4080 in OTAS's experiments: all three sizes of all three tasks fit."""
NAME: Final = "infaas"


def sizes_profile(base: Profile, sizes: tuple[ModelSize, ...] = SIZES) -> Profile:
    """Derives the profile of the three sizes from gamma 0. Raises ValueError if ``base`` was not measured there."""
    if 0 not in base.gammas:
        raise ValueError("the profile was not measured at gamma 0")
    return Profile(
        key=base.key,
        gammas=tuple(size.level for size in sizes),
        sizes=base.sizes,
        accuracy={
            task: {size.level: max(0.0, 1 - size.error * (1 - shares[0])) for size in sizes}
            for task, shares in base.accuracy.items()
        },
        latency_s={size.level: _scaled(base, size) for size in sizes},
    )


def _scaled(base: Profile, size: ModelSize) -> tuple[float, ...]:
    """Scales the part of the time that grows with the batch. The fixed cost of a batch does not depend on the model.

    On a busy machine a larger batch can measure faster than a smaller one. Then the fastest batch is all fixed cost.
    """
    seconds = base.latency_s[0]
    per_image_s = (seconds[-1] - seconds[0]) / (base.sizes[-1] - base.sizes[0]) if len(seconds) > 1 else 0.0
    fixed_s = min(max(0.0, seconds[0] - per_image_s * base.sizes[0]), *seconds)
    return tuple(fixed_s + size.cost * (value - fixed_s) for value in seconds)


class Infaas:
    """Batches the oldest query with others of its task, and picks the model size by the arrival rate.

    It leaves out queries that would be late.
    """

    def __init__(self, sizes: tuple[ModelSize, ...] = SIZES, epsilon: int = EPSILON) -> None:
        self.gammas = tuple(size.level for size in sizes)
        self.executors = 1.0
        self._epsilon = epsilon
        self._waiting: dict[str, dict[int, Query]] = {}
        self._rate = ArrivalRate(RATE_WINDOW_S)
        self._level = 0
        self._allowed_since_s: float | None = None

    def use(self, profile: Profile) -> None:
        if set(profile.gammas) != set(self.gammas):
            raise ValueError("INFaaS needs the profile of its model sizes (sizes_profile)")
        self._times_s = {level: profile.times_s(level) for level in self.gammas}
        self._capacities = {level: profile.capacity_per_s(level) for level in self.gammas}

    def arrived(self, query: Query) -> None:
        self._rate.add(query.arrival_s)
        self._waiting.setdefault(query.task, {})[query.id] = query
        self._follow_load(query.arrival_s)

    def left(self, query: Query) -> None:
        del self._waiting[query.task][query.id]

    def choose(self, now_s: float) -> Choice:
        times_s = self._times_s[self._level]
        doomed: list[Query] = []
        oldest = sorted(
            (next(iter(queries.values())).arrival_s, task) for task, queries in self._waiting.items() if queries
        )
        for _, task in oldest:
            first = [query for _, query in zip(range(self._epsilon), self._waiting[task].values(), strict=False)]
            late, queries = in_time(sorted(first, key=lambda query: query.deadline_s), times_s, now_s)
            doomed += late
            if queries:
                return Choice(tuple(queries), self._level, tuple(doomed))
        return Choice(evict=tuple(doomed))

    def _follow_load(self, now_s: float) -> None:
        rate_per_s = self._rate.at(now_s) / self.executors
        fitting = [level for level in self.gammas if self._capacities[level] > rate_per_s]
        wanted = max(fitting, default=min(self.gammas))
        if wanted <= self._level:
            self._level = wanted
            self._allowed_since_s = None
        elif self._allowed_since_s is None:
            self._allowed_since_s = now_s
        elif now_s - self._allowed_since_s >= PATIENCE_S:
            self._level = wanted
            self._allowed_since_s = None


class ModelsInMemory:
    """Tracks which models are in memory.

    The least recently used model is removed to make room. A model larger than all of the memory stays alone in it. At
    the start, models of ``tasks`` are there as far as they fit: the base models first, then the small, then the large.
    """

    def __init__(self, memory_bytes: int, tasks: Sequence[str] = (), sizes: Sequence[ModelSize] = SIZES) -> None:
        self._memory_bytes = memory_bytes
        self._held: dict[tuple[str, int], int] = {}
        for size in sorted(sizes, key=lambda size: (size.level != 0, size.level)):
            for task in tasks:
                if sum(self._held.values()) + size.memory_bytes <= memory_bytes:
                    self._held[task, size.level] = size.memory_bytes

    @property
    def held(self) -> tuple[tuple[str, int], ...]:
        """The models (task, level) in memory, least recently used first."""
        return tuple(self._held)

    @property
    def bytes(self) -> int:
        """Bytes of all models in memory."""
        return sum(self._held.values())

    def forget(self, task: str, level: int) -> None:
        """Notes that this model is not in memory after all: its file could not be loaded."""
        del self._held[task, level]

    def holds(self, task: str, size: ModelSize) -> bool:
        """Returns whether this model is in memory."""
        return (task, size.level) in self._held

    def use(self, task: str, size: ModelSize) -> tuple[bool, list[tuple[str, int]]]:
        """Returns (whether this model must be loaded, the models (task, level) removed for it)."""
        model = (task, size.level)
        known = self._held.pop(model, None) is not None
        left = []
        while self._held and sum(self._held.values()) + size.memory_bytes > self._memory_bytes:
            left.append(next(iter(self._held)))
            del self._held[left[-1]]
        self._held[model] = size.memory_bytes
        return not known, left


def loading_executor(
    sizes: tuple[ModelSize, ...] = SIZES,
    memory_bytes: int = PAPER_MEMORY_BYTES,
    tasks: Sequence[str] = (),
    executors: int = 1,
    pace: float = 1.0,
) -> Callable[[Work], float]:
    """Returns an executor model for the simulator: the time of a batch plus, if needed, of loading its task's model.

    Each of ``executors`` has ``memory_bytes``. Models of ``tasks`` are in memory at the start, as far as they fit. All
    times are multiplied by ``pace``. A batch takes the executor that ``freest`` names.
    """
    by_level: Mapping[int, ModelSize] = {size.level: size for size in sizes}
    models = [ModelsInMemory(memory_bytes, tasks, sizes) for _ in range(executors)]
    busy_until_s = [float("-inf")] * executors

    def takes_s(work: Work) -> float:
        size, task = by_level[work.gamma], work.batch.queries[0].task
        free = [place for place in range(executors) if busy_until_s[place] <= work.started_s]
        place = freest(free or range(executors), busy_until_s, [each.holds(task, size) for each in models])
        load, _ = models[place].use(task, size)
        seconds = pace * (work.predicted_s + (size.load_s if load else 0.0))
        busy_until_s[place] = work.started_s + seconds
        return seconds

    return takes_s


def freest(free: Sequence[int], since_s: Sequence[float], holds: Sequence[bool]) -> int:
    """Returns which of the ``free`` executors takes a batch: one that holds its model, else the one idle for longest.

    ``since_s``: when each executor became free. ``holds``: whether it has the model in memory. Raises ValueError if
    none is free.

    >>> freest([0, 2], [5.0, 9.0, 7.0], [False, True, True])
    2
    """
    return min(free, key=lambda place: (not holds[place], since_s[place]))


def memory_named(policy: str) -> int | None:
    """Returns the bytes of memory that the name of a policy gives INFaaS; None if the policy is another one.

    "infaas" has the memory of the paper's machine, and "infaas:2.5" has 2.5 GB. Raises ValueError for another text
    behind the colon.
    """
    name, colon, memory = policy.partition(":")
    if name != NAME:
        return None
    if not colon:
        return PAPER_MEMORY_BYTES
    try:
        gigabytes = float(memory)
    except ValueError:
        gigabytes = 0.0
    if not 0 < gigabytes <= 1e6:
        raise ValueError(f"infaas:GB needs the gigabytes of memory for its models, such as infaas:1.04, not {policy!r}")
    return round(1e9 * gigabytes)


def simulated(
    base: Profile,
    memory_bytes: int,
    executors: int = 1,
    pace: float = 1.0,
    *,
    sizes: tuple[ModelSize, ...] | None = None,
) -> tuple[Profile, Infaas, Callable[[Work], float]]:
    """Returns what a simulation of INFaaS needs: the profile of its model sizes, the policy, and the executors' model.

    With ``sizes``, ``base`` is their measured profile. Without, three sizes are assumed, and their profile is derived
    from ``base`` at gamma 0. Each of ``executors`` has ``memory_bytes`` for models. Their times are multiplied by
    ``pace``. The engine must not adapt to measured times, since they contain loading. Raises ValueError if ``base`` was
    not measured at gamma 0.
    """
    profile, sizes = (sizes_profile(base), SIZES) if sizes is None else (base, sizes)
    return profile, Infaas(sizes), loading_executor(sizes, memory_bytes, tuple(profile.accuracy), executors, pace)
