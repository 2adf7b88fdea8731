"""Text to tokens and back, and the chat template. Words of a user can never become control tokens."""

import asyncio
import json
import secrets
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any, Final

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from isthmus.cloud.generation.model.configuration import LlamaConfig, ModelDirectoryError, read_json
from isthmus.data.files import read_text
from isthmus.proto.errors import InvalidInput

TOKENIZER: Final = "tokenizer.json"
TOKENIZER_CONFIG: Final = "tokenizer_config.json"
CHAT_TEMPLATE: Final = "chat_template.jinja"
MAX_TOKENIZER_BYTES: Final = 256 << 20
MAX_TEMPLATE_CHARS: Final = 1 << 18
MAX_PROMPT_CHARS: Final = 4 << 20
TEMPLATE_S: Final = 2.0
"""Longest time that a chat template may take."""
_REPLACEMENT: Final = "\N{REPLACEMENT CHARACTER}"


class TextTokenizer:
    """The tokenizer of a model directory. Its methods may be called from any thread, one at a time."""

    def __init__(self, tokenizer: Tokenizer, template: str | None, names: Mapping[str, str]) -> None:
        """``names`` holds the texts of special tokens that templates refer to, such as ``bos_token``."""
        self._tokenizer = tokenizer
        self._names = dict(names)
        self._special = tuple(each.content for each in tokenizer.get_added_tokens_decoder().values() if each.special)
        self._template = None if template is None else _compiled(template)

    @property
    def has_template(self) -> bool:
        """Whether the model says how a conversation is written."""
        return self._template is not None

    @staticmethod
    def read(folder: Path, config: LlamaConfig) -> "TextTokenizer":
        """Reads tokenizer.json, and the chat template if there is one.

        Raises ModelDirectoryError if a file is missing or damaged, or if the tokenizer does not belong to the model.
        """
        if not (folder / TOKENIZER).is_file():
            raise ModelDirectoryError(f"{folder.name} has no {TOKENIZER}; other forms of tokenizers are not read")
        try:
            tokenizer = Tokenizer.from_str(read_text(folder / TOKENIZER, limit_bytes=MAX_TOKENIZER_BYTES))
        except Exception as error:  # the library raises plain Exception for a file that is no tokenizer
            raise ModelDirectoryError(f"{TOKENIZER} is damaged; fetch it again") from error
        # A prompt is never cut or filled up silently.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        if not 0 <= largest < config.vocabulary:
            raise ModelDirectoryError(
                f"{TOKENIZER} has tokens up to {largest} and the model {config.vocabulary}: they do not belong together"
            )
        if any(tokenizer.id_to_token(end) is None for end in config.end_ids):
            raise ModelDirectoryError(f"{TOKENIZER} lacks the model's end token: they do not belong together")
        raw = read_json(folder, TOKENIZER_CONFIG) if (folder / TOKENIZER_CONFIG).is_file() else {}
        template = raw.get("chat_template")
        if (folder / CHAT_TEMPLATE).is_file():
            template = read_text(folder / CHAT_TEMPLATE, limit_bytes=4 * MAX_TEMPLATE_CHARS)
        if isinstance(template, list):  # several templates by name
            template = next((each["template"] for each in template if each.get("name") == "default"), None)
        names = {
            name: str(value["content"] if isinstance(value, dict) else value)
            for name, value in raw.items()
            if name in ("bos_token", "eos_token", "unk_token", "pad_token") and value is not None
        }
        return TextTokenizer(tokenizer, template, names)

    def encode(self, text: str) -> list[int]:
        """Returns the tokens of a user's text. What looks like a control token is text. Raises InvalidInput."""
        if len(text) > MAX_PROMPT_CHARS:
            raise InvalidInput(f"prompt: at most {MAX_PROMPT_CHARS} characters")
        return self._encoded(text, control=False)

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Returns the tokens of a conversation (role, content), ready for the assistant's reply.

        Only the template's own words become control tokens. Raises InvalidInput if the model has no template, or if
        the template refuses the messages, takes too long or writes too much.
        """
        if self._template is None:
            raise InvalidInput("messages: this model has no chat template; use /v1/completions with a prompt")
        if not any(token in message["content"] for token in self._special for message in messages):
            return self._encoded(self._rendered(messages), control=True)
        # Contents are rendered as marks that nobody can guess, and replaced by their tokens afterwards.
        marks = [secrets.token_hex(16) for _ in messages]
        marked = [{**message, "content": mark} for message, mark in zip(messages, marks, strict=True)]
        rest, tokens = self._rendered(marked), []
        for message, mark in zip(messages, marks, strict=True):
            before, found, after = rest.partition(mark)
            if found:
                tokens += self._encoded(before, control=True) + self._encoded(message["content"], control=False)
                rest = after
        return tokens + self._encoded(rest, control=True)

    def stream(self) -> "TextStream":
        """Returns a decoder for one answer."""
        return TextStream(self._decode)

    def _decode(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))

    def _encoded(self, text: str, *, control: bool) -> list[int]:
        self._tokenizer.encode_special_tokens = not control
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def _rendered(self, messages: Sequence[Mapping[str, str]]) -> str:
        assert self._template is not None
        stream = self._template.stream(messages=list(messages), add_generation_prompt=True, **self._names)
        try:
            text = _within(lambda: _joined(stream), TEMPLATE_S)
        except (TemplateError, TypeError, ValueError, ArithmeticError, RecursionError, LookupError) as error:
            raise InvalidInput(f"messages: the model's chat template refuses them: {str(error)[:200]}") from error
        return text


class TokenizerThread:
    """A tokenizer for an event loop. It works on a thread of its own, so that a long text does not hold the loop up.

    Its methods raise what those of ``TextTokenizer`` raise.
    """

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="isthmus-tokenizer")

    async def encode(self, text: str) -> list[int]:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._tokenizer.encode, text)

    async def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._tokenizer.chat, messages)

    async def of_text(self, text: str) -> int:
        """Returns the number of a text's tokens."""
        return len(await self.encode(text))

    async def of_chat(self, messages: Sequence[Mapping[str, str]]) -> int:
        """Returns the number of a conversation's tokens."""
        return len(await self.chat(messages))

    def close(self) -> None:
        """Ends the thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)


class TextStream:
    """Turns the tokens of one answer into text, piece by piece. Half characters are held back.

    >>> stream = TextStream(lambda tokens: bytes(tokens).decode(errors="replace"))
    >>> [stream.add(token) for token in "né".encode()], stream.rest()
    (['n', '', 'é'], '')
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._tokens: list[int] = []
        self._settled = 0
        """Tokens whose text was given out, but for those that are kept as context of the next ones."""
        self._given = ""
        """Text of the kept tokens that was given out."""

    def add(self, token: int) -> str:
        """Returns the text that ``token`` adds; empty while a character is not complete."""
        self._tokens.append(token)
        text = self._decode(self._tokens[self._settled :])
        if text.endswith(_REPLACEMENT) and len(self._tokens) - self._settled < 16:
            return ""
        piece = text[len(self._given) :]
        # The last settled piece stays as context, because a decoder may treat the start of a text in its own way.
        if len(self._tokens) - self._settled > 8:
            self._settled = len(self._tokens) - 1
            text = self._decode(self._tokens[self._settled :])
        self._given = text
        return piece

    def rest(self) -> str:
        """Returns what was held back at the end of the answer."""
        return self._decode(self._tokens[self._settled :])[len(self._given) :]


def _compiled(template: str) -> Any:
    if len(template) > MAX_TEMPLATE_CHARS:
        raise ModelDirectoryError(f"the chat template has over {MAX_TEMPLATE_CHARS} characters")
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True)
    environment.globals |= {"raise_exception": _refuse, "strftime_now": time.strftime}
    environment.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
    for name in ("center", "indent", "format", "wordwrap"):  # they can make a short text a huge one
        environment.filters.pop(name, None)
    try:
        return environment.from_string(template)
    except TemplateError as error:
        raise ModelDirectoryError(f"the chat template is damaged: {error}") from error


class _Sandbox(ImmutableSandboxedEnvironment):
    """No attributes of Python's own, no changed values, and no operator that makes a short text a huge one."""

    intercepted_binops = frozenset({"*", "**", "%"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if not all(isinstance(each, (int, float)) and abs(each) < 1e6 for each in (left, right)) or operator == "**":
            raise TemplateError(f"the operator {operator} takes small numbers alone")
        return super().call_binop(context, operator, left, right)


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _joined(pieces: Any) -> str:
    found, length = [], 0
    for piece in pieces:
        length += len(piece)
        if length > MAX_PROMPT_CHARS:
            raise TemplateError(f"it writes over {MAX_PROMPT_CHARS} characters")
        found.append(piece)
    return "".join(found)


def _within(work: Callable[[], str], seconds: float) -> str:
    """Runs ``work`` and ends it with TemplateError after ``seconds``, wherever it loops.

    A template is Python code once it is compiled, and Python calls the tracer before each of its lines.
    """
    ends_s = time.monotonic() + seconds
    before = sys.gettrace()

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        if time.monotonic() > ends_s:
            raise TemplateError(f"it takes over {seconds:g} s")
        return trace

    sys.settrace(trace)
    try:
        return work()
    finally:
        sys.settrace(before)
