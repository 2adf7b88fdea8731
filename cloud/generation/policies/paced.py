"""PURE: continuous batching that keeps its promises: it admits a request only if all others stay in time.

Every further row slows all others down. First come first served admits until everybody is late; here a request joins
only if, at the step time with it, it and everyone who could still be in time will be. Those beyond help get what is
left over, and make room if a request that can be helped needs it.
"""

import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from isthmus.cloud.generation.policies.fused import CHUNK_TOKENS, Fused
from isthmus.cloud.generation.policies.lengths import LengthPredictor
from isthmus.cloud.generation.policies.orders import FirstCome, pressure
from isthmus.cloud.generation.policies.queue import Floats, Queue
from isthmus.cloud.generation.scheduling.policy import Choice, Life, State
from isthmus.cloud.generation.scheduling.profile import GenerationProfile, reference_profile

STARVED_S: Final = 300.0
"""After waiting so long, a request beyond help is served like any other, so that nobody waits for ever."""
_MOST_REFUSED: Final = 8
"""If so many waiting requests, best first, may not join, the others are not asked in this step."""
_MOST_PREEMPTED: Final = 2
"""Times that one request makes room for others."""


@dataclass(frozen=True, slots=True)
class _Plans:
    """What is left to do of N requests, and their wishes (infinite: none), (N,) each. Times are of the clock.

    ``tokens_N`` are to be drawn, ``prefill_N`` to be computed before; ``pending_N`` is the latter and a decode's token.
    """

    tokens_N: Floats
    prefill_N: Floats
    pending_N: Floats
    known_N: Floats
    deadline_s_N: Floats
    first_token_by_s_N: Floats
    tpot_s_N: Floats

    def left_s(self, step_s: Any, profile: GenerationProfile, chunk_tokens: int) -> Floats:
        """Returns the time until each one's end if steps take ``step_s`` and prompts come in chunks."""
        chunks_N = self.prefill_N // chunk_tokens
        left_s_N: Floats = self.tokens_N * step_s + self.prefill_N * profile.prompt_s + chunks_N * step_s
        return left_s_N

    def in_time(
        self, now_s: float, step_s: Any, profile: GenerationProfile, chunk_tokens: int
    ) -> npt.NDArray[np.bool_]:
        """Whether each one keeps its wishes if steps take ``step_s``, from ``now_s`` on."""
        ends_s_N = now_s + self.left_s(step_s, profile, chunk_tokens)
        first_s_N = now_s + step_s + self.pending_N * profile.prompt_s
        kept_N: npt.NDArray[np.bool_] = (
            (ends_s_N <= self.deadline_s_N) & (step_s <= self.tpot_s_N) & (first_s_N <= self.first_token_by_s_N)
        )
        return kept_N


class _Promises(FirstCome):
    """Orders requests that can be helped before the others, and each of the two by what is left to do."""

    def __init__(self, lengths: LengthPredictor, chunk_tokens: int) -> None:
        self.lengths = lengths
        self.profile = reference_profile()
        self.now_s = 0.0
        self._chunk_tokens = chunk_tokens
        self._queue = Queue()
        self._tokens: dict[int, float] = {}

    def use(self, profile: GenerationProfile) -> None:
        self.profile = profile

    def arrived(self, life: Life) -> None:
        self._queue.arrived(life)

    def left(self, life: Life) -> None:
        self._queue.left(life)
        if life.whole:
            self.lengths.learn(life)

    def look(self, now_s: float, state: State) -> None:
        self.now_s = now_s
        self.lengths.look(pressure(state))
        self._tokens = {}

    def rank(self, life: Life) -> Any:
        plans = self.plans([life])
        step_s = self.alone_s(plans)
        starved = self.now_s - life.request.arrival_s > STARVED_S
        beyond_help = not starved and not self.in_time(plans, step_s)[0]
        return (beyond_help, float(plans.left_s(step_s, self.profile, self._chunk_tokens)[0]), life.id)

    def line(self, state: State) -> list[Life]:
        waiting = self._queue.of(state)
        plans = _Plans(
            np.maximum(1.0, self.lengths.predict_all(waiting) - waiting.tokens_N),
            waiting.to_prefill_N,
            waiting.known_N - waiting.computed_N,
            waiting.known_N,
            waiting.deadline_s_N,
            waiting.first_token_by_s_N,
            waiting.tpot_s_N,
        )
        step_s_N = self.alone_s(plans)
        starved_N = self.now_s - waiting.arrival_s_N > STARVED_S
        beyond_N = ~starved_N & ~self.in_time(plans, step_s_N)
        return waiting.by(beyond_N, plans.left_s(step_s_N, self.profile, self._chunk_tokens))

    def plans(self, company: list[Life]) -> _Plans:
        """Returns what is left of each request of ``company``, (N,)."""
        rows = [self._plan(life) for life in company]
        return _Plans(*np.array(rows, dtype=np.float64).reshape(-1, 7).T)

    def _plan(self, life: Life) -> tuple[float, ...]:
        request, pending = life.request, life.pending
        if life.id not in self._tokens:
            self._tokens[life.id] = max(1.0, self.lengths.predict(life) - len(life.tokens))
        by_s = request.arrival_s + request.ttft_s if request.ttft_s is not None and not life.tokens else math.inf
        return (
            self._tokens[life.id],
            0.0 if life.computed and pending == 1 else pending,
            pending,
            pending + life.computed,
            math.inf if request.deadline_s is None else request.deadline_s,
            by_s,
            math.inf if request.tpot_s is None else request.tpot_s,
        )

    def step_s(self, rows: int, context: float) -> float:
        """Returns the time of a step in which so many rows decode, with so many tokens in all."""
        return self.profile.step_fixed_s + self.profile.row_s * rows + self.profile.context_s * context

    def alone_s(self, plans: _Plans) -> Floats:
        """Returns the time of each request's step alone."""
        return self.profile.step_fixed_s + self.profile.row_s + self.profile.context_s * plans.known_N

    def in_time(self, plans: _Plans, step_s: Any, further_s: float = 0.0) -> npt.NDArray[np.bool_]:
        """Whether each request keeps its wishes if steps take ``step_s``, after ``further_s`` of other work."""
        return plans.in_time(self.now_s + further_s, step_s, self.profile, self._chunk_tokens)


class Paced(Fused):
    """``fused`` with an admission that keeps promises. ``lengths`` predicts how long answers will be."""

    def __init__(self, lengths: LengthPredictor, *, chunk_tokens: int = CHUNK_TOKENS) -> None:
        self._promises = _Promises(lengths, chunk_tokens)
        super().__init__(self._promises, chunk_tokens=chunk_tokens, preempts=True)
        self._refused = 0
        self._company: tuple[list[Life], _Plans] | None = None

    def choose(self, now_s: float, state: State) -> Choice:
        self._refused = 0
        self._company = None
        return super().choose(now_s, state)

    def _admits(self, life: Life, company: list[Life], now_s: float) -> bool:
        if not company:
            return True
        if self._refused >= _MOST_REFUSED:
            return False
        kept = self._keeps(life, company)
        self._refused += not kept
        return kept

    def _plans_of(self, company: list[Life]) -> _Plans:
        """Returns the plans of ``company``, which are those of the last call if nobody has joined since."""
        if self._company is None or self._company[0] != company:
            self._company = (list(company), self._promises.plans(company))
        return self._company[1]

    def _keeps(self, life: Life, company: list[Life]) -> bool:
        """Whether everybody who could be in time still is if ``life`` joins, and it is too (or is beyond help)."""
        promises, plans, own = self._promises, self._plans_of(company), self._promises.plans([life])
        context = float(plans.known_N.sum())
        before_s = promises.step_s(len(company), context)
        after_s = promises.step_s(len(company) + 1, context + life.known)
        prompt_s = promises.profile.prompt_s * life.pending
        helped_N = promises.in_time(plans, before_s)
        if not promises.in_time(plans, after_s, prompt_s)[helped_N].all():
            return False
        return bool(promises.in_time(own, after_s)[0]) or bool(promises.rank(life)[0])

    def _displaced(self, holders: list[Life], waiting: list[Life], state: State) -> list[int]:
        """A runner that is beyond help makes room for a request that can be helped, and would not be admitted."""
        promises = self._promises
        if not waiting or not holders or promises.rank(waiting[0])[0]:
            return []
        first, plans = waiting[0], self._plans_of(holders)
        # Only those that would be late even alone: a prediction that is a little off costs nobody the work done so far.
        late_N = ~promises.in_time(plans, promises.alone_s(plans))
        hopeless = [
            life
            for life, late in zip(holders, late_N.tolist(), strict=True)
            if late and life.preempted < _MOST_PREEMPTED
        ]
        if not hopeless:
            return []
        needed = -(-first.pending // state.limits.block_tokens)
        full = len(holders) >= state.limits.rows or needed > state.free_blocks
        if not full and self._keeps(first, holders):
            return []
        return [max(hopeless, key=promises.rank).id]
