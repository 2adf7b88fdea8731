"""PURE: policies that others are compared with: static batches, Orca's continuous batches, and BATON's padded rows."""

from collections.abc import Sequence
from typing import Final

from isthmus.cloud.generation.policies.unmoved import Unmoved
from isthmus.cloud.generation.scheduling.policy import Budget, Choice, Life, State

HEADROOM_TOKENS: Final = 64
"""BATON admits a newcomer only if so many further tokens of each row would still fit."""


class _ByArrival(Unmoved):
    """What the policies here share: they rank by arrival, and what they decide follows from the state alone."""

    @staticmethod
    def split(state: State) -> tuple[list[Life], list[Life]]:
        """Returns the requests in the KV cache and the waiting ones, each by arrival."""
        holders = [life for id, life in state.lives.items() if id in state.blocks]
        return holders, [life for id, life in state.lives.items() if id not in state.blocks]


def batch_step(members: Sequence[Life], size: int, state: State, preempt: Sequence[int] = ()) -> Choice:
    """Returns the next step of a static batch: prompts until all are computed, then all rows together.

    ``size``: the rows that the batch began with. Those whose answer is complete are computed to the end.
    """
    prefilling = [life for life in members if not life.decodes]
    budget = Budget(state, preempt)
    run = []
    for life in prefilling or members:
        count = min(life.pending, budget.tokens)
        if count and budget.take(life, count):
            run.append((life.id, count))
    dead = 0 if prefilling else size - len(members)
    return Choice(run=run, preempt=preempt, dead_rows=dead, padded=True)


class Static(_ByArrival):
    """First come; a batch runs until its longest answer is complete, and nobody joins it meanwhile.

    Prompts are padded to the longest, and rows whose answer is complete are computed to the end. The batch is so small
    that the longest prompts and answers that its requests may have would fit at once.
    """

    def __init__(self) -> None:
        self._batch: set[int] = set()
        self._size = 0

    def left(self, life: Life) -> None:
        self._batch.discard(life.id)

    def choose(self, now_s: float, state: State) -> Choice:
        if not self._batch:
            self._batch = set(self._next(state))
            self._size = len(self._batch)
        members = [state.lives[id] for id in state.lives if id in self._batch]
        return batch_step(members, self._size, state)

    def _next(self, state: State) -> list[int]:
        batch: list[int] = []
        prompt = answer = 0
        for id, life in state.lives.items():
            prompt = max(prompt, len(life.request.prompt))
            answer = max(answer, life.request.max_tokens)
            blocks = -(-(prompt + answer) // state.limits.block_tokens)
            if batch and (len(batch) >= state.limits.rows or (len(batch) + 1) * blocks > state.limits.blocks):
                break
            batch.append(id)
        return batch


class Orca(_ByArrival):
    """Continuous batches, first come: whole prompts run as soon as they fit, before any decode (Yu et al. 2022).

    If the KV cache is full, the last to arrive is preempted.
    """

    padded = False

    def choose(self, now_s: float, state: State) -> Choice:
        holders, waiting = self.split(state)
        run = self._prompts(state, holders, waiting)
        return Choice(run=run) if run else self._decodes(state, holders)

    def _decodes(self, state: State, holders: list[Life]) -> Choice:
        preempted: list[int] = []
        staying = list(holders)
        while True:
            budget = Budget(state, preempted)
            decoding = [life for life in staying if life.decodes]
            fits = sum(budget.blocks_for(life, 1) for life in decoding) <= budget.free_blocks
            if (fits and decoding) or len(staying) < 2:
                break
            # Either what decodes cannot grow, or prompts that were begun fit no more beside each other.
            preempted.append(staying.pop().id)
        run = [(life.id, 1) for life in decoding if budget.take(life, 1)]
        if not run:
            run = [(life.id, count) for life in staying if (count := _prompt(budget, life))]
        return Choice(run=run, preempt=preempted, padded=self.padded)

    def _prompts(self, state: State, holders: list[Life], waiting: list[Life]) -> list[tuple[int, int]]:
        budget = Budget(state)
        run = [(life.id, count) for life in holders if not life.decodes and (count := _prompt(budget, life))]
        for life in waiting:
            if budget.blocks_for(life, life.known + 1) > budget.free_blocks or not (count := _prompt(budget, life)):
                break
            run.append((life.id, count))
        return run


class Baton(Orca):
    """One newcomer per step joins rows that are padded to a common length (BATON, arXiv 2410.18701).

    It is admitted if all rows at the length of the longest, with headroom, fit into the KV cache.
    """

    padded = True

    def choose(self, now_s: float, state: State) -> Choice:
        holders, waiting = self.split(state)
        choice = self._decodes(state, holders)
        budget = Budget(state, choice.preempt)
        run = [(id, count) for id, count in choice.run if budget.take(state.lives[id], count)]
        unfinished = [life for life in holders if not life.decodes and life.id not in choice.preempt]
        newcomers = unfinished or ([] if choice.preempt else waiting)
        for life in newcomers[:1]:
            alone = not holders or life in unfinished
            if life.id in dict(run) or not (alone or self._fits(state, holders, life)):
                continue
            if budget.blocks_for(life, life.known + 1) <= budget.free_blocks and (count := _prompt(budget, life)):
                run.append((life.id, count))
        return Choice(run=run, preempt=choice.preempt, padded=True)

    @staticmethod
    def _fits(state: State, holders: list[Life], newcomer: Life) -> bool:
        longest = max(life.known for life in [*holders, newcomer]) + HEADROOM_TOKENS
        return (len(holders) + 1) * longest <= state.limits.kv_tokens


def _prompt(budget: Budget, life: Life) -> int:
    """Takes room for as much of a prompt as the step holds, and returns how many tokens that are."""
    count = min(life.pending, budget.tokens)
    return count if count > 0 and budget.take(life, count) else 0
