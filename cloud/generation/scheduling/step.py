"""PURE: what goes into the engine and what comes out of it: steps of the model, tokens that were drawn, and ends."""

from collections.abc import Sequence
from dataclasses import dataclass

from isthmus.cloud.generation.scheduling.blocks import Shared
from isthmus.cloud.generation.scheduling.policy import Life
from isthmus.cloud.generation.scheduling.profile import Load
from isthmus.cloud.generation.scheduling.request import Outcome, Request


@dataclass(frozen=True, slots=True)
class StepRow:
    """The tokens of one request in a step, from position ``first`` on.

    If ``draws``, the last of them yields the next token, whose position is ``first`` plus the number of ``tokens``.
    """

    request: Request
    first: int
    tokens: Sequence[int]
    draws: bool
    blocks: tuple[int, ...]

    @property
    def id(self) -> int:
        return self.request.id


@dataclass(frozen=True, slots=True)
class Step:
    """One forward of the model. ``predicted_s`` is the profile's time at the current pace.

    Before it, the requests of ``swap_out`` go to the pool beside the KV cache, and those of ``swap_in`` come back. The
    copies out need not have ended before the forward; ``swap_s`` is predicted for the copies in.
    """

    id: int
    rows: tuple[StepRow, ...]
    load: Load
    started_s: float
    predicted_s: float
    swap_out: tuple[int, ...] = ()
    swap_in: tuple[int, ...] = ()
    swap_s: float = 0.0
    shared: tuple[tuple[int, Shared], ...] = ()
    """Requests whose first tokens others have computed. Their copies are made before the forward, in this order."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """A token that was drawn. ``last``: the answer ends with it, by an end token or a stop string."""

    token: int
    last: bool = False


@dataclass(frozen=True, slots=True)
class Token:
    """The request's answer got longer: ``index`` counts its tokens from 0."""

    life: Life
    index: int
    token: int


@dataclass(frozen=True, slots=True)
class Ended:
    """The request has its outcome. ``in_time`` says whether the answer is whole and keeps all of its wishes."""

    life: Life
    outcome: Outcome
    in_time: bool


@dataclass(frozen=True, slots=True)
class Decision:
    """What the caller must do now: report ``ended``, make the model forget ``drop``, then run ``step``.

    Without a step, ask again after a request was submitted, or at ``wait_until_s`` if it is given.
    """

    step: Step | None
    ended: tuple[Ended, ...]
    drop: tuple[int, ...]
    wait_until_s: float | None
