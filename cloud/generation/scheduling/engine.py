"""PURE: takes every request from submission to its one outcome, one step of the model at a time. Time is an argument.

    submit -> waiting --next_step--> in the KV cache --finished--> ... -> outcome
                 ^                        |                                  ^
                 +------- preempted ------+        failed, cancelled, given up

The same engine serves live (real clock, real model) and in the simulator (virtual clock, the profile as model). It owns
the table of blocks and checks every choice of the policy. It is not thread-safe: one thread owns it.
"""

import heapq
from collections import Counter
from collections.abc import Mapping
from typing import Final

from isthmus.cloud.elastic.scheduling.pace import LEAST_SIZE, Paces
from isthmus.cloud.generation.scheduling.blocks import BlockTable, Shared
from isthmus.cloud.generation.scheduling.policy import Choice, Life, Limits, Policy, State
from isthmus.cloud.generation.scheduling.profile import GenerationProfile, Load
from isthmus.cloud.generation.scheduling.replicas import Standing
from isthmus.cloud.generation.scheduling.request import Outcome, Request
from isthmus.cloud.generation.scheduling.step import Decision, Drawn, Ended, Step, StepRow, Token
from isthmus.proto.errors import Busy, InvalidInput

MAX_WAITING: Final = 1_024
SWAP_BYTES_PER_S: Final = 1e9
"""Bytes of KV cache per second to the pool beside it, and back, unless another rate is given."""


class Overloaded(Busy):
    """The maximum number of requests is under way, so this one was not accepted."""


class Engine:
    """Runs a policy over the requests under way.

    With ``expires``, requests that have no token yet and can no longer be in time are evicted. With ``adapts``, plans
    follow the time that steps really take. If the clock goes back, the engine's time stays where it was.

    >>> engine = Engine(reference_profile(), make_policy("fused"))
    >>> engine.submit(Request(0, range(5), max_tokens=3, arrival_s=0.0), 0.0)
    >>> step = engine.next_step(0.0).step
    >>> [type(event).__name__ for event in engine.finished(step, {0: Drawn(7, last=True)}, 0.1)]
    ['Token', 'Ended']
    """

    def __init__(
        self,
        profile: GenerationProfile,
        policy: Policy,
        limits: Limits | None = None,
        *,
        max_requests: int = MAX_WAITING,
        expires: bool = True,
        adapts: bool = True,
        swap_bytes_per_s: float = SWAP_BYTES_PER_S,
    ) -> None:
        if max_requests < 1:
            raise ValueError(f"{max_requests} requests: must be at least 1")
        self.limits = limits or Limits()
        self.policy = policy
        self.outcomes: Counter[Outcome] = Counter()
        self._max_requests = max_requests
        self._table = BlockTable(self.limits.blocks, self.limits.block_tokens, kept=self.limits.prefix_blocks)
        self._shared: dict[int, Shared] = {}
        """What requests found computed, until the step before which it is copied."""
        self.shared_tokens = 0
        """Tokens that were not computed since the start, because another request had computed them."""
        self._lives: dict[int, Life] = {}
        self._blocks: dict[int, int] = {}
        self._deadlines: list[tuple[float, int]] = []
        self._running: Step | None = None
        self._left_in_step: set[int] = set()
        self._drop: list[int] = []
        self._swapped: dict[int, int] = {}
        """Blocks of each request in the pool."""
        self._swap_out: list[int] = []
        self._swap_bytes_per_s = swap_bytes_per_s
        self._steps = 0
        self._now_s = float("-inf")
        self._expires, self._adapts = expires, adapts
        self._paces = Paces([0])  # one executor
        self.use(profile)

    def use(self, profile: GenerationProfile) -> None:
        """Plans with ``profile`` from now on."""
        self.profile = profile
        self.planned = profile if self.pace == 1 else profile.slowed(self.pace)
        self.policy.use(self.planned)

    @property
    def pace(self) -> float:
        """The planned time of a step, as a multiple of the profile's time."""
        return self._paces.factor(0)

    @property
    def under_way(self) -> int:
        """The number of requests without an outcome."""
        return len(self._lives)

    @property
    def waiting(self) -> int:
        """The number of requests under way that have no blocks of the KV cache."""
        return len(self._lives) - sum(id in self._lives for id in self._blocks)

    @property
    def free_blocks(self) -> int:
        return self._table.free

    @property
    def kept_blocks(self) -> int:
        """Free blocks that hold the beginning of a prompt."""
        return self._table.kept

    def blocks_of(self, id: int) -> tuple[int, ...]:
        """Returns the blocks that a request has, also while its last step still runs."""
        return self._table.owned(id)

    def submit(self, request: Request, now_s: float) -> None:
        """Accepts the request.

        Raises Overloaded if too many are under way, and InvalidInput for one that could never fit into the KV cache or
        whose id is in use. A request that was not accepted has no outcome.
        """
        self._at(now_s)
        if request.id in self._lives or request.id in self._left_in_step:
            raise InvalidInput(f"request {request.id} was submitted already")
        if not request.prompt or request.max_tokens < 1:
            raise InvalidInput("a request needs a prompt, and at least one token to draw")
        if request.most_tokens > self.limits.kv_tokens:
            raise InvalidInput(
                f"prompt and max_tokens are {request.most_tokens} tokens together, and the KV cache of this server "
                f"holds {self.limits.kv_tokens}"
            )
        if len(self._lives) >= self._max_requests:
            raise Overloaded(f"{self._max_requests} requests are under way already; try again later")
        life = self._lives[request.id] = Life(request)
        if self._expires and (request.deadline_s is not None or request.ttft_s is not None):
            heapq.heappush(self._deadlines, (self._hopeless_s(request), request.id))
        self.policy.arrived(life)

    def cancel(self, id: int, now_s: float) -> Ended | None:
        """Ends a request whose caller left, and returns its end; None if it has ended already.

        Its blocks are free at once, or when the step that it takes part in has ended.
        """
        self._at(now_s)
        life = self._lives.get(id)
        return None if life is None else self._end(life, Outcome.CANCELLED, now_s)

    def export(self, id: int, now_s: float) -> Life:
        """Takes a request out without an outcome: it goes on in another engine, which must ``adopt`` it.

        Its blocks here are free at once. Raises KeyError for an unknown request, and ValueError while a step runs that
        it takes part in.
        """
        self._at(now_s)
        life = self._lives[id]
        if self._running is not None and any(row.id == id for row in self._running.rows):
            raise ValueError(f"request {id} takes part in the running step")
        del self._lives[id]
        self.policy.left(life)
        if id in self._swapped or id in self._shared:  # not in the cache here, so it is computed again there
            life.computed = 0
        self._free(id)
        return life

    def fits(self, life: Life) -> bool:
        """Whether a request of another engine could go on here now, with all tokens that it has."""
        missing = self._table.needed(life.computed + 1)
        return missing <= self._table.free and len(self._blocks) < self.limits.rows and life.id not in self._lives

    def adopt(self, life: Life, now_s: float) -> tuple[int, ...]:
        """Goes on with a request that another engine exported, and returns its blocks here.

        Its computed tokens must be in this engine's KV cache before the next step. Without computed tokens it waits as
        any other. Raises ValueError if it does not fit.
        """
        now_s = self._at(now_s)
        fits = self.fits(life) if life.computed else life.request.most_tokens <= self.limits.kv_tokens
        known = life.id in self._left_in_step or life.id in self._lives
        if not fits or known or len(self._lives) >= self._max_requests:
            raise ValueError(f"request {life.id} does not fit here")
        self._lives[life.id] = life
        life.moved += 1
        blocks = self._table.grow(life.id, life.computed) if life.computed else ()
        if blocks:
            self._blocks[life.id] = len(blocks)
        self.policy.arrived(life)
        return blocks

    @property
    def lives(self) -> Mapping[int, Life]:
        """The requests under way, by id, in the order of their arrival here."""
        return self._lives

    def standing(self, id: int, *, draining: bool = False) -> Standing:
        """Returns what a dispatcher knows of this engine, as replica ``id``.

        Waiting requests that have room count as if they had begun, since many may arrive during one step. The first
        that has none is the head of the queue.
        """
        used, rows, head = self.limits.blocks - self._table.free, len(self._blocks), 0
        for life in self._lives.values():
            if life.id in self._blocks:
                continue
            needed = self._table.needed(life.known)
            if used + needed > self.limits.blocks or rows >= self.limits.rows:
                head = needed
                break
            used, rows = used + needed, rows + 1
        return Standing(id, self.limits.blocks, used, rows, head, draining)

    def expire(self, now_s: float) -> tuple[Ended, ...]:
        """Evicts and returns the requests without a token that would be late even if they ran now, alone."""
        now_s = self._at(now_s)
        if self._paces.forget(now_s, () if self._running is None else (0,)):
            self.use(self.profile)
        expired = []
        while self._deadlines and self._deadlines[0][0] < now_s:
            _, id = heapq.heappop(self._deadlines)
            life = self._lives.get(id)
            if life is None or life.tokens:
                continue
            latest_s = self._hopeless_s(life.request)
            if latest_s < now_s:
                expired.append(self._end(life, Outcome.EVICTED, now_s))
            else:  # the machine has become faster since
                heapq.heappush(self._deadlines, (latest_s, id))
        return tuple(expired)

    def next_step(self, now_s: float) -> Decision:
        """Returns what to run now. The caller must report every step once, with ``finished`` or ``failed``.

        Raises ValueError if the policy chooses unknown requests, or more than the step or the KV cache can hold.
        """
        now_s = self._at(now_s)
        ended = list(self.expire(now_s))
        if self._running is not None:
            return Decision(None, tuple(ended), self.dropped(), None)
        choice = self._choice(now_s)
        for id in choice.give_up:
            life = self._lives[id]
            ended.append(self._end(life, Outcome.CUT if life.tokens else Outcome.EVICTED, now_s))
        running = {id for id, _ in choice.run}
        for id in choice.preempt:
            self._preempt(self._lives[id], may_swap=id not in running)
        if not choice.run:
            wait_s = [each for each in (choice.wait_until_s, self._next_deadline_s()) if each is not None]
            return Decision(None, tuple(ended), self.dropped(), min(wait_s, default=None))
        step = self._step(choice, now_s)
        return Decision(step, tuple(ended), self.dropped(), None)

    def finished(self, step: Step, drawn: Mapping[int, Drawn], now_s: float) -> list[Token | Ended]:
        """Notes that a step has run, and returns the new tokens and the requests that ended, in the step's order.

        ``drawn`` holds a token for each row that draws one and whose request was not cancelled meanwhile; further ones
        are ignored. Raises KeyError for a step that has already ended, or a token that is missing.
        """
        now_s = self._at(now_s)
        self._stop(step)
        expected_s = self.profile.step_s(step.load) + step.swap_s
        if self._adapts and self._paces.ran(0, LEAST_SIZE, expected_s, now_s - step.started_s, now_s):
            self.use(self.profile)
        events: list[Token | Ended] = []
        for row in step.rows:
            life = self._lives.get(row.id)
            if life is None:
                continue
            life.computed = row.first + len(row.tokens)
            self._make_known(life, row.first)
            if not row.draws:
                continue
            new = drawn[row.id]
            life.tokens.append(new.token)
            self._note_time(life, now_s)
            events.append(Token(life, len(life.tokens) - 1, new.token))
            if new.last or life.left == 0:
                life.whole = True
                events.append(self._end(life, Outcome.FINISHED, now_s))
        return events

    def failed(self, step: Step, now_s: float) -> list[Ended]:
        """Notes that a step failed, and with it all its requests. Raises KeyError for a step that has ended."""
        now_s = self._at(now_s)
        self._stop(step)
        lives = [self._lives[row.id] for row in step.rows if row.id in self._lives]
        failed = {life.id for life in lives}
        for id, _ in step.shared:  # what others should have copied may not be there
            if id in self._blocks and id not in failed:
                self._lives[id].computed = 0
                self._free(id)
        return [self._end(life, Outcome.FAILED, now_s) for life in lives]

    def _choice(self, now_s: float) -> Choice:
        """Asks the policy. If newcomers find their beginnings computed, it is asked again with them in the KV cache."""
        while True:
            choice = self.policy.choose(now_s, State(self._lives, self.limits, self._blocks, self._table.free))
            self._check_ids(choice)
            if not self.limits.prefix_blocks or not [id for id, _ in choice.run if self._share(id)]:
                return choice

    def _share(self, id: int) -> bool:
        """Gives a request that begins what others have computed. The last known token is left, to draw from."""
        life = self._lives[id]
        if id in self._blocks or life.computed or len(self._blocks) >= self.limits.rows:
            return False
        shared = self._table.share(id, life.request.salt, life.known_tokens(0, life.known - 1))
        if shared is None:
            return False
        self._blocks[id] = len(self._table.owned(id))
        self._shared[id] = shared
        life.computed = shared.tokens
        life.shared += shared.tokens
        life.recomputed = max(0, life.recomputed - shared.tokens)
        self.shared_tokens += shared.tokens
        return True

    def _make_known(self, life: Life, first: int) -> None:
        """Makes blocks that were filled since ``first`` known to requests that begin alike."""
        size = self.limits.block_tokens
        if self.limits.prefix_blocks and life.computed // size > first // size:
            self._table.know(life.id, life.request.salt, life.known_tokens(0, life.computed))

    def _step(self, choice: Choice, now_s: float) -> Step:
        needed = sum(self._table.missing(id, self._lives[id].computed + count) for id, count in choice.run)
        tokens = sum(count for _, count in choice.run)
        holders = self._blocks.keys() | {id for id, _ in choice.run}
        if tokens > self.limits.step_tokens or needed > self._table.free or len(holders) > self.limits.rows:
            raise ValueError(
                f"the policy chose {tokens} tokens of {len(choice.run)} requests, which need {needed} further blocks "
                f"and {len(holders)} rows; there are {self._table.free} and {self.limits.rows}"
            )
        rows, swap_in, swap_s = [], [], 0.0
        for id, count in choice.run:
            life = self._lives[id]
            if self._swapped.pop(id, None) is not None:
                swap_in.append(id)
                swap_s += self._swap_s(life)
            blocks = self._table.grow(id, life.computed + count)
            self._blocks[id] = len(blocks)
            new = life.known_tokens(life.computed, count)
            rows.append(StepRow(life.request, life.computed, new, count == life.pending, blocks))
            if life.begun_s is None:
                life.begun_s = now_s
        spans = [(row.first, len(row.tokens)) for row in rows]
        load = Load.padded(spans, choice.dead_rows) if choice.padded else Load.of(spans)
        self._steps += 1
        swap_out, self._swap_out = tuple(self._swap_out), []
        shared, self._shared = tuple(self._shared.items()), {}
        predicted_s = self.planned.step_s(load) + swap_s
        self._running = Step(
            self._steps, tuple(rows), load, now_s, predicted_s, swap_out, tuple(swap_in), swap_s, shared
        )
        return self._running

    def _check_ids(self, choice: Choice) -> None:
        run = [id for id, _ in choice.run]
        gone = [*choice.preempt, *choice.give_up]
        named = run + list(choice.give_up)
        if len(set(named)) != len(named) or len(set(gone)) != len(gone) or not {*named, *gone} <= self._lives.keys():
            raise ValueError("the policy chose requests that are not under way, or one of them twice")
        preempted = set(choice.preempt)
        for id, count in choice.run:
            life = self._lives[id]
            pending = life.known if id in preempted else life.pending
            if not 1 <= count <= pending:
                raise ValueError(f"the policy chose {count} tokens of request {id}, which has {pending} to compute")

    def _preempt(self, life: Life, *, may_swap: bool) -> None:
        life.preempted += 1
        blocks = self._blocks.get(life.id, 0)
        fits = sum(self._swapped.values()) + blocks <= self.limits.swap_blocks
        again_s = self.planned.first_token_s(max(1, life.computed)) - self.planned.step_fixed_s
        if may_swap and fits and life.computed and self._swap_s(life) < again_s:
            life.swapped += 1
            self._swapped[life.id] = blocks
            self._swap_out.append(life.id)
            self._blocks.pop(life.id)
            self._table.release(life.id)
            return
        unused = self._shared.get(life.id)
        if unused is None:
            life.recomputed += life.computed
        else:
            life.shared -= unused.tokens
            self.shared_tokens -= unused.tokens
        life.computed = 0
        self._free(life.id)

    def _swap_s(self, life: Life) -> float:
        return life.computed * self.profile.kv_bytes_per_token / self._swap_bytes_per_s

    def _end(self, life: Life, outcome: Outcome, now_s: float) -> Ended:
        del self._lives[life.id]
        self.policy.left(life)
        self.outcomes[outcome] += 1
        if self._running is not None and any(row.id == life.id for row in self._running.rows):
            self._left_in_step.add(life.id)
        else:
            self._free(life.id)
        if len(self._deadlines) > 64 + 2 * len(self._lives):
            self._deadlines = [each for each in self._deadlines if each[1] in self._lives]
            heapq.heapify(self._deadlines)
        in_time = (
            outcome is Outcome.FINISHED
            and life.first_token_s is not None
            and life.request.is_in_time(life.first_token_s, now_s, len(life.tokens))
        )
        return Ended(life, outcome, in_time)

    def _stop(self, step: Step) -> None:
        if self._running is None or self._running.id != step.id:
            raise KeyError(f"step {step.id} does not run")
        self._running = None
        for id in self._left_in_step:
            self._free(id)
        self._left_in_step.clear()

    def _free(self, id: int) -> None:
        self._shared.pop(id, None)
        if self._blocks.pop(id, None) is not None:
            self._table.release(id)
            self._drop.append(id)
        elif self._swapped.pop(id, None) is not None:
            self._swap_out = [each for each in self._swap_out if each != id]
            self._drop.append(id)

    def dropped(self) -> tuple[int, ...]:
        """Returns, once, the requests that the model must forget. ``next_step`` returns them too."""
        drop, self._drop = tuple(self._drop), []
        return drop

    def _note_time(self, life: Life, now_s: float) -> None:
        if life.first_token_s is None:
            life.first_token_s = now_s
        elif life.last_token_s is not None:
            life.largest_gap_s = max(life.largest_gap_s, now_s - life.last_token_s)
        life.last_token_s = now_s

    def _hopeless_s(self, request: Request) -> float:
        """Returns the latest start at which the first token would still be in time."""
        ends_s = [each for each in (request.deadline_s,) if each is not None]
        if request.ttft_s is not None:
            ends_s.append(request.arrival_s + request.ttft_s)
        return min(ends_s) - self.planned.first_token_s(len(request.prompt))

    def _next_deadline_s(self) -> float | None:
        return self._deadlines[0][0] if self._deadlines else None

    def _at(self, now_s: float) -> float:
        self._now_s = max(self._now_s, now_s)
        return self._now_s
