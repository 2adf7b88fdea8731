"""A replica that is somebody else's server: any server with OpenAI's interface, over HTTP.

Where its fields differ from ours, the difference ends here. What such a server sends is bounded before it is kept, and
it cannot send a client's text on to an address that the operator did not name: redirects are not followed.
"""

import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from typing import Any, Final
from urllib.parse import urlsplit

import aiohttp

from isthmus.proto.errors import InvalidInput, IsthmusError, Unavailable

MAX_EVENT_BYTES: Final = 1 << 20
CONNECT_S: Final = 5.0
SILENT_S: Final = 60.0
"""A replica that sends nothing for so long has failed."""
MOVES: Final = "/isthmus/moves"
MOVE_S: Final = 20.0
"""One exchange of a move may take so long."""
MAX_MOVED_BYTES: Final = 1 << 30
_MOST_MESSAGE_CHARS: Final = 300


class Lost(IsthmusError):
    """The replica failed or cannot be reached. ``full``: it is alive and refused this request for now."""

    def __init__(self, message: str, *, full: bool = False) -> None:
        super().__init__(message)
        self.full = full


class Upstream:
    """One server. ``model`` None: the one model that it lists is asked for at first use.

    ``move_key`` is for a replica of ours, whose requests can be moved (``relocation.py``).
    ``url`` is the server's address with or without ``/v1``. Raises InvalidInput for another kind of address. Call
    ``close`` once, on the loop that used it.
    """

    def __init__(
        self, url: str, *, key: str | None = None, model: str | None = None, move_key: str | None = None
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise InvalidInput(f"upstream {url[:128]!r}: must be http://HOST:PORT or https://HOST:PORT")
        if parts.username is not None or parts.password is not None:
            raise InvalidInput("upstream: give the key in a file, not in the address")
        self.url = url.rstrip("/").removesuffix("/v1")
        self._headers = {} if key is None else {"authorization": f"Bearer {key}"}
        self._move_headers = None if move_key is None else {"authorization": f"Bearer {move_key}"}
        self._model = model
        self._session: aiohttp.ClientSession | None = None

    async def model(self) -> str:
        """Returns the name of the server's model. Raises Lost, or InvalidInput if it lists several."""
        if self._model is None:
            try:
                async with self._opened().get(f"{self.url}/v1/models", allow_redirects=False) as response:
                    body = await _body(response)
                names = [str(each["id"]) for each in json.loads(body)["data"]]
            except (aiohttp.ClientError, OSError, TimeoutError) as error:
                raise Lost(f"{self.url} cannot be reached: {type(error).__name__}") from error
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
        async with aclosing(self._streamed(path, json=whole)) as events:
            async for found in events:
                yield found

    async def _streamed(self, path: str, **sent: Any) -> AsyncGenerator[tuple[str, Mapping[str, Any]]]:
        try:
            async with self._opened().post(f"{self.url}{path}", allow_redirects=False, **sent) as response:
                if response.status != 200:
                    raise _refusal(self.url, response.status, await _body(response))
                async for event in _events(response):
                    if "error" in event:
                        raise Lost(f"{self.url} failed in the middle of an answer")
                    yield _text(event), event
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise Lost(f"{self.url} failed: {type(error).__name__}") from error
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
        async with aclosing(self._streamed(path, data=body, headers=self._move_headers)) as events:
            async for found in events:
                yield found

    async def _moved(self, method: str, path: str, body: bytes | None = None) -> bytes:
        url, timeout = f"{self.url}{MOVES}{path}", aiohttp.ClientTimeout(total=MOVE_S)
        try:
            async with self._opened().request(
                method, url, data=body, headers=self._move_headers, timeout=timeout, allow_redirects=False
            ) as response:
                found = await _body(response, MAX_MOVED_BYTES)
                if response.status not in (200, 204):
                    raise Lost(f"{self.url} moves nothing: status {response.status}")
                return found
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            raise Lost(f"{self.url} failed in a move: {type(error).__name__}") from error

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    def _opened(self) -> aiohttp.ClientSession:
        if self._session is None:
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=SILENT_S)
            self._session = aiohttp.ClientSession(
                headers=self._headers,
                timeout=timeout,
                connector=aiohttp.TCPConnector(limit=0),
                read_bufsize=MAX_EVENT_BYTES // 4,
                trust_env=False,
            )
        return self._session


async def _body(response: aiohttp.ClientResponse, limit_bytes: int = MAX_EVENT_BYTES) -> bytes:
    """Returns the body. Raises ValueError if it is longer than ``limit_bytes``."""
    found = bytearray()
    async for chunk in response.content.iter_any():
        found += chunk
        if len(found) > limit_bytes:
            raise ValueError("too long")
    return bytes(found)


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    """Yields the JSON of each server-sent event. Raises Lost if the stream ends before its end mark."""
    held = b""
    async for chunk in response.content.iter_any():
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


def _refusal(url: str, status: int, body: bytes) -> IsthmusError:
    """Returns the error of a response that is no answer. The server's words are passed on, bounded and printable."""
    try:
        error = json.loads(body)["error"]
        words = str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError, RecursionError):
        words = ""
    words = "".join(letter for letter in words if letter.isprintable())[:_MOST_MESSAGE_CHARS]
    if status in (400, 413, 422):
        return InvalidInput(f"the replica refuses the request: {words or f'status {status}'}")
    if status in (401, 403):
        return Unavailable("the server's own access to a replica was refused; tell its operator")
    return Lost(f"{url} answered with status {status}", full=status in (429, 503))
