"""Generation as the service sees it: one model under its name, and what a client asks of it as plain values."""

import hashlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Final, Protocol

from isthmus.cloud.generation.model.configuration import LlamaConfig
from isthmus.cloud.generation.model.tokenizer import TextTokenizer, TokenizerThread
from isthmus.cloud.generation.scheduling.request import Sampling
from isthmus.cloud.generation.serve.emotion import URGENT_SHARE, Emotion, with_emotion
from isthmus.cloud.generation.serve.live import Done, LiveGeneration, Piece, Reply
from isthmus.cloud.generation.serve.numbers import Numbers
from isthmus.cloud.generation.serve.text import AnswerText
from isthmus.proto.errors import InvalidInput

if TYPE_CHECKING:  # it imports torch
    from isthmus.cloud.generation.serve.moving import Moves

DEFAULT_TOKENS: Final = 256
"""Length of an answer whose client names none; less if the prompt leaves less room."""
MAX_MESSAGES: Final = 256
BYTES_PER_TOKEN: Final = 4
"""Bytes of text that are counted as one token if only the replica knows its tokenizer."""
ROLES: Final = ("system", "user", "assistant")


@dataclass(frozen=True)
class Wishes:
    """What a client asks of an answer. The times are in seconds from the request's arrival; None: no wish.

    Requests of one ``salt`` share what they compute for prompts that begin alike (``Request.salt``). A ``user`` and a
    ``salt`` belong to a ``tenant``; "" is the operator's own one. Another tenant's are different, whatever it sends.
    ``emotion`` is how the client's user feels. It enters the prompt of a conversation (``emotion.py``).
    """

    max_tokens: int | None = None
    sampling: Sampling = field(default_factory=Sampling)
    stops: Sequence[str] = ()
    user: str = ""
    kind: str = ""
    ttft_s: float | None = None
    tpot_s: float | None = None
    latency_s: float | None = None
    utility: float = 1.0
    emotion: Emotion | None = None
    salt: str = ""
    tenant: str = ""

    @property
    def own_user(self) -> str:
        """The user, different from every user of another tenant."""
        return self._own(self.user)

    @property
    def own_salt(self) -> str:
        """The salt, different from every salt of another tenant."""
        return self._own(self.salt)

    def _own(self, text: str) -> str:
        if not self.tenant and not text:
            return ""
        # No tenant's name holds "/", so each (tenant, text) is hashed differently. The length suits other servers, too.
        return hashlib.sha256(f"{self.tenant}/{text}".encode(errors="surrogatepass")).hexdigest()

    @property
    def first_token_s(self) -> float | None:
        """The time to the first token that is planned with: less than asked for if the user is afraid or angry."""
        urgent = self.ttft_s is not None and self.emotion is not None and self.emotion.urgent
        return URGENT_SHARE * self.ttft_s if urgent and self.ttft_s is not None else self.ttft_s


class Answer(Protocol):
    """A request that was accepted. Iterate over it once, to its end, or ``cancel`` it."""

    def __aiter__(self) -> AsyncIterator[Piece | Done]: ...

    @property
    def id(self) -> int | None:
        """The engine's number of the request; None if it has none there."""

    @property
    def cancel(self) -> Callable[[], None]: ...


class Answering(Protocol):
    """What answers clients: a model of ours, or other servers as its replicas (``relay.py``)."""

    @property
    def name(self) -> str: ...

    @property
    def created_s(self) -> float: ...

    @property
    def ready(self) -> bool: ...

    @property
    def context(self) -> int:
        """The largest number of tokens of prompt and answer together."""

    @property
    def max_tokens(self) -> int:
        """The longest answer that a client may ask for, in tokens."""

    def numbers(self) -> Numbers: ...

    async def chat(self, messages: Sequence[Mapping[str, str]], wishes: Wishes) -> Answer: ...

    async def complete(self, prompt: str, wishes: Wishes) -> Answer: ...


class Counts(Protocol):
    """Counts the tokens of prompts."""

    async def of_text(self, text: str) -> int: ...

    async def of_chat(self, messages: Sequence[Mapping[str, str]]) -> int: ...


class Estimate:
    """Counts a token per so many bytes."""

    async def of_text(self, text: str) -> int:
        return -(-len(text.encode()) // BYTES_PER_TOKEN)

    async def of_chat(self, messages: Sequence[Mapping[str, str]]) -> int:
        return -(-sum(len(each["content"].encode()) for each in messages) // BYTES_PER_TOKEN)


@dataclass(frozen=True)
class Generation:
    """One model that is served. ``created_s`` is when it was opened, in Unix seconds."""

    name: str
    config: LlamaConfig
    tokenizer: TextTokenizer
    live: LiveGeneration
    max_tokens: int
    created_s: float
    moves: "Moves"

    @cached_property
    def _tokenizing(self) -> TokenizerThread:
        return TokenizerThread(self.tokenizer)

    @property
    def ready(self) -> bool:
        """Whether requests are accepted."""
        return self.live.ready

    def numbers(self) -> Numbers:
        """Returns what was counted since the start, and the load now."""
        return self.live.numbers()

    @property
    def context(self) -> int:
        return self.config.context

    async def complete(self, prompt: str, wishes: Wishes) -> Reply:
        """Accepts a prompt. Raises InvalidInput, Overloaded or Unavailable."""
        check_text("prompt", prompt)
        return self._submit(await self._tokenizing.encode(prompt), wishes)

    async def chat(self, messages: Sequence[Mapping[str, str]], wishes: Wishes) -> Reply:
        """Accepts a conversation of (role, content). Raises InvalidInput, Overloaded or Unavailable."""
        check_messages(messages)
        return self._submit(await self._tokenizing.chat(with_emotion(messages, wishes.emotion)), wishes)

    def close(self) -> None:
        """Ends the thread of the tokenizer. The engine is stopped by itself (``live.stop``)."""
        self._tokenizing.close()

    def _submit(self, tokens: list[int], wishes: Wishes) -> Reply:
        most = wishes.max_tokens
        if most is None:
            most = max(1, min(DEFAULT_TOKENS, self.max_tokens, self.context - len(tokens)))
        decoding = self.tokenizer.stream()
        return self.live.submit(
            lambda: AnswerText(decoding, wishes.stops, self.config.end_ids),
            prompt=tokens,
            max_tokens=most,
            context=self.context,
            limit=self.max_tokens,
            sampling=wishes.sampling,
            stops=wishes.stops,
            user=wishes.own_user,
            kind=wishes.kind,
            ttft_s=wishes.first_token_s,
            tpot_s=wishes.tpot_s,
            latency_s=wishes.latency_s,
            utility=wishes.utility,
            salt=wishes.own_salt,
        )


def check_messages(messages: Sequence[Mapping[str, str]]) -> None:
    """Raises InvalidInput for too many messages, unknown roles, and text that no UTF-8 can hold."""
    if not 1 <= len(messages) <= MAX_MESSAGES:
        raise InvalidInput(f"messages: from 1 to {MAX_MESSAGES} are accepted")
    for message in messages:
        if message["role"] not in ROLES:
            raise InvalidInput(f"messages: the role must be one of {', '.join(ROLES)}")
        check_text("messages", message["content"])


def check_text(name: str, text: str) -> None:
    """Raises InvalidInput for text that no UTF-8 can hold, such as half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidInput(f"{name}: the text holds half a character at position {error.start}") from error
