"""The gate in front of a page: it lets in only requests that know the token and name this machine.

The token is the first part of every path, so each link and each file of the page carries it. A cookie would be sent to
other servers on this machine too, because cookies do not distinguish ports.
"""

import hmac
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

MOST_BODY_BYTES: Final = 64 << 10

_LOOPBACK: Final = ("127.0.0.1", "localhost", "[::1]")

HEADERS: Final = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; media-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
    "cache-control": "no-store",
}

OWN_HEADERS: Final = {
    # The student in the browser is a document of its own, so that the page itself can open neither camera nor
    # microphone. Before it opens them it forbids itself every connection. The student's worker never has one.
    "/browser.html": {"permissions-policy": "camera=(self), microphone=(self), geolocation=()"},
    "/student.js": {"content-security-policy": "default-src 'none'; script-src 'wasm-unsafe-eval'"},
}
"""What differs from ``HEADERS`` in the answers to some paths."""


class Gate:
    """An ASGI application that passes sound requests on to ``app``, without the token in their path.

    ``port``: the one on which the page is served; a request must name it and this machine in its Host header, which a
    page of another site that has its name point here (DNS rebinding) cannot. A request that changes something must come
    from the page itself.
    """

    def __init__(self, app: App, token: str, port: int) -> None:
        self._app = app
        self._token = token.encode()
        self._hosts = {f"{host}:{port}" for host in _LOOPBACK} | ({*_LOOPBACK} if port == 80 else set())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return  # No WebSocket is offered; uvicorn refuses it.
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        refusal = self._refusal(scope, headers)
        if refusal is not None:
            await _refuse(send, *refusal)
            return
        _, _, rest = scope["path"][1:].partition("/")
        passed = {**scope, "path": f"/{rest}", "raw_path": None, "root_path": ""}
        await self._app(passed, _bounded(receive), _guarded(send, {**HEADERS, **OWN_HEADERS.get(passed["path"], {})}))

    def _refusal(self, scope: Scope, headers: dict[str, str]) -> tuple[int, str] | None:
        if headers.get("host", "").lower() not in self._hosts:
            return 421, "This page answers only under the address that the command printed."
        given, slash, _ = scope["path"][1:].partition("/")
        if not hmac.compare_digest(given.encode(), self._token) or not slash:
            return 403, "The address needs the token that the command printed: open the whole address."
        if scope["method"] in ("GET", "HEAD"):
            return None
        if scope["method"] != "POST":
            return 405, "This page knows GET and POST."
        origin = headers.get("origin")
        if (origin is not None and origin.partition("://")[2].lower() not in self._hosts) or headers.get(
            "sec-fetch-site", "same-origin"
        ) != "same-origin":
            return 403, "Only the page itself may change something."
        if headers.get("content-type", "").partition(";")[0] != "application/json":
            return 415, "A request is JSON."
        length = headers.get("content-length", "")
        if not length.isdigit() or int(length) > MOST_BODY_BYTES:
            return 413, f"A request has at most {MOST_BODY_BYTES} bytes, and says how many."
        return None


async def _refuse(send: Send, status: int, text: str) -> None:
    body = text.encode()
    headers = {**HEADERS, "content-type": "text/plain; charset=utf-8", "content-length": str(len(body))}
    await send({"type": "http.response.start", "status": status, "headers": _raw(headers)})
    await send({"type": "http.response.body", "body": body})


def _bounded(receive: Receive) -> Receive:
    """Return a ``receive`` that passes no more bytes on than a request may have."""
    left = MOST_BODY_BYTES

    async def bounded() -> MutableMapping[str, Any]:
        nonlocal left
        message = await receive()
        left -= len(message.get("body", b""))
        return message if left >= 0 else {"type": "http.disconnect"}

    return bounded


def _guarded(send: Send, headers: dict[str, str]) -> Send:
    """Return a ``send`` that adds the headers."""

    async def guarded(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            kept = [pair for pair in message["headers"] if pair[0].decode("latin-1").lower() not in headers]
            message = {**message, "headers": [*kept, *_raw(headers)]}
        await send(message)

    return guarded


def _raw(headers: dict[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.encode(), value.encode()) for name, value in headers.items()]
