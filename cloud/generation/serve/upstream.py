"""A replica that is a server with OpenAI's interface: somebody else's, or one of ours.

Where the fields of others differ from ours, the difference ends here. How requests reach the server is the carrier's
matter (``carrier.py``).
"""

import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from typing import Any, Final
from urllib.parse import urlsplit

from isthmus.cloud.generation.serve.carrier import Carrier, HttpCarrier, Lost, Response
from isthmus.proto.errors import InvalidInput, IsthmusError, TooLate, Unavailable

MAX_EVENT_BYTES: Final = 1 << 20
MOVES: Final = "/isthmus/moves"
MOVE_S: Final = 20.0
"""One exchange of a move may take so long."""
MAX_MOVED_BYTES: Final = 1 << 30
_MOST_MESSAGE_CHARS: Final = 300


class Upstream:
    """One server. ``model`` None: the one model that it lists is asked for at first use.

    ``move_key`` is for a replica of ours, whose requests can be moved (``relocation.py``).
    ``url`` is the server's address with or without ``/v1``. Raises InvalidInput for another kind of address. With a
    ``carrier``, it is a replica that this server runs itself, and ``url`` its name; such a one is sent the wishes that
    are our own, too (``own``). Call ``close`` once, on the loop that used it.
    """

    def __init__(
        self,
        url: str,
        *,
        key: str | None = None,
        model: str | None = None,
        move_key: str | None = None,
        carrier: Carrier | None = None,
    ) -> None:
        self.own = carrier is not None
        self.url = url if carrier is not None else _address(url)
        self._carrier = carrier or HttpCarrier(self.url)
        self._headers = {} if key is None else {"authorization": f"Bearer {key}"}
        self._move_headers = None if move_key is None else {"authorization": f"Bearer {move_key}"}
        self._model = model

    async def model(self) -> str:
        """Returns the name of the server's model. Raises Lost, or InvalidInput if it lists several."""
        if self._model is None:
            try:
                exchange = self._carrier.exchange("GET", "/v1/models", headers=self._headers, body=None)
                async with exchange as response:
                    body = await _body(response)
                names = [str(each["id"]) for each in json.loads(body)["data"]]
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise Lost(f"{self.url} does not list its models as OpenAI's interface does") from error
            if len(names) != 1:
                raise InvalidInput(f"{self.url} serves {len(names)} models; name one with --upstream-model")
            (self._model,) = names
        return self._model

    async def stream(self, path: str, body: Mapping[str, Any]) -> AsyncGenerator[tuple[str, Mapping[str, Any]]]:
        """Yields (text, event) of a streamed answer; the last event has the usage, if the server sends it.

        Raises Lost if the server fails, also in the middle of an answer; and InvalidInput, with the server's words, if
        it refuses the request for what is in it.
        """
        whole = {**body, "model": await self.model(), "stream": True, "stream_options": {"include_usage": True}}
        headers = {**self._headers, "content-type": "application/json"}
        async with aclosing(self._streamed(path, json.dumps(whole).encode(), headers)) as events:
            async for found in events:
                yield found

    async def _streamed(
        self, path: str, body: bytes, headers: Mapping[str, str]
    ) -> AsyncGenerator[tuple[str, Mapping[str, Any]]]:
        try:
            async with self._carrier.exchange("POST", path, headers=headers, body=body) as response:
                if response.status != 200:
                    raise _refusal(self.url, response.status, await _body(response), own=self.own)
                async for event in _events(response):
                    if "error" in event:
                        raise Lost(f"{self.url} failed in the middle of an answer")
                    yield _text(event), event
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise Lost(f"{self.url} sent what is not OpenAI's interface") from error

    @property
    def movable(self) -> bool:
        """Whether requests can be moved from and to this replica."""
        return self._move_headers is not None

    async def costs(self) -> Mapping[str, Any]:
        """Returns what a move to this replica costs. Raises Lost."""
        try:
            found = json.loads(await self._moved("GET", "/costs"))
        except (ValueError, RecursionError) as error:
            raise Lost(f"{self.url} does not say what a move costs") from error
        if not isinstance(found, dict):
            raise Lost(f"{self.url} does not say what a move costs")
        return found

    async def part(self, name: str) -> bytes:
        """Returns what is computed of a request by now, which goes on. Raises Lost."""
        return await self._moved("GET", f"/requests/{name}/part")

    async def leave(self, name: str, first: int | None) -> bytes:
        """Stops a request, and returns its state with what was computed from token ``first`` on. Raises Lost."""
        asked = "" if first is None else f"?first={first}"
        return await self._moved("POST", f"/requests/{name}/leave{asked}")

    async def stay(self, name: str) -> None:
        """Lets a request that left go on. Raises Lost."""
        await self._moved("POST", f"/requests/{name}/stay")

    async def keep_part(self, handle: str, part: bytes) -> None:
        """Sends what was computed of a request that will arrive. Raises Lost."""
        await self._moved("PUT", f"/parts/{handle}", part)

    async def arrive(self, handle: str, body: bytes, form: str) -> AsyncGenerator[tuple[str, Mapping[str, Any]]]:
        """Goes on with a request that left another replica, and yields its events, as ``stream`` does. Raises Lost."""
        path = f"{MOVES}/arrivals/{handle}?form={form}"
        async with aclosing(self._streamed(path, body, self._move_headers or {})) as events:
            async for found in events:
                yield found

    async def _moved(self, method: str, path: str, body: bytes | None = None) -> bytes:
        exchange = self._carrier.exchange(
            method, f"{MOVES}{path}", headers=self._move_headers or {}, body=body, within_s=MOVE_S
        )
        try:
            async with exchange as response:
                found = await _body(response, MAX_MOVED_BYTES)
                if response.status not in (200, 204):
                    raise Lost(f"{self.url} moves nothing: status {response.status}")
                return found
        except ValueError as error:
            raise Lost(f"{self.url} failed in a move: {error}") from error

    async def close(self) -> None:
        await self._carrier.close()


def _address(url: str) -> str:
    """Returns the address without ``/v1``. Raises InvalidInput."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise InvalidInput(f"upstream {url[:128]!r}: must be http://HOST:PORT or https://HOST:PORT")
    if parts.username is not None or parts.password is not None:
        raise InvalidInput("upstream: give the key in a file, not in the address")
    return url.rstrip("/").removesuffix("/v1")


async def _body(response: Response, limit_bytes: int = MAX_EVENT_BYTES) -> bytes:
    """Returns the body. Raises ValueError if it is longer than ``limit_bytes``."""
    found = bytearray()
    async for chunk in response.chunks():
        found += chunk
        if len(found) > limit_bytes:
            raise ValueError("too long")
    return bytes(found)


async def _events(response: Response) -> AsyncIterator[dict[str, Any]]:
    """Yields the JSON of each server-sent event. Raises Lost if the stream ends before its end mark."""
    held = b""
    async for chunk in response.chunks():
        *lines, held = (held + chunk).split(b"\n")
        if len(held) > MAX_EVENT_BYTES:
            raise ValueError("an event is too long")
        for line in lines:
            data = line.strip().removeprefix(b"data:").strip() if line.startswith(b"data:") else b""
            if data == b"[DONE]":
                return
            if data:
                event = json.loads(data)
                if not isinstance(event, dict):
                    raise ValueError("an event is no object")
                yield event
    raise Lost("the answer broke off")


def _text(event: Mapping[str, Any]) -> str:
    return "".join(
        (choice["delta"].get("content") or "") if "delta" in choice else str(choice.get("text") or "")
        for choice in event.get("choices") or ()
    )


def reason_of(event: Mapping[str, Any]) -> str | None:
    """Returns why the answer ended, if this event says so."""
    return next((str(each["finish_reason"]) for each in event.get("choices") or () if each.get("finish_reason")), None)


def cached_tokens(usage: Mapping[str, Any]) -> int:
    """Returns how many tokens of the prompt the replica did not compute, by its ``usage``; 0 if it does not say so."""
    details = usage.get("prompt_tokens_details")
    found = details.get("cached_tokens") if isinstance(details, dict) else None
    return found if isinstance(found, int) and found >= 0 else 0


def _refusal(url: str, status: int, body: bytes, *, own: bool) -> IsthmusError:
    """Returns the error of a response that is no answer. The server's words are passed on, bounded and printable."""
    try:
        error = json.loads(body)["error"]
        words = str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError, RecursionError):
        words = ""
    words = "".join(letter for letter in words if letter.isprintable())[:_MOST_MESSAGE_CHARS]
    if status in (400, 413, 422):
        return InvalidInput(f"the replica refuses the request: {words or f'status {status}'}")
    if own and status == 504:
        return TooLate(words or "could not be answered in time")
    if status in (401, 403):
        return Unavailable("the server's own access to a replica was refused; tell its operator")
    return Lost(f"{url} answered with status {status}", full=status in (429, 503))
