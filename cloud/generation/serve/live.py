"""Runs the engine in real time: requests come from an event loop, and steps run on a thread of their own.

Two parties share one lock, which is never held while a step runs: the event loop (a request arrives, or its caller
leaves) and the engine's thread (it gets a step and reports what was drawn).
"""

import asyncio
import itertools
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from isthmus.cloud.generation.model.executor import Executor
from isthmus.cloud.generation.scheduling.engine import Engine, Overloaded
from isthmus.cloud.generation.scheduling.policy import Life, Limits
from isthmus.cloud.generation.scheduling.profile import GenerationProfile
from isthmus.cloud.generation.scheduling.request import Outcome, Request
from isthmus.cloud.generation.scheduling.step import Drawn, Ended, Step
from isthmus.cloud.generation.serve.numbers import Numbers
from isthmus.cloud.generation.serve.text import AnswerText
from isthmus.proto.errors import Internal, IsthmusError, TooLate, Unavailable

log = logging.getLogger(__name__)

T = TypeVar("T")

SLOW: Final = 1.5
"""If steps take this many times as long as the profile says, a warning is logged once."""
_STOPPING: Final = "the server is stopping; try again later"


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that an answer got longer by. It may be empty: a token that completes no character yet."""

    text: str


@dataclass(frozen=True, slots=True)
class Done:
    """The end of an answer: why it ended, its numbers of tokens, and its times in seconds.

    ``reason`` is "stop" for an end token or a stop string, and "length" if ``max_tokens`` or the policy cut it.
    """

    reason: str
    outcome: Outcome
    prompt_tokens: int
    tokens: int
    queue_s: float
    ttft_s: float
    total_s: float
    in_time: bool
    shared_tokens: int = 0
    """Tokens of the prompt that were not computed, because another request that begins alike had."""


Item = Piece | Done | IsthmusError


class Reply:
    """One request that was accepted. Iterate over it once, to its end, or ``cancel`` it.

    It yields pieces and then one ``Done``. Raises TooLate if the request was evicted, Internal if its step failed, and
    Unavailable if the server is stopping.
    """

    def __init__(self, live: "LiveGeneration", request: Request, text: AnswerText) -> None:
        self.request = request
        self.text = text
        self._live = live
        # At most one item per token of the answer, and its end.
        self._items: asyncio.Queue[Item] = asyncio.Queue()
        self._over = False

    async def __aiter__(self) -> AsyncIterator[Piece | Done]:
        while not self._over:
            item = await self._items.get()
            if isinstance(item, IsthmusError):
                self._over = True
                raise item
            self._over = isinstance(item, Done)
            yield item

    @property
    def id(self) -> int:
        return self.request.id

    @property
    def over(self) -> bool:
        """Whether it has ended, or its caller has left."""
        return self._over

    def cancel(self) -> None:
        """Ends the request if it has not ended: its caller left. Its blocks are free within one step."""
        self._over = True
        self._live.cancel(self.request.id)

    def put(self, item: Item) -> None:
        """Called on the event loop."""
        self._items.put_nowait(item)


class LiveGeneration:
    """Call ``start`` once, from the event loop that asks, and ``stop`` once."""

    def __init__(
        self,
        engine: Engine,
        executor: Executor,
        *,
        clock: Callable[[], float] = time.monotonic,
        on_start: Callable[[], None] = lambda: None,
    ) -> None:
        """``on_start`` is called on the thread that runs the steps, before the first of them."""
        self._engine = engine
        self._executor = executor
        self._clock = clock
        self._on_start = on_start
        self._wake = threading.Condition()
        self._open: dict[int, Reply] = {}
        self._ids = itertools.count(1)
        self._warned_slow = False
        self._errands: deque[Callable[[], None]] = deque()
        self._stopped: str | None = "the server is starting; try again"
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="generation-engine", daemon=True)
        self._numbers = Numbers()

    @property
    def ready(self) -> bool:
        """Whether requests are accepted."""
        return self._stopped is None

    def start(self) -> None:
        """Starts the engine's thread and accepts requests from now on."""
        self._loop = asyncio.get_running_loop()
        self._stopped = None
        self._thread.start()

    def stop(self) -> None:
        """Waits for the running step, then ends all requests. It blocks: call it off the event loop."""
        with self._wake:
            self._stopped = _STOPPING
            self._wake.notify()
        if self._thread.ident is not None:
            self._thread.join()

    def submit(self, text: Callable[[], AnswerText], **asked: Any) -> Reply:
        """Accepts a request of ``Request.asked``'s values, without an id and an arrival. Call it on the event loop.

        ``text`` makes the decoder of its answer. Raises InvalidInput for values out of range, Overloaded if too many
        requests are under way, and Unavailable if the server is stopping.
        """
        with self._wake:
            if self._stopped is not None:
                raise Unavailable(self._stopped)
            now_s = self._clock()
            request = Request.asked(next(self._ids), arrival_s=now_s, **asked)
            reply = Reply(self, request, text())
            self._engine.submit(request, now_s)
            self._open[request.id] = reply
            self._wake.notify()
        return reply

    def cancel(self, id: int) -> None:
        """Ends a request whose caller left; nothing happens if it has ended already."""
        with self._wake:
            if self._open.pop(id, None) is not None:
                self._engine.cancel(id, self._clock())
                self._wake.notify()

    def numbers(self) -> Numbers:
        """Returns what was counted since the start, and the load now."""
        with self._wake:
            found, engine = self._numbers.copy(), self._engine
            found.outcomes = Counter(engine.outcomes)
            found.under_way, found.waiting, found.free_blocks = engine.under_way, engine.waiting, engine.free_blocks
            found.shared_tokens, found.kept_blocks = engine.shared_tokens, engine.kept_blocks
            return found

    @property
    def engine(self) -> Engine:
        """For work ``between_steps`` alone."""
        return self._engine

    @property
    def limits(self) -> Limits:
        return self._engine.limits

    @property
    def profile(self) -> GenerationProfile:
        return self._engine.planned

    def next_id(self) -> int:
        return next(self._ids)

    def reply_of(self, id: int) -> "Reply | None":
        """Returns the reply of a request that has not ended and whose caller has not left. Call it between steps."""
        return self._open.get(id)

    def take_out(self, id: int) -> None:
        """Takes a request out without an end: it goes on elsewhere, or comes back. Call it between steps."""
        self._engine.export(id, self._clock())
        del self._open[id]

    def take_back(self, life: Life, reply: "Reply") -> None:
        """Goes on with a request that was taken out, unless its caller has left. Call it between steps.

        If there is no room for it any more, it ends with Overloaded.
        """
        if reply.over:
            return
        try:
            self._engine.adopt(life, self._clock())
        except ValueError:
            self._engine.outcomes[Outcome.FAILED] += 1
            self._deliver([(reply, Overloaded("the server took other requests meanwhile; try again later"))])
            return
        self._open[life.id] = reply

    def take_in(self, life: Life, text: AnswerText, said: str) -> "tuple[Reply, tuple[int, ...]]":
        """Goes on with a request of another replica, and returns its reply and its blocks here.

        ``said`` is the text of the tokens that it has, the reply's first piece. Raises Overloaded if there is no room.
        Call it between steps.
        """
        try:
            blocks = self._engine.adopt(life, self._clock())
        except ValueError as error:
            raise Overloaded("there is no room for a request that is moved; try again later") from error
        reply = self._open[life.id] = Reply(self, life.request, text)
        self._deliver([(reply, Piece(said))])
        return reply, blocks

    async def between_steps(self, work: Callable[[], T]) -> T:
        """Returns what ``work`` returns, which runs on the engine's thread while no step runs.

        Raises Unavailable if the server is stopping.
        """
        return await asyncio.wrap_future(self.soon(work))

    def soon(self, work: Callable[[], T]) -> "Future[T]":
        """Lets ``work`` run on the engine's thread before the next step."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)

        with self._wake:
            if self._stopped is not None:
                raise Unavailable(self._stopped)
            self._errands.append(run)
            self._wake.notify()
        return future

    def _run_errands(self) -> None:
        with self._wake:
            while self._errands:
                self._errands.popleft()()
            drop = self._engine.dropped()
        self._executor.drop(drop)

    def _run(self) -> None:
        try:
            self._on_start()
            while (found := self._next_step()) is not None:
                step, drop = found
                self._executor.drop(drop)
                if step is None:
                    self._run_errands()
                if step is not None:
                    self._execute(step)
        except Exception:
            log.exception("the engine failed; every request is refused from now on")
            self._refuse_all("the server failed; ask its operator to restart it")
        else:
            self._refuse_all(_STOPPING)

    def _next_step(self) -> tuple[Step | None, Sequence[int]] | None:
        """Waits until there is a step to run or a request to forget. Returns None if the engine is to stop."""
        with self._wake:
            while self._stopped is None:
                if self._errands:
                    return None, ()
                decision = self._engine.next_step(self._clock())
                self._deliver([(reply, item) for ended in decision.ended for reply, item in self._ends(ended)])
                if decision.step is not None or decision.drop:
                    return decision.step, decision.drop
                wait_s = None if decision.wait_until_s is None else max(0.001, decision.wait_until_s - self._clock())
                self._wake.wait(wait_s)
        return None

    def _execute(self, step: Step) -> None:
        try:
            tokens = self._executor.run(step)
        except Exception:
            log.exception("a step of %d requests failed", len(step.rows))
            with self._wake:
                ends = self._engine.failed(step, self._clock())
                self._deliver([found for ended in ends for found in self._ends(ended)])
            return
        # Only this thread reads and changes the texts of answers.
        with self._wake:
            replies = {id: reply for id in tokens if (reply := self._open.get(id)) is not None}
        added = {id: reply.text.add(tokens[id]) for id, reply in replies.items()}
        now_s = self._clock()
        with self._wake:
            drawn = {id: Drawn(token, added[id][1] if id in added else True) for id, token in tokens.items()}
            found: list[tuple[Reply, Item]] = []
            for event in self._engine.finished(step, drawn, now_s):
                id = event.life.id
                if isinstance(event, Ended):
                    found += self._ends(event)
                elif id in self._open:
                    self._numbers.tokens += 1
                    found.append((self._open[id], Piece(added[id][0])))
            self._deliver(found)
            pace = self._engine.pace
        if pace >= SLOW and not self._warned_slow:
            self._warned_slow = True
            log.warning(
                "steps take %.1f times as long as the profile says: this machine is busy with other work, or was "
                "measured when it was faster; 'isthmus generate profile' measures it again",
                pace,
            )

    def _ends(self, ended: Ended) -> list[tuple[Reply, Item]]:
        """Returns what the caller of a request that ended is told; nothing if the caller has left."""
        life, request = ended.life, ended.life.request
        reply = self._open.pop(life.id, None)
        if reply is None:
            return []
        if ended.outcome is Outcome.EVICTED:
            return [(reply, TooLate("could not be answered in time, so it was not computed"))]
        if ended.outcome is Outcome.FAILED:
            return [(reply, Internal("the server failed on this request; try again"))]
        end_s, first_s = (each or request.arrival_s for each in (life.last_token_s, life.first_token_s))
        done = Done(
            "stop" if reply.text.stopped else "length",
            ended.outcome,
            len(request.prompt),
            len(life.tokens),
            max(0.0, (life.begun_s or request.arrival_s) - request.arrival_s),
            first_s - request.arrival_s,
            end_s - request.arrival_s,
            ended.in_time,
            min(life.shared, len(request.prompt)),
        )
        self._numbers.note(done.queue_s, done.ttft_s, done.total_s, done.tokens)
        rest = "" if reply.text.stopped else reply.text.rest()
        return [(reply, Piece(rest)), (reply, done)] if rest else [(reply, done)]

    def _refuse_all(self, why: str) -> None:
        with self._wake:
            self._stopped = why
            while self._errands:  # whoever waits for them finds no request, or starts one that is refused below
                self._errands.popleft()()
            open_ones = list(self._open.values())
            self._open.clear()
            self._deliver([(reply, Unavailable(why)) for reply in open_ones])

    def _deliver(self, found: Sequence[tuple[Reply, Item]]) -> None:
        if found and self._loop is not None:
            # The loop may have ended already; then nobody waits for these answers.
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(_put, found)


def _put(found: Sequence[tuple[Reply, Item]]) -> None:
    for reply, item in found:
        reply.put(item)
