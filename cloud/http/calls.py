"""Around each HTTP call: the key, bounds on the body, errors as JSON, who has left, and who reads nothing."""

import asyncio
import json
import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from isthmus.cloud import logs
from isthmus.cloud.identity import asking, same_secret
from isthmus.cloud.store.tenants import DEFAULT
from isthmus.cloud.tenants.roster import Roster
from isthmus.proto.errors import (
    Busy,
    Internal,
    InvalidInput,
    IsthmusError,
    NotYours,
    TooLarge,
    TooLate,
    Unauthenticated,
    Unavailable,
)

log = logging.getLogger(__name__)

MAX_BODY_BYTES: Final = 1 << 20
BODY_S: Final = 20.0
"""A body that has not arrived by then is refused."""
UNREAD_S: Final = 60.0
"""A client that reads nothing for so long is given up, and its request with it."""
_STATUS: Final[tuple[tuple[type[IsthmusError], int, str], ...]] = (
    (Unauthenticated, 401, "authentication_error"),
    (NotYours, 404, "not_found_error"),
    (TooLarge, 413, "invalid_request_error"),
    (InvalidInput, 400, "invalid_request_error"),
    (Busy, 429, "rate_limit_error"),
    (TooLate, 504, "timeout_error"),
    (Unavailable, 503, "server_error"),
)

T = TypeVar("T")
Handler = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True)
class Door:
    """Who may ask over HTTP. With ``key``, clients send it as "Authorization: Bearer KEY".

    With ``roster``, the keys of tenants fit too. A call then counts to its tenant, and so do the bytes of its body.
    """

    key: str | None = None
    roster: Roster | None = None

    def enter(self, request: Request) -> None:
        """Find out whose call it is. Raises Unauthenticated, and Busy beyond the tenant's quota."""
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        given = given if scheme.lower() == "bearer" else ""
        if self.roster is not None:
            tenant = asking(self.roster, self.key, given).tenant
            self.roster.admit(tenant)
            logs.TENANT.set(tenant)
        elif self.key is not None and not same_secret(given, self.key):
            raise Unauthenticated("the API key is missing or wrong; ask the operator for it")

    def admit(self, amount: int) -> None:
        """Count what the call has beyond one query, such as further images. Raises Busy."""
        if self.roster is not None:
            self.roster.admit(tenant(), amount)

    def spend(self, count: int) -> None:
        """Count bytes of the call's body. Raises Busy."""
        if self.roster is not None:
            self.roster.spend(tenant(), count)


def tenant() -> str:
    """Return the tenant of the present call."""
    return logs.TENANT.get() or DEFAULT


def guarded(handler: Handler, door: Door | None, refusal: Callable[[IsthmusError], Response] | None = None) -> Handler:
    """Returns a handler that first asks who calls (None: anybody may), and answers errors of ours with their status.

    ``refusal`` writes an error as the clients of the handler expect it; None: as OpenAI's do.
    """
    refused = error_response if refusal is None else refusal

    async def call(request: Request) -> Response:
        try:
            if door is not None:
                door.enter(request)
            return await handler(request)
        except ClientDisconnect:
            return Response(status_code=499)  # nobody reads it
        except IsthmusError as error:
            return refused(error)
        except Exception as error:
            reference = secrets.token_hex(4)
            log.error("%s failed (reference %s)", request.url.path, reference, exc_info=error)
            return refused(Internal(f"the server failed; tell its operator reference {reference}"))

    return call


def error_response(error: IsthmusError) -> Response:
    """Returns the error as OpenAI's clients expect it."""
    return JSONResponse(wire_error(error), *status_of(error))


def status_of(error: IsthmusError) -> tuple[int, dict[str, str]]:
    """Returns the error's status and headers. ``x-should-retry`` says whether a retry helps."""
    status = next((status for kind, status, _ in _STATUS if isinstance(error, kind)), 500)
    headers = {"x-should-retry": "true" if error.retryable else "false"}
    if isinstance(error, Busy):
        headers["retry-after"] = f"{error.retry_after_s or 1:.0f}"
    return status, headers


def wire_error(error: IsthmusError) -> dict[str, Any]:
    """Returns the error's JSON; ``param`` is the field that the message begins with."""
    kind = next((name for of, _, name in _STATUS if isinstance(error, of)), "server_error")
    field, colon, _ = str(error).partition(": ")
    param = field if colon and isinstance(error, (InvalidInput, NotYours)) and field.isidentifier() else None
    return {"error": {"message": str(error), "type": kind, "param": param, "code": type(error).__name__}}


async def body_of(request: Request, door: Door) -> Any:
    """Returns the JSON of the body. Raises TooLarge, Busy, TooLate or InvalidInput, before memory is taken."""
    return parsed(await bytes_of(request, MAX_BODY_BYTES, door))


async def bytes_of(request: Request, limit_bytes: int, door: Door) -> bytearray:
    """Returns the body, whose bytes count to the caller's tenant. Raises TooLarge and Busy before memory is taken, and
    TooLate."""
    length = request.headers.get("content-length", "0")
    if not length.isdecimal() or int(length) > limit_bytes:
        raise TooLarge(f"the body may have at most {limit_bytes} bytes")
    door.spend(int(length))
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_S):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit_bytes:
                    raise TooLarge(f"the body may have at most {limit_bytes} bytes")
        if len(body) > int(length):  # A client that did not say how many will come.
            door.spend(len(body) - int(length))
    except TimeoutError as error:
        raise TooLate(f"the body did not arrive within {BODY_S:g} s") from error
    return body


def parsed(body: bytes | bytearray) -> Any:
    """Returns the value of a JSON text. Raises InvalidInput."""
    try:
        return json.loads(body.decode(), parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise InvalidInput("the body is not UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise InvalidInput("the body is not JSON, or nested too deeply") from error


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


async def with_disconnect(request: Request, work: Awaitable[T]) -> T:
    """Returns what ``work`` returns, or raises ClientDisconnect and cancels it as soon as the client has left."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.create_task(_left(request.receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events. ``on_end`` is called once, when the events have ended or nobody reads them any more."""

    def __init__(self, events: AsyncIterator[str], on_end: Callable[[], None]) -> None:
        super().__init__(headers={"cache-control": "no-store"}, media_type="text/event-stream")
        del self.headers["content-length"]
        self._events = events
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.create_task(self._send_all(send))
        leaving = asyncio.create_task(_left(receive))
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._on_end()
            for task in (sending, leaving):
                task.cancel()
            await asyncio.gather(sending, leaving, return_exceptions=True)
        if not sending.cancelled() and isinstance(sending.exception(), TimeoutError):
            log.info("a client read nothing for %g s; its request was given up", UNREAD_S)

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with aclosing(self._events):  # type: ignore[type-var]
            async for event in self._events:
                async with asyncio.timeout(UNREAD_S):
                    await send({"type": "http.response.body", "body": f"data: {event}\n\n".encode(), "more_body": True})
        with suppress(OSError):
            await send({"type": "http.response.body", "body": b"", "more_body": False})
