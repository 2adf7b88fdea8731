"""Answers kept in front of a model: given again as cached, one flight per question, and only whole greedy ones."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from isthmus.cloud.generation.scheduling.cache import AnswerCache, CacheRule
from isthmus.cloud.generation.scheduling.request import Outcome, Sampling
from isthmus.cloud.generation.serve.cached import CachedAnswers
from isthmus.cloud.generation.serve.emotion import Emotion
from isthmus.cloud.generation.serve.live import Done, Piece
from isthmus.cloud.generation.serve.numbers import Numbers
from isthmus.cloud.generation.serve.serving import Answer, Wishes
from isthmus.proto.errors import Unavailable

GREEDY = Wishes(sampling=Sampling(temperature=0.0), kind="faq", user="ada")


class Words:
    """Answers with a number that counts the answers; ``reason`` and ``fails`` choose how they end."""

    name, created_s, ready, context, max_tokens = "words", 0.0, True, 256, 64
    numbers = staticmethod(Numbers)

    def __init__(self) -> None:
        self.asked = 0
        self.reason = "stop"
        self.fails = False
        self.hold: asyncio.Event | None = None

    async def chat(self, messages: Sequence[Mapping[str, str]], wishes: Wishes) -> Answer:
        return await self.complete(messages[-1]["content"], wishes)

    async def complete(self, prompt: str, wishes: Wishes) -> Answer:
        self.asked += 1
        return _Answer(self, self.asked)


class _Answer:
    cancel: Callable[[], None] = staticmethod(lambda: None)
    id = 0

    def __init__(self, words: Words, number: int) -> None:
        self._words, self._number = words, number

    async def __aiter__(self) -> AsyncIterator[Piece | Done]:
        yield Piece("answer ")
        if self._words.hold is not None:
            await self._words.hold.wait()
        if self._words.fails:
            raise Unavailable("killed")
        yield Piece(str(self._number))
        yield Done(self._words.reason, Outcome.FINISHED, 3, 2, 0.1, 0.2, 0.3, True)


class Axes:
    """Embeds by the first letter alone."""

    def embed(self, text: str) -> Any:
        return np.eye(26, dtype=np.float32)[ord(text[0].casefold()) - ord("a")]


async def told(answer: Answer) -> tuple[str, Outcome]:
    text, outcome = "", Outcome.FAILED
    async for item in answer:
        if isinstance(item, Piece):
            text += item.text
        else:
            outcome = item.outcome
    return text, outcome


def cached(words: Words, *, embedder: Any = None) -> CachedAnswers:
    return CachedAnswers(words, AnswerCache({"faq": CacheRule(shared=True)}), embedder)


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}]


def test_the_same_question_is_answered_again_without_the_model() -> None:
    async def run() -> None:
        words = Words()
        kept = cached(words)
        assert await told(await kept.chat(said("Why?"), GREEDY)) == ("answer 1", Outcome.FINISHED)
        assert await told(await kept.chat(said(" why"), GREEDY)) == ("answer 1", Outcome.CACHED)
        assert await told(await kept.complete("Why?", GREEDY)) == ("answer 2", Outcome.FINISHED), "no conversation"
        assert words.asked == 2 and kept.hits == 1
        kept.close()

    asyncio.run(run())


@pytest.mark.parametrize(
    "other",
    [
        Wishes(sampling=Sampling(temperature=0.5), kind="faq"),
        Wishes(sampling=Sampling(temperature=0.0), kind="other"),
        Wishes(sampling=Sampling(temperature=0.0), kind="faq", max_tokens=5),
        Wishes(sampling=Sampling(temperature=0.0), kind="faq", stops=("x",)),
        Wishes(sampling=Sampling(temperature=0.0), kind="faq", emotion=Emotion("sad", 0.9)),
    ],
    ids=["drawn", "class", "length", "stop", "state"],
)
def test_other_settings_are_another_question(other: Wishes) -> None:
    async def run() -> None:
        words = Words()
        kept = cached(words)
        await told(await kept.chat(said("Why?"), GREEDY))
        assert await told(await kept.chat(said("Why?"), other)) == ("answer 2", Outcome.FINISHED)
        kept.close()

    asyncio.run(run())


def test_what_did_not_end_by_itself_is_not_kept_and_those_who_wait_ask_themselves() -> None:
    async def run() -> None:
        words = Words()
        kept = cached(words)
        words.reason = "length"
        await told(await kept.chat(said("Why?"), GREEDY))
        assert (await told(await kept.chat(said("Why?"), GREEDY)))[1] is Outcome.FINISHED
        words.fails, words.hold = True, asyncio.Event()
        first = asyncio.create_task(told(await kept.chat(said("How?"), GREEDY)))
        second = asyncio.create_task(kept.chat(said("How?"), GREEDY))
        await asyncio.sleep(0)
        assert not second.done()
        words.hold.set()
        with pytest.raises(Unavailable):
            await first
        words.fails, words.reason = False, "stop"
        assert await told(await second) == ("answer 4", Outcome.FINISHED)
        kept.close()

    asyncio.run(run())


def test_one_flight_answers_all_who_ask_the_same_meanwhile() -> None:
    async def run() -> None:
        words = Words()
        words.hold = asyncio.Event()
        kept = cached(words)
        first = asyncio.create_task(told(await kept.chat(said("Why?"), GREEDY)))
        others = [asyncio.create_task(kept.chat(said("Why?"), GREEDY)) for _ in range(3)]
        await asyncio.sleep(0)
        words.hold.set()
        assert (await first)[0] == "answer 1"
        assert [await told(await other) for other in others] == [("answer 1", Outcome.CACHED)] * 3
        assert words.asked == 1
        kept.close()

    asyncio.run(run())


def test_a_caller_who_leaves_keeps_nobody_waiting() -> None:
    async def run() -> None:
        words = Words()
        words.hold = asyncio.Event()
        kept = cached(words)
        first = await kept.chat(said("Why?"), GREEDY)
        second = asyncio.create_task(kept.chat(said("Why?"), GREEDY))
        await asyncio.sleep(0)
        first.cancel()
        words.hold.set()
        assert await told(await second) == ("answer 2", Outcome.FINISHED)
        kept.close()

    asyncio.run(run())


def test_with_an_embedder_a_question_that_means_the_same_is_found_and_an_opposite_is_not() -> None:
    async def run() -> None:
        words = Words()
        kept = cached(words, embedder=Axes())
        await told(await kept.chat(said("Sort it ascending"), GREEDY))
        while not len(kept.cache):  # it is embedded on another thread
            await asyncio.sleep(0.001)
        assert await told(await kept.chat(said("Sort it upwards, ascending"), GREEDY)) == ("answer 1", Outcome.CACHED)
        assert (await told(await kept.chat(said("Sort it descending"), GREEDY)))[1] is Outcome.FINISHED
        kept.close()

    asyncio.run(run())
