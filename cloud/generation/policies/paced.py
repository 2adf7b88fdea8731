"""PURE: continuous batching that keeps promises: it admits a request only if that keeps more of them than it breaks.

Every further row slows all others down. First come first served admits until everybody is late; here a request joins
only if, at the step time with it, it is likelier to be in time than the others together are to be late because of it.
Those beyond help get what is left over, and make room if a request that can be helped needs it.

How likely an answer is in time follows from what is known of its length. Where lengths can be predicted, a promise is
kept or broken; where they cannot, each step changes all chances a little, and requests join nearly as they come.
"""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from isthmus.cloud.generation.policies.fused import CHUNK_TOKENS, Fused
from isthmus.cloud.generation.policies.lengths import LengthPredictor
from isthmus.cloud.generation.policies.orders import FirstCome, pressure
from isthmus.cloud.generation.policies.queue import Floats, Queue, Waiting
from isthmus.cloud.generation.scheduling.policy import Choice, Life, State
from isthmus.cloud.generation.scheduling.profile import GenerationProfile, reference_profile

STARVED_S: Final = 300.0
"""After waiting so long, a request beyond help is served like one that is sure to be in time: nobody is left out."""
LEAST_CHANCE: Final = 0.03
"""A request that is less likely in time, were it alone, is beyond help."""
MOST_LOSS: Final = 0.95
"""Promises that may be broken per promise that is kept, both as expected numbers. Below 1, so that with known lengths
none is broken for another one."""
LEFT_OVER: Final = 0.05
"""Promises that a request beyond help may break, as an expected number."""
_MOST_REFUSED: Final = 8
"""If so many waiting requests, best first, may not join, the others are not asked in this step."""
_MOST_PREEMPTED: Final = 2
"""Times that one request makes room for others."""


@dataclass(frozen=True, slots=True)
class _Plans:
    """N requests, and what is left to do of each, (N,) each. Times are of the clock.

    ``left_N`` tokens are expected to be drawn, ``prefill_N`` to be computed before; ``pending_N`` is the latter and a
    decode's token.
    """

    rows: Waiting
    left_N: Floats
    prefill_N: Floats
    pending_N: Floats

    def prefill_s(self, step_s: Any, profile: GenerationProfile, chunk_tokens: int) -> Floats:
        """Returns the time until each prompt is computed, in chunks, if steps take ``step_s``."""
        found_N: Floats = self.prefill_N * profile.prompt_s + self.prefill_N // chunk_tokens * step_s
        return found_N


class _Promises(FirstCome):
    """Orders requests that can be helped before the others, and each of the two by what is left to do."""

    def __init__(self, lengths: LengthPredictor, chunk_tokens: int) -> None:
        self.lengths = lengths
        self.profile = reference_profile()
        self.now_s = 0.0
        self.beyond: set[int] = set()
        """Waiting requests that are beyond help, at the last look at the line."""
        self._chunk_tokens = chunk_tokens
        self._queue = Queue()

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

    def rank(self, life: Life) -> Any:
        plans = self.plans([life])
        beyond_N, left_s_N = self._keys(plans)
        return (bool(beyond_N[0]), float(left_s_N[0]), life.id)

    def line(self, state: State) -> list[Life]:
        waiting = self._queue.of(state)
        beyond_N, left_s_N = self._keys(self._planned(waiting))
        self.beyond = set(waiting.id_N[beyond_N].tolist())
        return waiting.by(beyond_N, left_s_N)

    def _keys(self, plans: _Plans) -> tuple[npt.NDArray[np.bool_], Floats]:
        """Returns what requests are ordered by: whether they are beyond help, and the time that is left to do."""
        step_s_N = self.alone_s(plans)
        left_s_N = plans.left_N * step_s_N + plans.prefill_s(step_s_N, self.profile, self._chunk_tokens)
        return self.beyond_help(plans), left_s_N

    def beyond_help(self, plans: _Plans) -> npt.NDArray[np.bool_]:
        """Returns whether each would hardly be in time even alone, (N,). Whoever waited very long is not given up."""
        hopeless_N: npt.NDArray[np.bool_] = self.chances(plans, self.alone_s(plans)) < LEAST_CHANCE
        return hopeless_N & ~self.starved(plans)

    def starved(self, plans: _Plans) -> npt.NDArray[np.bool_]:
        """Returns whether each waited very long, (N,)."""
        starved_N: npt.NDArray[np.bool_] = self.now_s - plans.rows.arrival_s_N > STARVED_S
        return starved_N

    def plans(self, company: list[Life]) -> _Plans:
        """Returns what is left of each request of ``company``, (N,)."""
        return self._planned(self._queue.of_lives(company))

    def _planned(self, rows: Waiting) -> _Plans:
        left_N = np.maximum(1.0, self.lengths.predict_all(rows) - rows.tokens_N)
        return _Plans(rows, left_N, rows.to_prefill_N, rows.known_N - rows.computed_N)

    def step_s(self, rows: int, context: float) -> float:
        """Returns the time of a step in which so many rows decode, with so many tokens in all."""
        return self.profile.step_fixed_s + self.profile.row_s * rows + self.profile.context_s * context

    def alone_s(self, plans: _Plans) -> Floats:
        """Returns the time of each request's step alone."""
        return self.profile.step_fixed_s + self.profile.row_s + self.profile.context_s * plans.rows.known_N

    def chances(self, plans: _Plans, step_s: Any, further_s: float = 0.0) -> Floats:
        """Returns how likely each keeps its wishes if steps take ``step_s``, after ``further_s`` of other work."""
        rows, begin_s = plans.rows, self.now_s + further_s
        first_s_N = begin_s + step_s + plans.pending_N * self.profile.prompt_s
        kept_N = (step_s <= rows.tpot_s_N) & (first_s_N <= rows.first_token_by_s_N)
        decode_s_N = rows.deadline_s_N - begin_s - plans.prefill_s(step_s, self.profile, self._chunk_tokens)
        return np.where(kept_N, self.lengths.within(rows, rows.tokens_N + decode_s_N / step_s), 0.0)


class Paced(Fused):
    """``fused`` with an admission that keeps promises. ``lengths`` predicts how long answers will be."""

    def __init__(self, lengths: LengthPredictor, *, chunk_tokens: int = CHUNK_TOKENS) -> None:
        self._promises = _Promises(lengths, chunk_tokens)
        super().__init__(self._promises, chunk_tokens=chunk_tokens, preempts=True)
        self._refused = 0
        self._company: tuple[list[Life], _Plans, Floats] | None = None

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

    def _plans_of(self, company: list[Life]) -> tuple[_Plans, Floats]:
        """Returns the plans of ``company`` and their chances as it is, those of the last call if nobody has joined."""
        if self._company is None or self._company[0] != company:
            plans = self._promises.plans(company)
            step_s = self._promises.step_s(len(company), float(plans.rows.known_N.sum()))
            self._company = (list(company), plans, self._promises.chances(plans, step_s))
        return self._company[1:]

    def _keeps(self, life: Life, company: list[Life]) -> bool:
        """Whether ``life`` is likelier in time than the others together become late because of it."""
        promises, (plans, before_N), own = self._promises, self._plans_of(company), self._promises.plans([life])
        after_s = promises.step_s(len(company) + 1, float(plans.rows.known_N.sum()) + life.known)
        beyond_help = life.id in promises.beyond
        gain = 1.0 if promises.starved(own)[0] else 0.0 if beyond_help else float(promises.chances(own, after_s)[0])
        if not beyond_help and gain <= 0:
            return False
        loss = float((before_N - promises.chances(plans, after_s, promises.profile.prompt_s * life.pending)).sum())
        return loss <= LEFT_OVER if beyond_help else loss < MOST_LOSS * gain

    def _displaced(self, holders: list[Life], waiting: list[Life], state: State) -> list[int]:
        """A runner that is beyond help makes room for a request that can be helped, and would not be admitted."""
        promises = self._promises
        if not waiting or not holders or waiting[0].id in promises.beyond:
            return []
        first, (plans, _) = waiting[0], self._plans_of(holders)
        # Only those that would be late even alone: a prediction that is a little off costs nobody the work done so far.
        late_N = promises.chances(plans, promises.alone_s(plans)) < LEAST_CHANCE
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
