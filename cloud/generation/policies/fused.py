"""PURE: continuous batching with chunked prompts: decodes first, then prompt chunks up to a budget of tokens, fused.

One product of matrices serves decodes and prompt chunks of a step (Agrawal et al. 2024, "Sarathi-Serve"). The order in
which requests are served is a separate choice (``orders.py``), so first come first served, shortest first and fair
order are this policy with another order.
"""

from typing import Final

from isthmus.cloud.generation.policies.orders import FirstCome, Order
from isthmus.cloud.generation.scheduling.policy import Budget, Choice, Life, State
from isthmus.cloud.generation.scheduling.profile import GenerationProfile

CHUNK_TOKENS: Final = 128
"""Tokens of a step, decodes included, up to which prompts are added."""
PATIENCE_S: Final = 10.0
"""Requests that fit may pass one that does not for this long; then they wait behind it."""
_LEAST_CHUNK: Final = 16
"""Prompt tokens of a step, however many requests decode."""
_HEADROOM: Final = 0.01
"""Share of the blocks that no newcomer may take, so that requests that decode can grow."""


class Fused:
    """Runs every request that decodes, and fills the step with prompt chunks in the order of ``order``.

    If the KV cache is full, the last to arrive is preempted: it keeps its rank, and computes its tokens again when
    there is room. So the first to arrive always goes on, whatever the order. With ``preempts``, a waiting request that
    is before a running one in the order takes its place, if every row is in use or the KV cache is full.
    """

    def __init__(self, order: Order | None = None, *, chunk_tokens: int = CHUNK_TOKENS, preempts: bool = False) -> None:
        if chunk_tokens < 1:
            raise ValueError(f"chunks of {chunk_tokens} tokens: must be at least 1")
        self._order = order or FirstCome()
        self._chunk_tokens = chunk_tokens
        self._preempts = preempts
        self._passed_since_s: dict[int, float] = {}

    def use(self, profile: GenerationProfile) -> None:
        self._order.use(profile)

    def arrived(self, life: Life) -> None:
        self._order.arrived(life)

    def left(self, life: Life) -> None:
        self._passed_since_s.pop(life.id, None)
        self._order.left(life)

    def choose(self, now_s: float, state: State) -> Choice:
        self._order.look(now_s, state)
        holders = [state.lives[id] for id in state.blocks if id in state.lives]
        holders.sort(key=lambda life: (life.request.arrival_s, life.request.id))
        waiting = self._order.line(state)
        preempted = self._displaced(holders, waiting, state) if self._preempts else []
        run = self._fill(now_s, state, holders, waiting, preempted)
        while not run and len(preempted) < len(holders):
            # Prompts that were begun fit no more beside each other: the last to arrive makes room.
            preempted.append(next(life.id for life in reversed(holders) if life.id not in preempted))
            run = self._fill(now_s, state, holders, waiting, preempted)
        return Choice(run=run, preempt=preempted)

    def _fill(
        self, now_s: float, state: State, holders: list[Life], waiting: list[Life], preempted: list[int]
    ) -> list[tuple[int, int]]:
        """Returns the rows of a step without ``preempted``, to which it adds those that must make room."""
        budget = Budget(state, preempted)
        staying = [life for life in holders if life.id not in preempted]
        decoding = [life for life in staying if life.decodes]
        while sum(budget.blocks_for(life, 1) for life in decoding) > budget.free_blocks and len(staying) > 1:
            last = staying.pop()
            preempted.append(last.id)
            decoding = [life for life in decoding if life is not last]
            budget = Budget(state, preempted)
        run = [(life.id, 1) for life in decoding if budget.take(life, 1)]
        room = max(self._chunk_tokens - len(run), _LEAST_CHUNK)
        unfinished = int(_HEADROOM * state.limits.blocks) if staying else 0
        for life in sorted((life for life in staying if not life.decodes), key=self._order.rank):
            count = self._chunk(budget, life, min(room, life.pending))
            if count:
                run.append((life.id, count))
                room -= count
            unfinished += budget.blocks_for(life, life.pending) - budget.blocks_for(life, count)
        company = list(staying)
        for life in waiting:
            if room < 1 or budget.free_rows < 1:
                break
            if not self._admits(life, company, now_s):
                continue
            blocks = budget.blocks_for(life, life.pending)
            if blocks + unfinished > budget.free_blocks:
                since_s = self._passed_since_s.setdefault(life.id, now_s)
                if now_s - since_s > PATIENCE_S:
                    break
                continue
            count = self._chunk(budget, life, min(room, life.pending))
            if count:
                self._passed_since_s.pop(life.id, None)
                run.append((life.id, count))
                room -= count
                unfinished += blocks - budget.blocks_for(life, count)
                self._order.admitted(life)
                company.append(life)
        return run

    def _admits(self, life: Life, company: list[Life], now_s: float) -> bool:
        """Whether a waiting request may join those in the KV cache, ``company``, as far as time is concerned."""
        return True

    def _chunk(self, budget: Budget, life: Life, count: int) -> int:
        """Takes room for up to ``count`` tokens, and returns how many."""
        count = min(count, budget.tokens)
        return count if count > 0 and budget.take(life, count) else 0

    def _displaced(self, holders: list[Life], waiting: list[Life], state: State) -> list[int]:
        """Returns the running request, last in the order, whose place a waiting one takes. At most one per step."""
        if not holders or not waiting:
            return []
        first, last = waiting[0], max(holders, key=self._order.rank)
        needed = -(-first.pending // state.limits.block_tokens)
        full = len(holders) >= state.limits.rows or needed > state.free_blocks
        before = self._order.rank(first) < self._order.rank(last)
        return [last.id] if full and before and self._order.may_displace(first, last) else []
