"""PURE: continuous batching that keeps its promises: it admits a request only if all others stay in time.

Every further row slows all others down. First come first served admits until everybody is late; here a request joins
only if, at the step time with it, it and everyone who could still be in time will be. Those beyond help get what is
left over, and make room if a request that can be helped needs it.
"""

from typing import Any, Final

from isthmus.cloud.generation.policies.fused import CHUNK_TOKENS, Fused
from isthmus.cloud.generation.policies.lengths import LengthPredictor
from isthmus.cloud.generation.policies.orders import FirstCome, pressure
from isthmus.cloud.generation.scheduling.policy import Choice, Life, State
from isthmus.cloud.generation.scheduling.profile import GenerationProfile, reference_profile

STARVED_S: Final = 300.0
"""After waiting so long, a request beyond help is served like any other, so that nobody waits for ever."""
_MOST_REFUSED: Final = 8
"""If so many waiting requests, best first, may not join, the others are not asked in this step."""
_MOST_PREEMPTED: Final = 2
"""Times that one request makes room for others."""


class _Promises(FirstCome):
    """Orders requests that can be helped before the others, and each of the two by what is left to do."""

    def __init__(self, lengths: LengthPredictor) -> None:
        self.lengths = lengths
        self.profile = reference_profile()
        self.now_s = 0.0
        self._tokens: dict[int, float] = {}

    def use(self, profile: GenerationProfile) -> None:
        self.profile = profile

    def left(self, life: Life) -> None:
        if life.whole:
            self.lengths.learn(life)

    def look(self, now_s: float, state: State) -> None:
        self.now_s = now_s
        self.lengths.look(pressure(state))
        self._tokens = {}

    def rank(self, life: Life) -> Any:
        starved = self.now_s - life.request.arrival_s > STARVED_S
        beyond_help = not starved and not self.in_time(life, self.step_s([life]))
        return (beyond_help, self.left_s(life, self.step_s([life])), life.id)

    def step_s(self, company: list[Life]) -> float:
        """Returns the time of a step in which all of them decode."""
        context = sum(life.known for life in company)
        return self.profile.step_fixed_s + self.profile.row_s * len(company) + self.profile.context_s * context

    def left_s(self, life: Life, step_s: float, chunk_tokens: int = CHUNK_TOKENS) -> float:
        """Returns the time until the request's end if steps take ``step_s`` and its prompt comes in chunks."""
        if life.id not in self._tokens:
            self._tokens[life.id] = max(1.0, self.lengths.predict(life) - len(life.tokens))
        tokens = self._tokens[life.id]
        prompt = 0 if life.decodes else life.pending
        return tokens * step_s + prompt * self.profile.prompt_s + (prompt // chunk_tokens) * step_s

    def in_time(self, life: Life, step_s: float, further_s: float = 0.0) -> bool:
        """Whether the request keeps its wishes if steps take ``step_s``, after ``further_s`` of other work."""
        request, ends_s = life.request, self.now_s + further_s + self.left_s(life, step_s)
        if request.deadline_s is not None and ends_s > request.deadline_s:
            return False
        if request.tpot_s is not None and step_s > request.tpot_s:
            return False
        if request.ttft_s is None or life.tokens:
            return True
        first_s = self.now_s + further_s + step_s + life.pending * self.profile.prompt_s
        return first_s <= request.arrival_s + request.ttft_s


class Paced(Fused):
    """``fused`` with an admission that keeps promises. ``lengths`` predicts how long answers will be."""

    def __init__(self, lengths: LengthPredictor, *, chunk_tokens: int = CHUNK_TOKENS) -> None:
        self._promises = _Promises(lengths)
        super().__init__(self._promises, chunk_tokens=chunk_tokens, preempts=True)
        self._refused = 0

    def choose(self, now_s: float, state: State) -> Choice:
        self._refused = 0
        return super().choose(now_s, state)

    def _admits(self, life: Life, company: list[Life], now_s: float) -> bool:
        if not company:
            return True
        if self._refused >= _MOST_REFUSED:
            return False
        kept = self._keeps(life, company)
        self._refused += not kept
        return kept

    def _keeps(self, life: Life, company: list[Life]) -> bool:
        """Whether everybody who could be in time still is if ``life`` joins, and it is too (or is beyond help)."""
        promises = self._promises
        before_s, after_s = promises.step_s(company), promises.step_s([*company, life])
        prompt_s = promises.profile.prompt_s * life.pending
        helped = [each for each in company if promises.in_time(each, before_s)]
        if not all(promises.in_time(each, after_s, prompt_s) for each in helped):
            return False
        return promises.rank(life)[0] or promises.in_time(life, after_s)

    def _displaced(self, holders: list[Life], waiting: list[Life], state: State) -> list[int]:
        """A runner that is beyond help makes room for a request that can be helped, and would not be admitted."""
        promises = self._promises
        if not waiting or promises.rank(waiting[0])[0]:
            return []
        first = waiting[0]
        # Only those that would be late even alone: a prediction that is a little off costs nobody the work done so far.
        hopeless = [
            life
            for life in holders
            if life.preempted < _MOST_PREEMPTED and not promises.in_time(life, promises.step_s([life]))
        ]
        if not hopeless:
            return []
        needed = -(-first.pending // state.limits.block_tokens)
        full = len(holders) >= state.limits.rows or needed > state.free_blocks
        if not full and self._keeps(first, holders):
            return []
        return [max(hopeless, key=promises.rank).id]
