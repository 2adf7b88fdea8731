"""The OpenAI-compatible front of generation: chat completions, completions, models; whole or streamed (SSE).

Both kinds of requests are mapped to the same plain values (``Wishes``). A field that is not served is refused by name,
so no client believes that it had an effect. The official ``openai`` client works unchanged.
"""

import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from isthmus.cloud.generation.scheduling.request import Sampling
from isthmus.cloud.generation.serve.emotion import TEMPLATE, Emotion
from isthmus.cloud.generation.serve.live import Done, Piece
from isthmus.cloud.generation.serve.serving import Answer, Answering, Wishes
from isthmus.cloud.http.calls import Door, EventStream, body_of, guarded, tenant, wire_error, with_disconnect
from isthmus.cloud.tenants.names import owner
from isthmus.proto.errors import InvalidInput, IsthmusError, NotYours

if TYPE_CHECKING:  # it imports torch
    from isthmus.cloud.generation.serve.moving import Moves

_WISHES: Final = ("max_tokens", "temperature", "top_p", "seed", "stop", "user", "stream", "stream_options")
_OWN: Final = ("kind", "cache_salt", "ttft_s", "tpot_s", "latency_s", "utility")
_CHAT: Final = frozenset({"model", "messages", "max_completion_tokens", "emotion", *_WISHES, *_OWN})
_TEXT: Final = frozenset({"model", "prompt", *_WISHES, *_OWN})
_NEUTRAL: Final[Mapping[str, tuple[Any, ...]]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "store": (False,),
    "suffix": ("",),
    "tools": ([],),
    "response_format": ({"type": "text"},),
    "metadata": ({},),
}
"""Fields that clients send with the value that changes nothing. Another value is refused by name."""
_MAX_USER_CHARS: Final = 128


@dataclass(frozen=True)
class _Form:
    """How an answer is written in one of the two interfaces."""

    prefix: str
    whole: str
    part: str
    whole_choice: Callable[[str, str], dict[str, Any]]
    part_choice: Callable[[str | None, str | None], dict[str, Any]]


def _chat_delta(text: str | None, reason: str | None) -> dict[str, Any]:
    delta = {} if text is None else {"content": text}
    return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}


_CHAT_FORM: Final = _Form(
    "chatcmpl",
    "chat.completion",
    "chat.completion.chunk",
    lambda text, reason: {
        "index": 0,
        "message": {"role": "assistant", "content": text, "refusal": None},
        "logprobs": None,
        "finish_reason": reason,
    },
    _chat_delta,
)
_TEXT_FORM: Final = _Form(
    "cmpl",
    "text_completion",
    "text_completion",
    lambda text, reason: {"index": 0, "text": text, "logprobs": None, "finish_reason": reason},
    lambda text, reason: {"index": 0, "text": text or "", "logprobs": None, "finish_reason": reason},
)


def openai_app(
    generation: Answering, door: Door, *, moves: "Moves | None" = None, move_key: str | None = None
) -> Starlette:
    """Returns the application. Clients send a key of ``door`` as their API key.

    With ``moves`` and ``move_key``, a front that has the latter may move requests to other replicas (``moving.py``).
    """

    async def chat(request: Request) -> Response:
        asked = _fields(await body_of(request, door), _CHAT)
        _check_model(generation, asked)
        if asked.get("max_tokens") is not None and asked.get("max_completion_tokens") is not None:
            raise InvalidInput("max_tokens: give it or max_completion_tokens, not both")
        if asked.get("max_completion_tokens") is not None:
            asked["max_tokens"] = asked["max_completion_tokens"]
        wishes = _wishes(asked)
        reply = await generation.chat(_messages(asked), wishes)
        return await _answer(request, generation, reply, asked, _CHAT_FORM, wishes.emotion, moves)

    async def complete(request: Request) -> Response:
        asked = _fields(await body_of(request, door), _TEXT)
        _check_model(generation, asked)
        prompt = asked.get("prompt")
        if isinstance(prompt, list) and len(prompt) == 1:
            (prompt,) = prompt
        if not isinstance(prompt, str):
            raise InvalidInput("prompt: must be one text")
        reply = await generation.complete(prompt, _wishes(asked))
        return await _answer(request, generation, reply, asked, _TEXT_FORM, None, moves)

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [_model(generation)]})

    async def model(request: Request) -> Response:
        if request.path_params["name"] != generation.name:
            raise NotYours("there is no such model; /v1/models lists what is served")
        return JSONResponse(_model(generation))

    async def health(request: Request) -> Response:
        return Response(status_code=200 if generation.ready else 503)

    async def nothing_here(request: Request) -> Response:
        raise NotYours("no such path; served are /v1/chat/completions, /v1/completions and /v1/models")

    async def arrived(request: Request, reply: Answer, form: str) -> Response:
        asked = {"stream": True, "stream_options": {"include_usage": True}}
        written = _CHAT_FORM if form == "chat" else _TEXT_FORM
        return await _answer(request, generation, reply, asked, written, None, moves)

    between: list[Route] = []
    if moves is not None and move_key is not None:
        from isthmus.cloud.http.moving import move_routes

        between = move_routes(moves, move_key, arrived)
    return Starlette(
        routes=[
            *between,
            Route("/v1/chat/completions", guarded(chat, door), methods=["POST"]),
            Route("/v1/completions", guarded(complete, door), methods=["POST"]),
            Route("/v1/models", guarded(models, door)),
            Route("/v1/models/{name:path}", guarded(model, door)),
            Route("/health", health),
            Route("/{rest:path}", guarded(nothing_here, door), methods=["GET", "POST", "PUT", "PATCH", "DELETE"]),
        ]
    )


def _model(generation: Answering) -> dict[str, Any]:
    return {"id": generation.name, "object": "model", "created": int(generation.created_s), "owned_by": "isthmus"}


def _check_model(generation: Answering, asked: Mapping[str, Any]) -> None:
    if asked.get("model") != generation.name:
        raise NotYours(f"model: only {generation.name!r} is served")


def _fields(body: Any, known: frozenset[str]) -> dict[str, Any]:
    """Returns the fields that are used. Raises InvalidInput naming one that is not."""
    if not isinstance(body, dict):
        raise InvalidInput("the body must be a JSON object")
    for name, value in body.items():
        if name in known or value is None:
            continue
        if name not in _NEUTRAL:
            raise InvalidInput(f"{name[:64]}: this field is not supported")
        if value not in _NEUTRAL[name]:
            raise InvalidInput(f"{name}: only {json.dumps(_NEUTRAL[name][0])} is supported")
    return {name: value for name, value in body.items() if name in known and value is not None}


def _messages(asked: Mapping[str, Any]) -> list[dict[str, str]]:
    raw = asked.get("messages")
    if not isinstance(raw, list) or not all(isinstance(each, dict) for each in raw):
        raise InvalidInput("messages: must be a list of objects with role and content")
    found = []
    for each in raw:
        further = each.keys() - {"role", "content", "name"}
        if further:
            raise InvalidInput(f"messages: the field {min(further)[:64]!r} is not supported")
        content = each.get("content")
        if isinstance(content, list):
            content = _text_of(content)
        role = "system" if each.get("role") == "developer" else each.get("role")
        if not isinstance(content, str) or not isinstance(role, str):
            raise InvalidInput("messages: role and content must be texts")
        found.append({"role": role, "content": content})
    return found


def _text_of(parts: list[Any]) -> str:
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise InvalidInput("messages: only parts of the type 'text' are supported")
    return "".join(part["text"] for part in parts)


def _wishes(asked: Mapping[str, Any]) -> Wishes:
    stops = asked.get("stop", [])
    stops = [stops] if isinstance(stops, str) else stops
    if not isinstance(stops, list) or not all(isinstance(each, str) for each in stops):
        raise InvalidInput("stop: must be a text or a list of texts")
    names = {name: asked.get(name, "") for name in ("user", "kind", "cache_salt")}
    for name, value in names.items():
        if not isinstance(value, str) or len(value) > _MAX_USER_CHARS:
            raise InvalidInput(f"{name}: must be a text of at most {_MAX_USER_CHARS} characters")
    seed = _whole(asked, "seed")
    return Wishes(
        max_tokens=_whole(asked, "max_tokens"),
        sampling=Sampling(
            temperature=_number(asked, "temperature", 1.0),
            top_p=_number(asked, "top_p", 1.0),
            seed=secrets.randbits(63) if seed is None else seed,
        ),
        stops=tuple(stops),
        user=names["user"],
        kind=names["kind"],
        salt=names["cache_salt"],
        tenant=owner(tenant()),
        ttft_s=_number(asked, "ttft_s", None),
        tpot_s=_number(asked, "tpot_s", None),
        latency_s=_number(asked, "latency_s", None),
        utility=_number(asked, "utility", 1.0),
        emotion=Emotion.asked(asked["emotion"]) if "emotion" in asked else None,
    )


def _number(asked: Mapping[str, Any], name: str, default: Any) -> Any:
    value = asked.get(name, default)
    if value is default:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > 1e12:
        raise InvalidInput(f"{name}: must be a number")
    return float(value)


def _whole(asked: Mapping[str, Any], name: str) -> int | None:
    value = asked.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not -(1 << 63) <= value < 1 << 63:
        raise InvalidInput(f"{name}: must be a whole number")
    return value


async def _answer(
    request: Request,
    generation: Answering,
    reply: Answer,
    asked: Mapping[str, Any],
    form: _Form,
    emotion: Emotion | None,
    moves: "Moves | None",
) -> Response:
    head = {"id": f"{form.prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": generation.name}
    used = {} if emotion is None else _used(emotion)
    streams = asked.get("stream", False)
    options = asked.get("stream_options", {})
    try:
        if not isinstance(streams, bool):
            raise InvalidInput("stream: must be true or false")
        if not isinstance(options, dict) or options.keys() - {"include_usage", "include_obfuscation"}:
            raise InvalidInput("stream_options: only include_usage is supported")
        if not streams:
            return await with_disconnect(request, _whole_answer(reply, head, form, used))
        # The first item is awaited before the response begins, so that a refusal has its own status.
        items = aiter(reply)
        first = await with_disconnect(request, anext(items))
        events = _events(first, items, head, form, used, with_usage=bool(options.get("include_usage")))
        return EventStream(events, _named(str(head["id"]), reply, moves))
    except BaseException:
        reply.cancel()
        raise


def _named(name: str, reply: Answer, moves: "Moves | None") -> Callable[[], None]:
    """Lets a front move the request by the name that the client is told. Returns what ends both."""
    if moves is None or reply.id is None:
        return reply.cancel
    moves.name(name, reply.id)

    def end() -> None:
        reply.cancel()
        moves.forget(name)

    return end


def _used(emotion: Emotion) -> dict[str, Any]:
    """Returns what of the user's state entered the prompt, and by which template."""
    said = bool(emotion.said)
    return {
        "emotion": {"class": emotion.name, "probability": emotion.probability, "template": TEMPLATE if said else ""}
    }


async def _whole_answer(reply: Answer, head: Mapping[str, Any], form: _Form, used: Mapping[str, Any]) -> Response:
    text, done = [], None
    async for item in reply:
        if isinstance(item, Piece):
            text.append(item.text)
        else:
            done = item
    assert done is not None, "an answer ends with Done"
    choice = form.whole_choice("".join(text), done.reason)
    return JSONResponse({**head, "object": form.whole, "choices": [choice], **_sums(done, used)})


async def _events(
    first: Piece | Done,
    items: AsyncIterator[Piece | Done],
    head: Mapping[str, Any],
    form: _Form,
    used: Mapping[str, Any],
    *,
    with_usage: bool,
) -> AsyncIterator[str]:
    """Yields the data of each event. An error after the beginning becomes an event of its own."""

    def event(choices: list[dict[str, Any]], **further: Any) -> str:
        return json.dumps({**head, "object": form.part, "choices": choices, **further}, ensure_ascii=False)

    usage: dict[str, Any] = {"usage": None} if with_usage else {}
    if form is _CHAT_FORM:
        opening = {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        yield event([opening], **usage)
    item: Piece | Done | None = first
    try:
        while isinstance(item, Piece):
            if item.text:
                yield event([form.part_choice(item.text, None)], **usage)
            item = await anext(items, None)
        assert isinstance(item, Done), "an answer ends with Done"
        sums = _sums(item, used)
        yield event([form.part_choice(None, item.reason)], **usage, isthmus=sums["isthmus"])
        if with_usage:
            yield event([], usage=sums["usage"])
    except IsthmusError as error:
        yield json.dumps(wire_error(error))
        return
    yield "[DONE]"


def _sums(done: Done, used: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "usage": {
            "prompt_tokens": done.prompt_tokens,
            "completion_tokens": done.tokens,
            "total_tokens": done.prompt_tokens + done.tokens,
            "prompt_tokens_details": {"cached_tokens": done.shared_tokens},
        },
        # Our own: how the request ended, and its times.
        "isthmus": {
            "outcome": done.outcome.value,
            "in_time": done.in_time,
            "queue_s": round(done.queue_s, 6),
            "ttft_s": round(done.ttft_s, 6),
            "total_s": round(done.total_s, 6),
            **used,
        },
    }
