"""How a request reaches a server with OpenAI's interface: over HTTP here, and in other ways for replicas of our own.

What a server sends is bounded before it is kept, and it cannot send a client's text on to an address that the operator
did not name: redirects are not followed.
"""

from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Final, Protocol

import aiohttp

from isthmus.proto.errors import IsthmusError

CONNECT_S: Final = 5.0
SILENT_S: Final = 60.0
"""A server that sends nothing for so long has failed."""
_READ_BYTES: Final = 1 << 18


class Lost(IsthmusError):
    """The replica failed or cannot be reached. ``full``: it refused this request for now, or is being started."""

    def __init__(self, message: str, *, full: bool = False) -> None:
        super().__init__(message)
        self.full = full


class Response(Protocol):
    """A response whose status is known, and whose body may still come."""

    @property
    def status(self) -> int: ...

    def chunks(self) -> AsyncIterator[bytes]:
        """Yields the body as it comes. Raises Lost if the server fails."""


class Carrier(Protocol):
    """Carries requests to one server. ``close`` it once, on the loop that used it."""

    def exchange(
        self, method: str, path: str, *, headers: Mapping[str, str], body: bytes | None, within_s: float | None = None
    ) -> AbstractAsyncContextManager[Response]:
        """Sends a request, waits for the status, and gives the request up when the block ends. Raises Lost.

        ``within_s``: the time for all of it. Without one, only silence ends it.
        """

    async def close(self) -> None: ...


class HttpCarrier:
    """Over HTTP, to the server at ``url``, such as http://127.0.0.1:8001."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._session: aiohttp.ClientSession | None = None

    @asynccontextmanager
    async def exchange(
        self, method: str, path: str, *, headers: Mapping[str, str], body: bytes | None, within_s: float | None = None
    ) -> AsyncIterator[Response]:
        timeout = aiohttp.ClientTimeout(total=within_s, sock_connect=CONNECT_S, sock_read=SILENT_S)
        try:
            found = await self._opened().request(
                method, f"{self._url}{path}", data=body, headers=headers, timeout=timeout, allow_redirects=False
            )
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise Lost(f"{self._url} cannot be reached: {type(error).__name__}") from error
        try:
            yield _HttpResponse(self._url, found)
        finally:
            found.close()

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    def _opened(self) -> aiohttp.ClientSession:
        if self._session is None:
            connector = aiohttp.TCPConnector(limit=0)
            self._session = aiohttp.ClientSession(connector=connector, read_bufsize=_READ_BYTES, trust_env=False)
        return self._session


class _HttpResponse:
    def __init__(self, url: str, response: aiohttp.ClientResponse) -> None:
        self._url, self._response = url, response

    @property
    def status(self) -> int:
        return self._response.status

    async def chunks(self) -> AsyncIterator[bytes]:
        try:
            async for chunk in self._response.content.iter_any():
                yield chunk
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise Lost(f"{self._url} failed: {type(error).__name__}") from error
