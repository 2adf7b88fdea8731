"""PURE: just-in-time serving (Zhang et al. 2025, "JITServe"): gain per second decides, in windows alike in length.

Every REPLAN_STEPS steps each request is ranked by what it brings per second of work that is left:

    gain = (prompt + WEIGHT x tokens of the answer) x min(1, time allowed / predicted time)^alpha
    rank = gain / remaining time

The answer's length is a high quantile of those that are longer than what there is already. The SHORTLIST x B best are
sorted by length, and of all windows of B neighbours the one with the greatest sum of ranks runs: a step's rows then are
of like length. The other runners make room, at most MOST_SWAPS a step.

Where we differ: a runner that makes room computes its tokens again; rows that no one of the window needs go to the next
in rank; and each running request decodes in every step, where the paper gives it just enough bandwidth
(:func:`bandwidth`), which here tells only who is beyond help.
"""

from typing import Any, Final

from isthmus.cloud.generation.policies.fused import CHUNK_TOKENS, Fused
from isthmus.cloud.generation.policies.lengths import LengthPredictor
from isthmus.cloud.generation.policies.orders import FirstCome, pressure
from isthmus.cloud.generation.scheduling.policy import Choice, Life, State
from isthmus.cloud.generation.scheduling.profile import GenerationProfile, reference_profile

REPLAN_STEPS: Final = 50
WEIGHT: Final = 8.0
ALPHA: Final = 2.0
SHORTLIST: Final = 2
MOST_SWAPS: Final = 2
QUANTILE: Final = 0.95
"""The quantile of lengths that is planned with."""
_STARVED_S: Final = 300.0
"""After waiting so long a request is before all others, so that nobody waits for ever."""


def bandwidth(tokens_left: float, deadline_s: float | None, now_s: float) -> float:
    """Returns the tokens per second with which an answer is just in time: 0 without a deadline, infinite after it.

    >>> bandwidth(30, deadline_s=10.0, now_s=4.0)
    5.0
    """
    if deadline_s is None:
        return 0.0
    return tokens_left / (deadline_s - now_s) if deadline_s > now_s else float("inf")


class _Gains(FirstCome):
    """Ranks by gain per second of remaining time; those of the window come first."""

    def __init__(self, lengths: LengthPredictor) -> None:
        self.lengths = lengths
        self.window: set[int] = set()
        self._profile = reference_profile()
        self._now_s = 0.0
        self._rows = 1

    def use(self, profile: GenerationProfile) -> None:
        self._profile = profile

    def left(self, life: Life) -> None:
        self.window.discard(life.id)
        if life.whole:
            self.lengths.learn(life)

    def look(self, now_s: float, state: State) -> None:
        self._now_s = now_s
        self._rows = min(state.limits.rows, max(1, len(state.lives)))
        self.lengths.look(pressure(state))

    def rank(self, life: Life) -> Any:
        return (life.id not in self.window, -self.worth(life), life.id)

    def worth(self, life: Life) -> float:
        """Returns the gain per second of remaining time."""
        request = life.request
        if self._now_s - request.arrival_s > _STARVED_S:
            return float("inf")
        length = self.lengths.predict(life)
        step_s = self._step_s(life)
        left_s = (length - len(life.tokens)) * step_s + (0 if life.decodes else life.pending * self._profile.prompt_s)
        gain = len(request.prompt) + WEIGHT * length
        if request.deadline_s is not None:
            allowed_s, predicted_s = request.deadline_s - request.arrival_s, self._now_s + left_s - request.arrival_s
            gain *= min(1.0, allowed_s / max(predicted_s, 1e-9)) ** ALPHA
        if request.ttft_s is not None and not life.tokens:
            first_s = self._now_s - request.arrival_s + step_s + life.pending * self._profile.prompt_s
            gain *= min(1.0, request.ttft_s / max(first_s, 1e-9)) ** ALPHA
        if bandwidth(length - len(life.tokens), request.deadline_s, self._now_s) * step_s > 1:
            gain *= 0.1  # not even a token per step would be in time
        return gain / max(left_s, 1e-9)

    def replan(self, state: State) -> None:
        """Chooses the window: of the best, those neighbours in length that are worth most together."""
        rows = state.limits.rows
        worth = {life.id: self.worth(life) for life in state.lives.values()}
        best = sorted(state.lives.values(), key=lambda life: (-worth[life.id], life.id))[: SHORTLIST * rows]
        best.sort(key=lambda life: (len(life.request.prompt) + self.lengths.predict(life), life.id))
        if len(best) <= rows:
            self.window = {life.id for life in best}
            return
        ids = [life.id for life in best]
        starts = range(len(ids) - rows + 1)
        start = max(starts, key=lambda at: (sum(worth[id] for id in ids[at : at + rows]), -at))
        self.window = set(ids[start : start + rows])

    def _step_s(self, life: Life) -> float:
        context = life.known * self._rows
        return self._profile.step_fixed_s + self._profile.row_s * self._rows + self._profile.context_s * context


class JitServe(Fused):
    """``fused`` whose rows are the window of greatest worth."""

    def __init__(self, lengths: LengthPredictor, *, chunk_tokens: int = CHUNK_TOKENS) -> None:
        self._gains = _Gains(lengths)
        super().__init__(self._gains, chunk_tokens=chunk_tokens, preempts=True)
        self._steps = 0

    def choose(self, now_s: float, state: State) -> Choice:
        if self._steps % REPLAN_STEPS == 0:
            self._gains.look(now_s, state)
            self._gains.replan(state)
        choice = super().choose(now_s, state)
        self._steps += bool(choice.run)
        return choice

    def _displaced(self, holders: list[Life], waiting: list[Life], state: State) -> list[int]:
        """Runners outside the window make room for waiting requests of the window that find none."""
        window = self._gains.window
        wanting = [life for life in waiting if life.id in window]
        outside = [life for life in holders if life.id not in window and not life.preempted]
        if not wanting or not outside:
            return []
        free_rows = state.limits.rows - len(holders)
        needed = sum(-(-life.pending // state.limits.block_tokens) for life in wanting)
        if len(wanting) <= free_rows and needed <= state.free_blocks:
            return []
        outside.sort(key=self._gains.rank)
        return [life.id for life in outside[-MOST_SWAPS:]]
