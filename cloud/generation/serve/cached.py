"""Answers kept in front of a model or of other servers (``scheduling/cache.py``): found, given again, and kept.

Only greedy answers that ended by themselves are kept. While one client's question is being answered, others who ask the
same wait for that answer.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from isthmus.cloud.generation.scheduling.cache import AnswerCache, Question
from isthmus.cloud.generation.scheduling.request import Outcome
from isthmus.cloud.generation.serve.live import Done, Piece
from isthmus.cloud.generation.serve.numbers import Numbers
from isthmus.cloud.generation.serve.serving import Answer, Answering, Wishes

MOST_TEXT: Final = 2_000
"""Longer questions are not kept: they are hardly ever asked twice."""


class Embeds(Protocol):
    def embed(self, text: str) -> npt.NDArray[np.float32]: ...


@dataclass(frozen=True, slots=True)
class _Kept:
    text: str
    done: Done


@dataclass
class CachedAnswers:
    """Answers from ``cache`` where it can, and asks ``inner`` else. ``embedder`` None: only the same question is found.

    ``pressure`` says how many requests wait, as a share of those that may. One event loop owns it.
    """

    inner: Answering
    cache: AnswerCache
    embedder: Embeds | None = None
    clock: Callable[[], float] = time.monotonic
    pressure: Callable[[], float] = lambda: 0.0
    hits: int = 0
    _flights: dict[tuple[object, ...], asyncio.Future[_Kept | None]] = field(default_factory=dict)
    _embedding: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="isthmus-embedder")
    )

    @property
    def name(self) -> str:
        return self.inner.name

    @property
    def created_s(self) -> float:
        return self.inner.created_s

    @property
    def ready(self) -> bool:
        return self.inner.ready

    @property
    def context(self) -> int:
        return self.inner.context

    @property
    def max_tokens(self) -> int:
        return self.inner.max_tokens

    def numbers(self) -> Numbers:
        """Returns those of ``inner``, and the hits as requests that ended."""
        found = self.inner.numbers()
        found.outcomes[Outcome.CACHED] += self.hits
        return found

    async def chat(self, messages: Sequence[Mapping[str, str]], wishes: Wishes) -> Answer:
        """Accepts a conversation, as ``inner`` does. Its last message is the question."""
        earlier = tuple(f"{message['role']}: {message['content']}" for message in messages[:-1])
        text = messages[-1]["content"] if messages and messages[-1]["role"] == "user" else ""
        return await self._answer(text, ("chat", *earlier), wishes, lambda: self.inner.chat(messages, wishes))

    async def complete(self, prompt: str, wishes: Wishes) -> Answer:
        """Accepts a prompt, as ``inner`` does."""
        return await self._answer(prompt, ("text",), wishes, lambda: self.inner.complete(prompt, wishes))

    def close(self) -> None:
        """Ends the thread of the embedder."""
        self._embedding.shutdown(wait=True, cancel_futures=True)

    async def _answer(
        self, text: str, scope: tuple[str, ...], wishes: Wishes, ask: Callable[[], Awaitable[Answer]]
    ) -> Answer:
        said = "" if wishes.emotion is None else wishes.emotion.said
        settings = (self.name, wishes.tenant, said, str(wishes.max_tokens), *wishes.stops)
        question = Question(wishes.kind, wishes.user, (*settings, "", *scope), text)
        if not self.cache.serves(question) or wishes.sampling.temperature != 0 or not 0 < len(text) <= MOST_TEXT:
            return await ask()
        began_s = self.clock()
        key = (question.kind, *self.cache.key(question))
        if (found := self.cache.exact(question, began_s)) is None and (flight := self._flights.get(key)) is not None:
            found = await asyncio.shield(flight)
        vector_D = None
        if found is None and self.embedder is not None and self.cache.searches(question):
            vector_D = await self._embedded(text)
            found = self.cache.nearest(question, vector_D, self.clock(), self.pressure())
            self.cache.took(question.kind, search_s=self.clock() - began_s)
        if found is not None:
            self.hits += 1
            return _Again(found, self.clock() - began_s, self.clock)
        answer = await ask()
        flight = asyncio.get_running_loop().create_future()
        self._flights[key] = flight
        return _Watched(answer, lambda kept: self._ended(question, key, flight, vector_D, kept, began_s))

    async def _embedded(self, text: str) -> npt.NDArray[np.float32]:
        assert self.embedder is not None
        return await asyncio.get_running_loop().run_in_executor(self._embedding, self.embedder.embed, text)

    def _ended(
        self,
        question: Question,
        key: tuple[object, ...],
        flight: "asyncio.Future[_Kept | None]",
        vector_D: npt.NDArray[np.float32] | None,
        kept: _Kept | None,
        began_s: float,
    ) -> None:
        """Keeps a whole answer, and gives it to those who wait for it; after another end they ask themselves."""
        if self._flights.get(key) is flight:
            del self._flights[key]
        if not flight.done():
            flight.set_result(kept)
        if kept is None:
            return
        self.cache.took(question.kind, model_s=self.clock() - began_s)
        if vector_D is None and self.embedder is not None:
            # On the embedder's thread, after the client has its answer.
            found = self._embedding.submit(self.embedder.embed, question.text)
            loop = asyncio.get_running_loop()
            found.add_done_callback(
                lambda done: loop.call_soon_threadsafe(
                    self.cache.add, question, kept, self.clock(), None if done.exception() else done.result()
                )
            )
            return
        self.cache.add(question, kept, self.clock(), vector_D)


@dataclass
class _Again:
    """A kept answer, given as one piece."""

    kept: _Kept
    took_s: float
    clock: Callable[[], float]
    cancel: Callable[[], None] = lambda: None
    id: int | None = None

    async def __aiter__(self) -> AsyncIterator[Piece | Done]:
        yield Piece(self.kept.text)
        yield replace(
            self.kept.done,
            outcome=Outcome.CACHED,
            queue_s=0.0,
            ttft_s=self.took_s,
            total_s=self.took_s,
            in_time=True,
        )


class _Watched:
    """An answer of the model; ``on_end`` gets it once: whole, or None if it did not end by itself."""

    def __init__(self, answer: Answer, on_end: Callable[[_Kept | None], None]) -> None:
        self._answer = answer
        self._on_end = on_end
        self._over = False
        self.id = answer.id

    async def __aiter__(self) -> AsyncIterator[Piece | Done]:
        text: list[str] = []
        try:
            async for item in self._answer:
                if isinstance(item, Piece):
                    text.append(item.text)
                elif item.outcome is Outcome.FINISHED and item.reason == "stop":
                    self._end(_Kept("".join(text), item))
                yield item
        finally:
            self._end(None)

    def cancel(self) -> None:
        self._answer.cancel()
        self._end(None)

    def _end(self, kept: _Kept | None) -> None:
        if not self._over:
            self._over = True
            self._on_end(kept)
