"""PURE: several engines under one virtual clock: dispatch, live moves, drains, and prompts apart from decodes.

A *fused* replica does everything. With *prefill* replicas, a request gets its first token there, and then its KV cache
is moved to one of the others, which only decode (Zhong et al. 2024, "DistServe").

A live move copies the KV cache while decoding goes on, and then, between two steps, what has grown meanwhile (Sun et
al. 2024, "Llumnix", sec. 4.2). If the target has no room by then, the request stays where it is. Where computing its
tokens again takes less time than the copy, only its tokens move.
"""

import heapq
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Final, Literal

from isthmus.cloud.generation.scheduling.engine import Engine, Overloaded
from isthmus.cloud.generation.scheduling.policy import Life
from isthmus.cloud.generation.scheduling.profile import GenerationProfile
from isthmus.cloud.generation.scheduling.replicas import MoveCosts, Standing, freest, moves
from isthmus.cloud.generation.scheduling.request import Request
from isthmus.cloud.generation.scheduling.simulate import TICK_S, End, Run
from isthmus.cloud.generation.scheduling.step import Drawn, Ended, Step, Token

LINK_BYTES_PER_S: Final = 2e9
"""Bytes of KV cache per second between two replicas; of one machine's memory, with room to spare."""
STAGE_TOKENS: Final = 16
"""Tokens that a move copies while its request stands still: those since its last full block."""


@dataclass(frozen=True)
class FleetRules:
    """How the engines work together. ``prefill``: how many of them, the first ones, only compute prompts.

    ``moves_every_s`` pairs replicas for live moves so often; None: never. ``drains``: (time, replica) pairs.
    """

    dispatch: Literal["freeness", "round-robin"] = "freeness"
    prefill: int = 0
    moves_every_s: float | None = None
    least_gap: float = 50.0
    """Blocks per row by which two replicas must differ before a request moves."""
    drains: Sequence[tuple[float, int]] = ()
    link_bytes_per_s: float = LINK_BYTES_PER_S


@dataclass
class FleetRun:
    """The result. ``run`` holds all requests; ``pauses_s`` how long each moved request stood still."""

    run: Run = field(default_factory=Run)
    pauses_s: list[float] = field(default_factory=list)
    aborted: int = 0
    """Moves that found no room at their target."""
    emptied_s: dict[int, float] = field(default_factory=dict)
    """When each drained replica had nothing left."""


class Fleet:
    """Serves ``requests`` with ``engines``. Call ``serve`` once."""

    def __init__(
        self,
        engines: Sequence[Engine],
        profile: GenerationProfile,
        requests: Sequence[Request],
        lengths: Sequence[int],
        rules: FleetRules,
    ) -> None:
        if not 0 <= rules.prefill < len(engines):
            raise ValueError(f"{rules.prefill} prefill replicas of {len(engines)}: at least one must decode")
        self._engines = engines
        self._profile = profile
        self._requests, self._lengths = requests, lengths
        self._rules = rules
        self._costs = MoveCosts.of(profile)
        self._found = FleetRun()
        self._steps: list[Step | None] = [None] * len(engines)
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._count = 0
        self._draining: set[int] = set()
        self._moving: set[int] = set()
        self._turn = 0
        self._homeless: list[Life] = []
        self._left = len(requests)
        self._waking: dict[int, float] = {}
        self._due: dict[int, list[tuple[Life, int]]] = {}
        """Moves that wait for the end of their source's step."""

    def serve(self) -> FleetRun:
        """Returns what happened to every request."""
        for request in self._requests:
            self._at(request.arrival_s, partial(self._arrive, request))
        for time_s, replica in self._rules.drains:
            self._at(time_s, partial(self._drain, replica))
        if self._rules.moves_every_s is not None:
            self._at(self._rules.moves_every_s, self._pair)
        now_s = 0.0
        while self._events and self._left:
            now_s, _, act = heapq.heappop(self._events)
            act(now_s)
        self._found.run.end_s = now_s
        return self._found

    def _at(self, time_s: float, act: Callable[[float], None]) -> None:
        self._count += 1
        heapq.heappush(self._events, (time_s, self._count, act))

    def _standings(self, replicas: range) -> list[Standing]:
        return [self._engines[at].standing(at, draining=at in self._draining) for at in replicas]

    @property
    def _first(self) -> range:
        """The replicas that get new requests."""
        return range(self._rules.prefill or len(self._engines))

    def _arrive(self, request: Request, now_s: float) -> None:
        if self._rules.dispatch == "round-robin":
            at = self._turn % len(self._first)
            self._turn += 1
        else:
            at = freest(self._standings(self._first)) or 0
        self._found.run.refused.append(request)
        self._left -= 1
        with suppress(Overloaded):
            self._engines[at].submit(request, now_s)
            self._found.run.refused.pop()
            self._left += 1
        self._go(at, now_s)

    def _go(self, at: int, now_s: float) -> None:
        """Lets a replica that rests take its next step."""
        if self._steps[at] is not None:
            return
        self._settle(now_s)
        decision = self._engines[at].next_step(now_s)
        self._note(decision.ended, now_s)
        if decision.step is None:
            if at in self._draining and not self._engines[at].under_way:
                self._found.emptied_s.setdefault(at, now_s)
            wait_s = decision.wait_until_s
            if wait_s is not None and self._waking.get(at, -1.0) < now_s:
                self._waking[at] = max(wait_s, now_s + TICK_S)
                self._at(self._waking[at], lambda now_s: self._go(at, now_s))
            return
        step = self._steps[at] = decision.step
        self._found.run.steps += 1
        self._found.run.rows += step.load.decode_rows
        took_s = self._profile.step_s(step.load) + step.swap_s
        self._found.run.busy_s += took_s
        self._at(now_s + took_s, lambda now_s: self._finish(at, now_s))

    def _finish(self, at: int, now_s: float) -> None:
        step, self._steps[at] = self._steps[at], None
        assert step is not None
        drawn = {}
        for row in step.rows:
            if row.draws:
                tokens = row.first + len(row.tokens) - len(row.request.prompt) + 1
                drawn[row.id] = Drawn(0, last=tokens >= self._lengths[row.id])
        events = self._engines[at].finished(step, drawn, now_s)
        self._note([event for event in events if isinstance(event, Ended)], now_s)
        if at < self._rules.prefill:
            for event in events:
                if isinstance(event, Token) and event.life.id in self._engines[at].lives:
                    life = self._engines[at].export(event.life.id, now_s)
                    self._at(now_s + self._copy_s(life.computed), partial(self._home, life))
        for life, target in self._due.pop(at, ()):
            self._commit(life, at, target, now_s)
        self._go(at, now_s)

    def _home(self, life: Life, now_s: float) -> None:
        """A request whose prompt is computed, and whose KV cache has arrived, waits for a replica that decodes."""
        self._homeless.append(life)
        for at in range(self._rules.prefill, len(self._engines)):
            self._go(at, now_s)

    def _settle(self, now_s: float) -> None:
        decoding = range(self._rules.prefill, len(self._engines))
        while self._homeless:
            fitting = [each for each in self._standings(decoding) if self._engines[each.id].fits(self._homeless[0])]
            at = freest(fitting)
            if at is None:
                return
            self._engines[at].adopt(self._homeless.pop(0), now_s)
            if self._steps[at] is None:
                self._at(now_s, partial(self._go, at))

    def _drain(self, replica: int, now_s: float) -> None:
        self._draining.add(replica)
        self._go(replica, now_s)

    def _pair(self, now_s: float) -> None:
        for source, target in moves(self._standings(range(len(self._engines))), least_gap=self._rules.least_gap):
            engine = self._engines[source]
            able = [life for life in engine.lives.values() if life.decodes and life.id not in self._moving]
            waiting = [life for life in engine.lives.values() if not life.holds and life.id not in self._moving]
            if source in self._draining and waiting:
                able = waiting  # nothing is copied for these
            if able:
                life = min(able, key=lambda life: (life.computed, life.id))
                self._moving.add(life.id)
                copied = life.computed if self._by_blocks(life) else 0
                self._at(now_s + self._copy_s(copied), partial(self._commit, life, source, target))
        self._at(now_s + (self._rules.moves_every_s or 1.0), self._pair)

    def _commit(self, life: Life, source: int, target: int, now_s: float) -> None:
        """Moves the request between two of its steps, or leaves it where it is."""
        step = self._steps[source]
        if step is not None and any(row.id == life.id for row in step.rows):
            self._due.setdefault(source, []).append((life, target))
            return
        self._moving.discard(life.id)
        if life.id not in self._engines[source].lives:
            return
        by_blocks = self._by_blocks(life)
        if target in self._draining or (by_blocks and not self._engines[target].fits(life)):
            self._found.aborted += 1
            return
        life = self._engines[source].export(life.id, now_s)
        if not by_blocks:
            life.recomputed += life.computed
            life.computed = 0
        pause_s = self._copy_s(min(life.computed, STAGE_TOKENS))
        self._found.pauses_s.append(pause_s)
        self._engines[target].adopt(life, now_s)
        self._at(now_s + pause_s, lambda now_s: self._go(target, now_s))
        self._at(now_s, lambda now_s: self._go(source, now_s))

    def _by_blocks(self, life: Life) -> bool:
        return self._costs.by_blocks(life.computed, self._rules.link_bytes_per_s)

    def _copy_s(self, tokens: int) -> float:
        return tokens * self._profile.kv_bytes_per_token / self._rules.link_bytes_per_s

    def _note(self, ended: Sequence[Ended], now_s: float) -> None:
        self._found.run.ends += [End(each.life, each.outcome, each.in_time, now_s) for each in ended]
        self._left -= len(ended)
