"""PURE: the interface between the engine and a policy. The policies themselves are in ``policies/``.

Before each step the engine asks the policy which requests take part, and with how many tokens each.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from isthmus.cloud.generation.scheduling.profile import GenerationProfile
from isthmus.cloud.generation.scheduling.request import Request


@dataclass(slots=True, eq=False)
class Life:
    """One request under way. The engine changes it; policies only read it.

    ``known`` tokens (prompt and answer so far) exist, and the KV cache holds ``computed`` of them. A step that computes
    the last known token draws the next one.
    """

    request: Request
    tokens: list[int] = field(default_factory=list)
    """The answer so far."""
    computed: int = 0
    begun_s: float | None = None
    """When it first took part in a step."""
    first_token_s: float | None = None
    last_token_s: float | None = None
    largest_gap_s: float = 0.0
    preempted: int = 0
    swapped: int = 0
    """How often it was preempted and kept its computed tokens, in the pool beside the KV cache."""
    recomputed: int = 0
    """Tokens that were computed more than once."""
    shared: int = 0
    """Tokens that it did not compute, because another request that begins alike had."""
    moved: int = 0
    """How often it went on in another replica."""
    whole: bool = False
    """Whether its answer is complete. Only then its length teaches anything."""

    @property
    def id(self) -> int:
        return self.request.id

    @property
    def known(self) -> int:
        return len(self.request.prompt) + len(self.tokens)

    def known_tokens(self, first: int, count: int) -> Sequence[int]:
        """Returns ``count`` known tokens from ``first`` on."""
        prompt = self.request.prompt
        if first + count <= len(prompt):
            return prompt[first : first + count]
        if first >= len(prompt):
            return self.tokens[first - len(prompt) : first - len(prompt) + count]
        return [*prompt[first:], *self.tokens[: first + count - len(prompt)]]

    @property
    def pending(self) -> int:
        """Tokens that are known and not computed. It is never 0 before the end."""
        return len(self.request.prompt) + len(self.tokens) - self.computed

    @property
    def holds(self) -> bool:
        """Whether it has tokens in the KV cache."""
        return self.computed > 0

    @property
    def decodes(self) -> bool:
        """Whether its next step computes one token and draws another."""
        return self.computed > 0 and self.pending == 1

    @property
    def left(self) -> int:
        """The largest number of tokens that may still be drawn."""
        return self.request.max_tokens - len(self.tokens)


@dataclass(frozen=True, slots=True)
class Limits:
    """What one step and the KV cache can hold. The engine checks every choice against them."""

    rows: int = 32
    """Requests that may have tokens in the KV cache."""
    blocks: int = 1_000
    block_tokens: int = 16
    step_tokens: int = 2_048
    """Tokens of one step, over all its requests."""
    swap_blocks: int = 0
    """Blocks of the pool beside the KV cache, for preempted requests. 0: they compute their tokens again."""
    prefix_blocks: int = 0
    """Blocks without an owner that may keep beginnings of prompts for later requests. 0: nothing is shared."""

    @property
    def kv_tokens(self) -> int:
        return self.blocks * self.block_tokens

    def __post_init__(self) -> None:
        if min(self.rows, self.blocks, self.block_tokens, self.step_tokens) < 1:
            raise ValueError("rows, blocks, block_tokens and step_tokens must be at least 1")
        if min(self.swap_blocks, self.prefix_blocks) < 0:
            raise ValueError("swap_blocks and prefix_blocks must not be negative")


@dataclass(frozen=True, slots=True)
class State:
    """What a policy sees. ``lives`` holds all requests under way, in the order of their arrival.

    ``blocks`` maps a request to the number of its blocks; ``free_blocks`` are nobody's.
    """

    lives: Mapping[int, Life]
    limits: Limits
    blocks: Mapping[int, int]
    free_blocks: int


@dataclass(frozen=True, slots=True)
class Choice:
    """A policy's decision.

    ``run``: (id, number of tokens) of the requests of the next step; a number of tokens is at most the request's
    pending ones. ``preempt``: requests that lose their part of the KV cache and compute it again later. ``give_up``:
    requests that end now. ``dead_rows``: rows of a static batch whose answer is complete, and which are computed still.
    ``padded``: whether the step pads its rows to the longest. If nothing runs, the engine asks again at
    ``wait_until_s``, or when something has changed.
    """

    run: Sequence[tuple[int, int]] = ()
    preempt: Sequence[int] = ()
    give_up: Sequence[int] = ()
    dead_rows: int = 0
    padded: bool = False
    wait_until_s: float | None = None


class Policy(Protocol):
    """Decides which requests take part in the next step.

    The engine calls ``arrived`` and ``left`` once per request. A policy may keep views of its own; what it decides
    follows from these calls and from ``choose``'s arguments alone.
    """

    def use(self, profile: GenerationProfile) -> None:
        """Plans with ``profile`` from now on."""

    def arrived(self, life: Life) -> None: ...

    def left(self, life: Life) -> None:
        """Called when the request has ended, whatever its outcome, or has moved to another replica."""

    def choose(self, now_s: float, state: State) -> Choice:
        """Returns what to run at ``now_s``."""


class Budget:
    """What is left of a step and of the KV cache while a policy fills a step."""

    def __init__(self, state: State, preempted: Iterable[int] = ()) -> None:
        self._state = state
        gone = set(preempted)
        self.free_blocks = state.free_blocks + sum(state.blocks.get(id, 0) for id in gone)
        self.free_rows = state.limits.rows - sum(id not in gone for id in state.blocks)
        self.tokens = state.limits.step_tokens
        self._gone = gone

    def blocks_for(self, life: Life, tokens: int) -> int:
        """Returns the further blocks that the request needs to compute so many tokens."""
        computed = 0 if life.id in self._gone else life.computed
        held = 0 if life.id in self._gone else self._state.blocks.get(life.id, 0)
        return max(0, -(-(computed + tokens) // self._state.limits.block_tokens) - held)

    def take(self, life: Life, tokens: int) -> bool:
        """Takes room for the request's next ``tokens`` tokens. Returns False, and takes nothing, if there is none."""
        blocks = self.blocks_for(life, tokens)
        newcomer = life.id in self._gone or life.id not in self._state.blocks
        if tokens > self.tokens or blocks > self.free_blocks or (newcomer and self.free_rows < 1):
            return False
        self.tokens -= tokens
        self.free_blocks -= blocks
        self.free_rows -= newcomer
        return True
