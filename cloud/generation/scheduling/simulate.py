"""PURE: serves a list of requests with the engine in some world. The virtual world is here; a replay has a real one.

In the virtual world a step takes the profile's time, and an answer ends at its known length.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final, Protocol

from isthmus.cloud.generation.scheduling.engine import Engine, Overloaded
from isthmus.cloud.generation.scheduling.policy import Life
from isthmus.cloud.generation.scheduling.profile import GenerationProfile
from isthmus.cloud.generation.scheduling.request import Outcome, Request
from isthmus.cloud.generation.scheduling.step import Drawn, Ended, Step

TICK_S: Final = 1e-6
"""Shortest wait if nothing is to run. Without it, an engine that asks to be called again at once would stop time."""
StepModel = Callable[[Step], float]
"""Returns the seconds that a step takes."""


class World(Protocol):
    """A clock that starts at 0, and one model."""

    def now_s(self) -> float: ...

    def wait(self, until_s: float) -> None:
        """Waits until ``until_s``."""

    def drop(self, ids: Sequence[int]) -> None:
        """Makes the model forget these requests."""

    def run(self, step: Step) -> Mapping[int, Drawn]:
        """Runs a step, which takes time, and returns the tokens that it drew."""


@dataclass(frozen=True, slots=True)
class End:
    """How one request ended, and when."""

    life: Life
    outcome: Outcome
    in_time: bool
    end_s: float


@dataclass
class Run:
    """The result of serving a list of requests. ``ends`` holds every accepted request, in the order of the ends."""

    ends: list[End] = field(default_factory=list)
    refused: list[Request] = field(default_factory=list)
    steps: int = 0
    busy_s: float = 0.0
    rows: int = 0
    """Rows of all steps together, dead ones included."""
    end_s: float = 0.0


class VirtualWorld:
    """A world with a virtual clock: time passes only by ``wait`` and ``run``. ``lengths[id]`` ends an answer."""

    def __init__(self, profile: GenerationProfile, lengths: Sequence[int], step_model: StepModel | None = None) -> None:
        self._profile = profile
        self._lengths = lengths
        self._step_model = step_model
        self._now_s = 0.0

    def now_s(self) -> float:
        return self._now_s

    def wait(self, until_s: float) -> None:
        self._now_s = max(self._now_s, until_s)

    def drop(self, ids: Sequence[int]) -> None:
        pass

    def run(self, step: Step) -> Mapping[int, Drawn]:
        self._now_s += step.swap_s
        self._now_s += self._profile.step_s(step.load) if self._step_model is None else self._step_model(step)
        drawn = {}
        for row in step.rows:
            if row.draws:
                tokens = row.first + len(row.tokens) - len(row.request.prompt) + 1
                drawn[row.id] = Drawn(0, last=tokens >= self._lengths[row.id])
        return drawn


def serve(engine: Engine, requests: Sequence[Request], world: World) -> Run:
    """Serves all ``requests`` (ascending arrivals) and returns what happened.

    Requests that arrive while a step runs are submitted after it has ended, each with its own arrival time, since
    nothing is decided before.

    >>> requests = [Request(id, range(9), max_tokens=8, arrival_s=0.1 * id) for id in range(2)]
    >>> engine = Engine(reference_profile(), make_policy("fused"))
    >>> run = serve(engine, requests, VirtualWorld(engine.profile, [3, 8]))
    >>> [(end.life.id, len(end.life.tokens), end.outcome.value) for end in run.ends]
    [(0, 3, 'finished'), (1, 8, 'finished')]
    """
    run = Run()
    coming = 0
    while True:
        coming = _submit(engine, requests, coming, world.now_s(), run)
        decision = engine.next_step(world.now_s())
        _note(run, decision.ended, world.now_s())
        world.drop(decision.drop)
        if decision.step is not None:
            drawn = world.run(decision.step)
            end_s = world.now_s()
            coming = _submit(engine, requests, coming, end_s, run)
            events = engine.finished(decision.step, drawn, end_s)
            _note(run, [event for event in events if isinstance(event, Ended)], end_s)
            run.steps += 1
            run.busy_s += end_s - decision.step.started_s
            run.rows += decision.step.load.decode_rows
            continue
        times_s = [] if decision.wait_until_s is None else [max(decision.wait_until_s, world.now_s() + TICK_S)]
        if coming < len(requests):
            times_s.append(requests[coming].arrival_s)
        if not times_s:
            run.end_s = world.now_s()
            return run
        world.wait(min(times_s))


def _submit(engine: Engine, requests: Sequence[Request], coming: int, until_s: float, run: Run) -> int:
    """Submits the requests that arrive up to ``until_s``. Returns the index of the next one."""
    while coming < len(requests) and requests[coming].arrival_s <= until_s:
        run.refused.append(requests[coming])
        with suppress(Overloaded):
            engine.submit(requests[coming], requests[coming].arrival_s)
            run.refused.pop()
        coming += 1
    return coming


def _note(run: Run, ended: Sequence[Ended], now_s: float) -> None:
    run.ends += [End(each.life, each.outcome, each.in_time, now_s) for each in ended]
