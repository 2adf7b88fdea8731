"""PURE: static batches of requests whose answers are predicted to be alike (Magnus, arXiv 2406.04785).

A static batch computes padding: columns before short prompts, and rows whose answer is complete. The waste of request p
in batch B is its wasted memory accesses, with L prompt lengths, G predicted lengths, and the batch's maxima in L(B) and
G(B):

    WMA(p, B) = G(p) (L(B) - L(p)) + sum over g from G(p) to G(B) - 1 of (g + L(B))

Where we differ: waste is bounded as a share of the accesses that a request as long as the batch's maxima makes itself,
G(B) (L(B) + G(B) / 2), since the same number of accesses is much for a short answer and little for a long one. Serving
times come from the profile, not from nearest neighbours among earlier batches; and a batch that outgrows the KV cache
preempts its second half, which becomes a batch of its own.
"""

from dataclasses import dataclass, field
from typing import Final

from isthmus.cloud.generation.policies.batches import batch_step
from isthmus.cloud.generation.policies.lengths import LengthPredictor
from isthmus.cloud.generation.policies.orders import pressure
from isthmus.cloud.generation.scheduling.policy import Choice, Life, State
from isthmus.cloud.generation.scheduling.profile import GenerationProfile, Load, reference_profile

MOST_WASTE: Final = 0.7
"""A request joins a batch only if the largest waste in it stays below this (phi in the paper), as a share of the
accesses of its longest request."""


@dataclass
class _Batch:
    """Requests that will run together. A closed one takes no newcomers: it was split when memory ran out."""

    members: list[Life] = field(default_factory=list)
    predicted: dict[int, float] = field(default_factory=dict)
    closed: bool = False

    def size(self) -> tuple[int, float]:
        """Returns the longest prompt and the longest predicted answer."""
        return max(len(life.request.prompt) for life in self.members), max(self.predicted.values())


class Magnus:
    """Queues requests in batches of least waste; the batch with the largest wait over its time is next (HRRN)."""

    def __init__(self, lengths: LengthPredictor, *, most_waste: float = MOST_WASTE) -> None:
        self._lengths = lengths
        self._most_waste = most_waste
        self._profile = reference_profile()
        self._queue: list[_Batch] = []
        self._new: list[Life] = []
        self._running: dict[int, Life] = {}
        self._size = 0
        self.splits = 0
        """Batches that outgrew the KV cache."""

    def use(self, profile: GenerationProfile) -> None:
        self._profile = profile

    def arrived(self, life: Life) -> None:
        self._new.append(life)

    def left(self, life: Life) -> None:
        if life.whole:
            self._lengths.learn(life)
        self._running.pop(life.id, None)
        self._new = [each for each in self._new if each is not life]
        for batch in self._queue:
            batch.members = [each for each in batch.members if each is not life]
            batch.predicted.pop(life.id, None)
        self._queue = [batch for batch in self._queue if batch.members]

    def choose(self, now_s: float, state: State) -> Choice:
        self._lengths.look(pressure(state))
        for life in self._new:
            self._place(life, state)
        self._new = []
        if not self._running and self._queue:
            batch = max(self._queue, key=lambda each: self._urgency(each, now_s))
            self._queue.remove(batch)
            self._running = {life.id: life for life in batch.members}
            self._size = len(batch.members)
        members = list(self._running.values())
        preempted = self._split(members, state)
        members = list(self._running.values())
        return batch_step(members, self._size, state, preempted)

    def _place(self, life: Life, state: State) -> None:
        predicted = self._lengths.predict(life)
        best: tuple[float, _Batch] | None = None
        for batch in self._queue:
            if batch.closed or len(batch.members) >= state.limits.rows:
                continue
            prompt, answer = batch.size()
            longest = max(prompt, len(life.request.prompt)) + max(answer, predicted)
            if (len(batch.members) + 1) * longest > state.limits.kv_tokens:
                continue
            waste = self._waste(batch, life, predicted)
            if waste < self._most_waste and (best is None or waste < best[0]):
                best = (waste, batch)
        if best is None:
            self._queue.append(_Batch([life], {life.id: predicted}))
        else:
            best[1].members.append(life)
            best[1].predicted[life.id] = predicted

    def _waste(self, batch: _Batch, life: Life, predicted: float) -> float:
        """Returns the largest waste of a request of the batch with ``life`` in it, by the longest one's accesses."""
        lengths = [(len(each.request.prompt), batch.predicted[each.id]) for each in batch.members]
        lengths.append((len(life.request.prompt), predicted))
        prompt, answer = (max(each[at] for each in lengths) for at in (0, 1))
        most = max(
            own_answer * (prompt - own_prompt) + (answer - own_answer) * ((own_answer + answer - 1) / 2 + prompt)
            for own_prompt, own_answer in lengths
        )
        return most / (answer * (prompt + answer / 2))

    def _urgency(self, batch: _Batch, now_s: float) -> float:
        rows = len(batch.members)
        prompt, answer = batch.size()
        step_s = self._profile.step_s(Load(rows, int(rows * (prompt + answer / 2))))
        prompts_s = self._profile.step_s(Load(prompt_tokens=rows * prompt, pairs=rows * prompt * (prompt + 1) // 2))
        waited_s = now_s - min(life.request.arrival_s for life in batch.members)
        return waited_s / (prompts_s + answer * step_s)

    def _split(self, members: list[Life], state: State) -> list[int]:
        """Preempts the second half of the running batch if its padded rows outgrow the KV cache."""
        preempted: list[int] = []
        while len(members) > 1:
            longest = max(life.known for life in members) + 1
            if len(members) * longest <= state.limits.kv_tokens and len(members) <= state.limits.rows:
                break
            half = members[len(members) // 2 :]
            members = members[: len(members) // 2]
            self.splits += 1
            predicted = {life.id: self._lengths.predict(life) for life in half}
            self._queue.append(_Batch(half, predicted, closed=True))
            preempted += [life.id for life in half if life.id in state.blocks]
            self._running = {life.id: life for life in members}
            self._size = len(members)
        return preempted
