"""PURE: the order in which requests are served: first come, by predicted work, or fair between users.

An order ranks requests; what runs together is the policy's choice (``fused.py``).
"""

from collections import Counter, defaultdict
from typing import Any, Final, Protocol

import numpy as np

from isthmus.cloud.generation.policies.lengths import LengthPredictor
from isthmus.cloud.generation.policies.queue import Queue
from isthmus.cloud.generation.policies.unmoved import Unmoved
from isthmus.cloud.generation.scheduling.policy import Life, State
from isthmus.cloud.generation.scheduling.profile import GenerationProfile, reference_profile

AGING_S: Final = 60.0
"""A request that has waited this long is served as if a request's work, whatever it is, were nothing."""


class Order(Protocol):
    """``rank`` gives what to sort by, least first. ``look`` is called before each decision."""

    def use(self, profile: GenerationProfile) -> None: ...

    def arrived(self, life: Life) -> None: ...

    def left(self, life: Life) -> None: ...

    def admitted(self, life: Life) -> None:
        """Called when a waiting request is given a place in the KV cache."""

    def look(self, now_s: float, state: State) -> None: ...

    def rank(self, life: Life) -> Any: ...

    def line(self, state: State) -> list[Life]:
        """Returns the requests that wait, in the order of their ranks."""

    def may_displace(self, first: Life, last: Life) -> bool:
        """Whether ``first``, which waits, is worth the work that is lost if ``last`` is preempted."""


class FirstCome(Unmoved):
    """By arrival. A preempted request keeps its rank."""

    def admitted(self, life: Life) -> None:
        pass

    def look(self, now_s: float, state: State) -> None:
        pass

    def rank(self, life: Life) -> Any:
        return (life.request.arrival_s, life.id)

    def line(self, state: State) -> list[Life]:
        return sorted((life for id, life in state.lives.items() if id not in state.blocks), key=self.rank)

    def may_displace(self, first: Life, last: Life) -> bool:
        return False


class Shortest(FirstCome):
    """By predicted work, in seconds of the profile.

    ``rule`` is "sjf" (all work of the request), "srpt" (the work that is left; a running request counts what it would
    lose) or "hrrn" (work over waiting time plus work, so the longest relative wait is first). All age: the work counts
    less the longer a request waits, and nothing after AGING_S.
    """

    def __init__(self, rule: str, lengths: LengthPredictor) -> None:
        if rule not in ("sjf", "srpt", "hrrn"):
            raise ValueError(f"no rule {rule!r}; known are sjf, srpt and hrrn")
        self._rule = rule
        self._lengths = lengths
        self._profile = reference_profile()
        self._now_s = 0.0
        self._queue = Queue()

    def use(self, profile: GenerationProfile) -> None:
        self._profile = profile

    def arrived(self, life: Life) -> None:
        self._queue.arrived(life)

    def left(self, life: Life) -> None:
        self._queue.left(life)
        if life.whole:
            self._lengths.learn(life)

    def look(self, now_s: float, state: State) -> None:
        self._now_s = now_s
        self._lengths.look(pressure(state))

    def line(self, state: State) -> list[Life]:
        waiting = self._queue.of(state)
        waited_N = np.maximum(0.0, self._now_s - waiting.arrival_s_N)
        total_N = self._lengths.predict_all(waiting)
        remaining = self._rule == "srpt"
        drawn_N = waiting.tokens_N if remaining else np.zeros(len(total_N))
        to_compute_N = np.where(remaining & (waiting.computed_N > 0), 0.0, waiting.prompt_N + drawn_N)
        row_s_N = self._profile.row_s + self._profile.context_s * (waiting.prompt_N + total_N)
        work_s_N = self._profile.prompt_s * to_compute_N + (total_N - drawn_N) * row_s_N + 1e-9
        if self._rule == "hrrn":
            return waiting.by(-(1 + waited_N / work_s_N))
        return waiting.by(work_s_N * np.maximum(0.0, 1 - waited_N / AGING_S), waiting.arrival_s_N)

    def rank(self, life: Life) -> Any:
        waited_s = max(0.0, self._now_s - life.request.arrival_s)
        work_s = self._work_s(life)
        if self._rule == "hrrn":
            return (-(1 + waited_s / work_s), life.id)
        return (work_s * max(0.0, 1 - waited_s / AGING_S), life.request.arrival_s, life.id)

    def may_displace(self, first: Life, last: Life) -> bool:
        return self._rule == "srpt" and not last.preempted and 2 * self._work_s(first) < self._work_s(last)

    def _work_s(self, life: Life) -> float:
        total = self._lengths.predict(life)
        drawn = len(life.tokens) if self._rule == "srpt" else 0
        to_compute = 0 if self._rule == "srpt" and life.holds else len(life.request.prompt) + drawn
        row_s = self._profile.row_s + self._profile.context_s * (len(life.request.prompt) + total)
        return self._profile.prompt_s * to_compute + (total - drawn) * row_s + 1e-9


def pressure(state: State) -> float:
    """Returns how many requests wait, as a share of those that can run: at most 1."""
    return min(1.0, (len(state.lives) - len(state.blocks)) / state.limits.rows)


class Fair(FirstCome):
    """The user who was served least is first: the virtual token counter (Sheng et al. 2024, "VTC", Alg. 2).

    A user's counter grows by one per prompt token at admission and by two per generated token. A user who returns is
    lifted to the least counter of those who are there, so nobody saves up service.
    """

    PROMPT: Final = 1.0
    GENERATED: Final = 2.0
    KNOWN: Final = 256
    """Counters before those are dropped that no longer matter."""

    def __init__(self) -> None:
        self.counters: defaultdict[str, float] = defaultdict(float)
        self._most = self.KNOWN
        self._here: Counter[str] = Counter()
        self._charged: dict[int, int] = {}

    def arrived(self, life: Life) -> None:
        user = life.request.user
        if not self._here[user]:
            others = [self.counters[each] for each, here in self._here.items() if here]
            self.counters[user] = max(self.counters[user], min(others, default=0.0))
        self._here[user] += 1

    def left(self, life: Life) -> None:
        self._charge(life)
        self._charged.pop(life.id, None)
        self._here[life.request.user] -= 1
        if not self._here[life.request.user]:
            del self._here[life.request.user]
            if not self._here:
                self.counters.clear()
            elif len(self.counters) > self._most:
                self._forget()

    def _forget(self) -> None:
        """Drops the counters of users who are away and would be lifted above them: the least one here only grows."""
        least = min(self.counters[user] for user in self._here)
        for user in [each for each, count in self.counters.items() if count <= least and each not in self._here]:
            del self.counters[user]
        self._most = max(self.KNOWN, 2 * len(self.counters))

    def admitted(self, life: Life) -> None:
        if life.id not in self._charged:
            self._charged[life.id] = 0
            self.counters[life.request.user] += self.PROMPT * len(life.request.prompt)

    def look(self, now_s: float, state: State) -> None:
        for id in state.blocks:
            self._charge(state.lives[id])

    def rank(self, life: Life) -> Any:
        return (self.counters[life.request.user], life.request.arrival_s, life.id)

    def _charge(self, life: Life) -> None:
        if life.id in self._charged:
            self.counters[life.request.user] += self.GENERATED * (len(life.tokens) - self._charged[life.id])
            self._charged[life.id] = len(life.tokens)
