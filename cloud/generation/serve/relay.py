"""Serves servers with OpenAI's interface as replicas of one model: admission, order, dispatch and retries are ours.

They are other servers, or replicas that this server runs itself, which are sent the wishes of our own, too.

One event loop owns everything here. A request waits in the front (``policies/front.py``) until a replica has room. If
its replica fails, it is sent to another one from the start, and what the client has already is left out: the second
answer must begin with the same text. Requests carry a seed, so replicas of one kind repeat each other's draws.
"""

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Any, Final

from isthmus.cloud.generation.policies.front import Front
from isthmus.cloud.generation.policies.orders import Order
from isthmus.cloud.generation.scheduling.policy import Life, Limits
from isthmus.cloud.generation.scheduling.replicas import Standing
from isthmus.cloud.generation.scheduling.request import Outcome, Request
from isthmus.cloud.generation.serve.carrier import Lost
from isthmus.cloud.generation.serve.emotion import with_emotion
from isthmus.cloud.generation.serve.live import Done, Item, Piece
from isthmus.cloud.generation.serve.numbers import Numbers
from isthmus.cloud.generation.serve.relocation import Events, Mover
from isthmus.cloud.generation.serve.serving import DEFAULT_TOKENS, Counts, Estimate, Wishes, check_messages, check_text
from isthmus.cloud.generation.serve.upstream import Upstream, cached_tokens, reason_of
from isthmus.proto.errors import Internal, IsthmusError, TooLate, Unavailable

log = logging.getLogger(__name__)

PATIENCE_S: Final = 60.0
"""A request without a deadline waits so long for a replica, then it is refused. So is one that lost its replica in the
middle of its answer."""
_LEAST_S: Final = 0.001
"""What is left of a wish that is overdue, for a replica."""
MOST_SENDS: Final = 4
"""Replicas that one request is sent to, one after the other."""


@dataclass(eq=False)
class Relayed:
    """One request that was accepted. Iterate over it once, to its end, or ``cancel`` it.

    It yields pieces and then one ``Done``. Raises TooLate, Unavailable, or what the replica refuses.
    """

    life: Life
    path: str
    body: Mapping[str, Any]
    own: Mapping[str, Any]
    """What replicas of ours are sent, too."""
    cancel: Callable[[], None] = lambda: None
    given: str = ""
    sends: int = 0
    name: str | None = None
    """What its replica calls it."""
    moving: bool = False
    lost: Lost | None = None
    """Its replica failed while it was moved."""
    task: asyncio.Task[None] | None = None
    patience: asyncio.TimerHandle | None = None
    items: asyncio.Queue[Item] = field(default_factory=asyncio.Queue)

    @property
    def id(self) -> int:
        return self.life.id

    def settle(self) -> None:
        """Ends the wait for a replica: it has one that answers, or has ended."""
        if self.patience is not None:
            self.patience.cancel()
            self.patience = None

    async def __aiter__(self) -> AsyncIterator[Piece | Done]:
        while True:
            item = await self.items.get()
            if isinstance(item, IsthmusError):
                raise item
            yield item
            if isinstance(item, Done):
                return


class Relay:
    """Several upstream servers under one name. ``start`` and ``stop`` run on the loop that serves.

    ``limits`` bounds what each replica is given at a time; its blocks are counted by ``counts`` of the tokens.
    """

    def __init__(
        self,
        name: str,
        upstreams: Sequence[Upstream],
        limits: Limits,
        order: Order | None = None,
        *,
        context: int,
        max_tokens: int,
        max_waiting: int = 256,
        counts: Counts | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = name
        self.created_s = time.time()
        self._upstreams = tuple(upstreams)
        self._front = Front([limits] * len(self._upstreams), order, max_requests=max_waiting)
        self.context, self.max_tokens = context, max_tokens
        self._counts = counts or Estimate()
        self._numbers = Numbers()
        self._clock = clock
        self._ids = itertools.count(1)
        self._open: dict[int, Relayed] = {}
        self._wake: asyncio.TimerHandle | None = None
        self._stopped = False
        self._mover = Mover(clock)
        self._emptying: set[asyncio.Task[None]] = set()

    @property
    def ready(self) -> bool:
        """Whether a replica is expected to answer."""
        return not self._stopped and any(each.open for each in self._front.standings(self._clock()))

    async def start(self) -> None:
        """Asks each replica for its model. Raises InvalidInput if one serves several; one that is down may come."""
        for at, upstream in enumerate(self._upstreams):
            try:
                await upstream.model()
            except Lost as error:
                log.warning("replica %d: %s; it is tried again", at, error)
                self._front.lost(at, self._clock())

    async def stop(self) -> None:
        """Ends all requests and closes the connections."""
        self._stopped = True
        for emptying in self._emptying:
            emptying.cancel()
        tasks = [*self._emptying, *(each.task for each in self._open.values() if each.task is not None)]
        for relayed in list(self._open.values()):
            self._end(relayed, Unavailable("the server is stopping; try again later"))
        await asyncio.gather(*tasks, return_exceptions=True)
        for upstream in self._upstreams:
            await upstream.close()

    def numbers(self) -> Numbers:
        """Returns what was counted since the start, and the load now; free blocks are an estimate."""
        found = self._numbers.copy()
        found.under_way, found.waiting = self._front.under_way, self._front.waiting
        found.free_blocks = sum(each.blocks - each.used for each in self.standings() if each.open)
        return found

    def standings(self) -> list[Standing]:
        """Returns what is known of each replica."""
        return self._front.standings(self._clock())

    @property
    def urls(self) -> tuple[str, ...]:
        """The addresses of the servers, or the names of replicas that this server runs."""
        return tuple(upstream.url for upstream in self._upstreams)

    def drain(self, url: str, *, draining: bool = True) -> None:
        """Sends nothing more to a replica. What it has begun moves to others if it can, or ends there.

        Raises ValueError for an unknown URL. Call it on the loop that serves.
        """
        at = self.urls.index(url)
        self._front.drain(at, draining=draining)
        if draining and self._upstreams[at].movable:
            task = asyncio.create_task(self._empty(at), name=f"drain-{at}")
            self._emptying.add(task)
            task.add_done_callback(self._emptying.discard)

    async def _empty(self, at: int) -> None:
        """Moves every request of a replica to another one, as far as there is room."""
        for relayed in [each for each in self._open.values() if self._front.at(each.id) == at]:
            await self._move(relayed, at)
        if left := sum(self._front.at(id) == at for id in self._open):
            log.info("replica %d is drained; %d requests end there", at, left)

    async def _move(self, relayed: Relayed, source: int) -> None:
        """Moves one request, or leaves it where it is. Its client's stream goes on either way."""
        id = relayed.id
        if relayed.name is None or self._front.at(id) != source:
            return  # it has not begun to stream, or has ended
        target = self._front.move(id, self._clock())
        if target is None or not self._upstreams[target].movable:
            self._front.put(id, source)
            return
        relayed.moving, relayed.lost = True, None
        form = "chat" if relayed.path.endswith("chat/completions") else "text"
        upstreams = self._upstreams[source], self._upstreams[target]
        try:
            arrived = await self._mover.move(*upstreams, relayed.name, relayed.life.known, form)
        except IsthmusError as error:
            log.warning("a request was not moved: %s", error)
            self._numbers.moves["failed"] += 1
            self._front.put(id, source)
            if relayed.lost is not None and id in self._open:
                self._again(relayed, source, relayed.lost)
            return
        finally:
            relayed.moving = False
        self._numbers.moves["blocks" if arrived.by_blocks else "tokens"] += 1
        self._numbers.times["pause"].note(arrived.pause_s)
        if id not in self._open:  # its client left meanwhile
            await arrived.events.aclose()
            return
        old = relayed.task
        relayed.task = asyncio.create_task(self._relay(relayed, target, arrived.from_the_first()), name=f"relay-{id}")
        if old is not None:
            old.cancel()

    async def chat(self, messages: Sequence[Mapping[str, str]], wishes: Wishes) -> Relayed:
        """Accepts a conversation. Raises InvalidInput, Overloaded or Unavailable."""
        check_messages(messages)
        told = with_emotion(messages, wishes.emotion)
        return self._submit("/v1/chat/completions", {"messages": told}, await self._counts.of_chat(told), wishes)

    async def complete(self, prompt: str, wishes: Wishes) -> Relayed:
        """Accepts a prompt. Raises InvalidInput, Overloaded or Unavailable."""
        check_text("prompt", prompt)
        return self._submit("/v1/completions", {"prompt": prompt}, await self._counts.of_text(prompt), wishes)

    def _submit(self, path: str, asked: Mapping[str, Any], tokens: int, wishes: Wishes) -> Relayed:
        if self._stopped:
            raise Unavailable("the server is stopping; try again later")
        now_s = self._clock()
        prompt = range(min(self.context, tokens))
        most = wishes.max_tokens
        if most is None:
            most = max(1, min(DEFAULT_TOKENS, self.max_tokens, self.context - len(prompt)))
        request = Request.asked(
            next(self._ids),
            prompt,
            arrival_s=now_s,
            max_tokens=most,
            context=self.context,
            limit=self.max_tokens,
            sampling=wishes.sampling,
            user=wishes.own_user,
            kind=wishes.kind,
            stops=wishes.stops,
            ttft_s=wishes.first_token_s,
            tpot_s=wishes.tpot_s,
            latency_s=wishes.latency_s,
            utility=wishes.utility,
        )
        sampling = wishes.sampling
        body = {
            **asked,
            "max_tokens": most,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            # Other servers' seeds have 32 bits.
            "seed": sampling.seed % (1 << 31),
            **({"stop": list(wishes.stops)} if wishes.stops else {}),
            **({"cache_salt": salt} if (salt := wishes.own_salt) else {}),
        }
        own = {"user": wishes.own_user, "kind": wishes.kind, "tpot_s": wishes.tpot_s, "utility": wishes.utility}
        relayed = Relayed(Life(request), path, body, own)
        relayed.cancel = lambda: self._end(relayed, None)
        self._front.submit(relayed.life)
        self._open[request.id] = relayed
        relayed.patience = asyncio.get_running_loop().call_later(self._wait_s(request), self._give_up, relayed)
        self._send()
        return relayed

    def _send(self) -> None:
        """Starts the requests that have a place now, and wakes when a replica that failed may be tried again."""
        now_s = self._clock()
        for id, at in self._front.send(now_s):
            relayed = self._open[id]
            relayed.sends += 1
            relayed.task = asyncio.create_task(self._relay(relayed, at), name=f"relay-{id}")
        if self._wake is not None:
            self._wake.cancel()
            self._wake = None
        next_s = self._front.next_try_s(now_s)
        if self._front.waiting and next_s is not None and not self._stopped:
            self._wake = asyncio.get_running_loop().call_later(max(0.01, next_s - now_s), self._send)

    def _again(self, relayed: Relayed, at: int, error: Lost) -> None:
        """Sends a request that its replica lost to another one, from the start."""
        log.warning("replica %d: %s", at, error)
        self._front.lost(at, self._clock(), refuses=error.full)
        if error.full:  # it may take the request later: the request's patience ends that
            relayed.sends -= 1
        request = relayed.life.request
        overdue = not relayed.given and self._clock() > request.arrival_s + self._wait_s(request)
        if relayed.sends >= MOST_SENDS or overdue:
            self._end(relayed, Unavailable("no replica could answer; try again later"))
        else:
            self._front.wait_again(relayed.id)
            if relayed.patience is None:
                relayed.patience = asyncio.get_running_loop().call_later(PATIENCE_S, self._give_up, relayed)
        self._send()

    async def _relay(self, relayed: Relayed, at: int, events: Events | None = None) -> None:
        """Passes an answer on; ``events`` are those of a request that was moved."""
        try:
            done = await self._answer(relayed, at, events)
        except Lost as error:
            if relayed.moving:  # it may have arrived elsewhere already
                relayed.lost = error
            else:
                self._again(relayed, at, error)
        except IsthmusError as error:
            self._end(relayed, error)
        except Exception:
            log.exception("a request to replica %d failed", at)
            self._end(relayed, Internal("the server failed on this request; try again"))
        else:
            self._end(relayed, done)

    async def _answer(self, relayed: Relayed, at: int, events: Events | None) -> Done:
        life, text, reason = relayed.life, "", None
        usage: Mapping[str, Any] = {}
        life.tokens.clear()
        if life.begun_s is None:
            life.begun_s = self._clock()
        if events is None:
            relayed.name = None
            upstream = self._upstreams[at]
            own = self._own(relayed) if upstream.own else {}
            events = upstream.stream(relayed.path, {**relayed.body, **own})
        async with aclosing(events):
            async for piece, event in events:
                relayed.name = str(event.get("id", "")) or None
                reason = reason_of(event) or reason
                usage = event.get("usage") or usage
                if not piece:
                    continue
                self._front.answered(at)
                life.last_token_s = self._clock()
                life.first_token_s = life.first_token_s or life.last_token_s
                if len(life.tokens) < life.request.max_tokens:
                    life.tokens.append(0)
                    self._numbers.tokens += 1
                text += piece
                self._give(relayed, text)
        if reason is None:
            raise Lost(f"{self._upstreams[at].url}: the answer broke off")
        if len(text) < len(relayed.given):
            raise _differs(relayed)
        return self._done(life, reason, usage)

    def _own(self, relayed: Relayed) -> dict[str, Any]:
        """Returns the wishes that only replicas of ours know. Their times count from now."""
        request, waited_s = relayed.life.request, self._clock() - relayed.life.request.arrival_s
        times_s = {
            "ttft_s": None if request.ttft_s is None or relayed.given else request.ttft_s - waited_s,
            "latency_s": None if request.deadline_s is None else request.deadline_s - request.arrival_s - waited_s,
        }
        return {
            **relayed.own,
            **{name: max(_LEAST_S, left_s) for name, left_s in times_s.items() if left_s is not None},
        }

    def _give(self, relayed: Relayed, text: str) -> None:
        """Gives the client what it does not have yet. Raises Unavailable if another replica says something else."""
        given = relayed.given
        if not (text.startswith(given) if len(text) >= len(given) else given.startswith(text)):
            raise _differs(relayed)
        if len(text) > len(given):
            relayed.given = text
            relayed.settle()
            relayed.items.put_nowait(Piece(text[len(given) :]))

    def _done(self, life: Life, reason: str, usage: Mapping[str, Any]) -> Done:
        now_s, request = self._clock(), life.request
        first_s = life.first_token_s or now_s
        counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
        prompt, tokens = (each if isinstance(each, int) and each >= 0 else None for each in counts)
        drawn = len(life.tokens) if tokens is None else tokens
        return Done(
            "length" if reason == "length" else "stop",
            Outcome.FINISHED,
            len(request.prompt) if prompt is None else prompt,
            drawn,
            max(0.0, (life.begun_s or request.arrival_s) - request.arrival_s),
            first_s - request.arrival_s,
            now_s - request.arrival_s,
            request.is_in_time(first_s, now_s, drawn),
            cached_tokens(usage),
        )

    def _end(self, relayed: Relayed, item: Item | None) -> None:
        """Ends a request, once. ``item`` None: its client has left."""
        if self._open.pop(relayed.life.id, None) is None:
            return
        self._front.ended(relayed.life.id)
        self._numbers.outcomes[_outcome(relayed, item)] += 1
        if isinstance(item, Done):
            self._numbers.note(item.queue_s, item.ttft_s, item.total_s, item.tokens)
            self._numbers.shared_tokens += item.shared_tokens
        relayed.settle()
        if item is not None:
            relayed.items.put_nowait(item)
        task = relayed.task
        if task is not None and not task.done() and task is not _current():
            task.cancel()
        if not self._stopped:
            self._send()

    def _wait_s(self, request: Request) -> float:
        """Returns how long the request may wait for its first token."""
        wishes = [each for each in (request.ttft_s, request.deadline_s) if each is not None]
        if request.deadline_s is not None:
            wishes[-1] = request.deadline_s - request.arrival_s
        return min(wishes, default=PATIENCE_S)

    def _give_up(self, relayed: Relayed) -> None:
        """Refuses a request that waits for a replica, or that has no token yet and can no longer be in time."""
        request, relayed.patience = relayed.life.request, None
        if not relayed.given and (request.ttft_s is not None or request.deadline_s is not None):
            self._end(relayed, TooLate("could not be answered in time"))
        elif relayed.task is None or relayed.task.done():
            self._end(relayed, Unavailable("no replica is free or reachable; try again later"))


def _outcome(relayed: Relayed, item: Item | None) -> Outcome:
    if item is None:
        return Outcome.CANCELLED
    if isinstance(item, Done):
        return item.outcome
    return Outcome.EVICTED if isinstance(item, TooLate) and not relayed.given else Outcome.FAILED


def _differs(relayed: Relayed) -> Unavailable:
    return Unavailable(
        f"the replica failed after {len(relayed.given)} characters, and another one goes on differently; ask again"
    )


def _current() -> asyncio.Task[Any] | None:
    with suppress(RuntimeError):
        return asyncio.current_task()
    return None
