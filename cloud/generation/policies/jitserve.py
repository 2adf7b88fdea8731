"""PURE: just-in-time serving (Zhang et al. 2025, "JITServe"): gain per second decides, in windows alike in length.

Before each step, each request is ranked by what it brings per second of work that is left:

    gain = tokens of the answer x min(1, time allowed / predicted time)^alpha
    rank = gain / remaining time

The answer's length is a high quantile of those that are longer than what there is already. The SHORTLIST x B best are
sorted by length, and of all windows of B neighbours the one with the greatest sum of ranks runs: a step's rows then are
of like length. The other runners make room, at most MOST_SWAPS a step.

Where we differ: the paper plans every 50 steps, which take a GPU about a second and this model on a processor five or
more, when a short request is late already; and in its gain, prompt tokens count an eighth of generated ones, so that of
two late requests the one with the longer prompt is served. On a trace of code requests, both together brought 0.10 of
them in time in place of 0.59 (docs/log.md). A runner that makes room computes its tokens again, unless there is a swap
pool; rows that no one of the window needs go to the next in rank; and each running request decodes in every step, where
the paper gives it just enough bandwidth (:func:`bandwidth`), which here says only who is beyond help.
"""

from typing import Any, Final

import numpy as np

from isthmus.cloud.generation.policies.fused import CHUNK_TOKENS, Fused
from isthmus.cloud.generation.policies.lengths import LengthPredictor
from isthmus.cloud.generation.policies.orders import FirstCome, pressure
from isthmus.cloud.generation.policies.queue import Floats, Queue, Waiting
from isthmus.cloud.generation.scheduling.policy import Life, State
from isthmus.cloud.generation.scheduling.profile import GenerationProfile, reference_profile

ALPHA: Final = 2.0
SHORTLIST: Final = 2
MOST_SWAPS: Final = 2
QUANTILE: Final = 0.95
"""The quantile of lengths that is planned with."""
HOPELESS: Final = 0.1
"""What a request's gain counts if not even a token per step would be in time."""
MOST_WORTH: Final = 1e9
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
        self._queue = Queue()
        self._waiting = self._queue.waiting({})
        self._worth_N: Floats = np.empty(0)
        self._outside_N = np.empty(0, dtype=bool)

    def use(self, profile: GenerationProfile) -> None:
        self._profile = profile

    def arrived(self, life: Life) -> None:
        self._queue.arrived(life)

    def left(self, life: Life) -> None:
        self._queue.left(life)
        self.window.discard(life.id)
        if life.whole:
            self.lengths.learn(life)

    def look(self, now_s: float, state: State) -> None:
        self._now_s = now_s
        self._rows = min(state.limits.rows, max(1, len(state.lives)))
        self.lengths.look(pressure(state))
        self._plan(state)

    def rank(self, life: Life) -> Any:
        return (life.id not in self.window, -self._value(life)[0], life.id)

    def line(self, state: State) -> list[Life]:
        return self._waiting.by(self._outside_N, -self._worth_N)

    def _value(self, life: Life) -> tuple[float, float]:
        """Returns the gain per second of remaining time, and the predicted length of prompt and answer."""
        request, length = life.request, self.lengths.predict(life)
        whole = len(request.prompt) + length
        if self._now_s - request.arrival_s > _STARVED_S:
            return MOST_WORTH, whole
        step_s = self._step_s(life)
        left_s = (length - len(life.tokens)) * step_s + (0 if life.decodes else life.pending * self._profile.prompt_s)
        gain = length
        if request.deadline_s is not None:
            allowed_s, predicted_s = request.deadline_s - request.arrival_s, self._now_s + left_s - request.arrival_s
            gain *= min(1.0, allowed_s / max(predicted_s, 1e-9)) ** ALPHA
        if request.ttft_s is not None and not life.tokens:
            first_s = self._now_s - request.arrival_s + step_s + life.pending * self._profile.prompt_s
            gain *= min(1.0, request.ttft_s / max(first_s, 1e-9)) ** ALPHA
        if bandwidth(length - len(life.tokens), request.deadline_s, self._now_s) * step_s > 1:
            gain *= HOPELESS
        return gain / max(left_s, 1e-9), whole

    def _values_of(self, waiting: Waiting) -> tuple[Floats, Floats]:
        """Returns what ``_value`` does, for each request that waits, (N,) each."""
        now_s, prompt_s = self._now_s, self._profile.prompt_s
        length_N = self.lengths.predict_all(waiting)
        to_draw_N = length_N - waiting.tokens_N
        step_s_N = self._profile.step_fixed_s + self._rows * (
            self._profile.row_s + self._profile.context_s * waiting.known_N
        )
        left_s_N = to_draw_N * step_s_N + waiting.to_prefill_N * prompt_s
        waited_s_N = now_s - waiting.arrival_s_N
        allowed_s_N = waiting.deadline_s_N - waiting.arrival_s_N
        gain_N = length_N * np.minimum(1.0, allowed_s_N / np.maximum(waited_s_N + left_s_N, 1e-9)) ** ALPHA
        first_s_N = waited_s_N + step_s_N + (waiting.known_N - waiting.computed_N) * prompt_s
        ttft_s_N = waiting.first_token_by_s_N - waiting.arrival_s_N
        gain_N *= np.minimum(1.0, ttft_s_N / np.maximum(first_s_N, 1e-9)) ** ALPHA
        gain_N *= np.where(to_draw_N * step_s_N > waiting.deadline_s_N - now_s, HOPELESS, 1.0)
        worth_N = np.where(waited_s_N > _STARVED_S, MOST_WORTH, gain_N / np.maximum(left_s_N, 1e-9))
        return worth_N, waiting.prompt_N + length_N

    def _plan(self, state: State) -> None:
        """Chooses the window: of the best, those neighbours in length that are worth most together."""
        rows = state.limits.rows
        self._waiting = self._queue.of(state)
        self._worth_N, length_N = self._values_of(self._waiting)
        running = self._queue.running(state)
        running_worth_X, running_length_X = self._values_of(running)
        id_N = np.concatenate((self._waiting.id_N, running.id_N))
        worth_N = np.concatenate((self._worth_N, running_worth_X))
        length_N = np.concatenate((length_N, running_length_X))
        best_M = np.lexsort((id_N, -worth_N))[: SHORTLIST * rows]
        best_M = best_M[np.lexsort((id_N[best_M], length_N[best_M]))]
        summed_M = np.concatenate(([0.0], np.cumsum(worth_N[best_M])))
        width = min(rows, len(best_M))
        start = int(np.argmax(summed_M[width:] - summed_M[: len(summed_M) - width]))
        window_M = best_M[start : start + width]
        self.window = {int(id) for id in id_N[window_M].tolist()}
        outside_N = np.ones(len(id_N), dtype=bool)
        outside_N[window_M] = False
        self._outside_N = outside_N[: len(self._worth_N)]

    def _step_s(self, life: Life) -> float:
        context = life.known * self._rows
        return self._profile.step_fixed_s + self._profile.row_s * self._rows + self._profile.context_s * context


class JitServe(Fused):
    """``fused`` whose rows are the window of greatest worth."""

    def __init__(self, lengths: LengthPredictor, *, chunk_tokens: int = CHUNK_TOKENS) -> None:
        self._gains = _Gains(lengths)
        super().__init__(self._gains, chunk_tokens=chunk_tokens, preempts=True)

    def _displaced(self, holders: list[Life], waiting: list[Life], state: State) -> list[int]:
        """Runners outside the window make room for waiting requests of the window that find none."""
        window = self._gains.window
        wanting = [state.lives[id] for id in window if id in state.lives and id not in state.blocks]
        outside = [life for life in holders if life.id not in window and not life.preempted]
        if not wanting or not outside:
            return []
        free_rows = state.limits.rows - len(holders)
        needed = sum(-(-life.pending // state.limits.block_tokens) for life in wanting)
        if len(wanting) <= free_rows and needed <= state.free_blocks:
            return []
        outside.sort(key=self._gains.rank)
        return [life.id for life in outside[-MOST_SWAPS:]]
