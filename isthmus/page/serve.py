"""Serve a page on loopback until the process is interrupted."""

import asyncio
import secrets
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import BaseRoute, Route

from isthmus.data.files import write_atomically
from isthmus.page.gate import Gate
from isthmus.proto.errors import InvalidInput, IsthmusError

BUILT: Final = Path(__file__).parent / "built"
"""The front end as Vite built it from ``web``."""

HOST: Final = "127.0.0.1"
TOKEN_FILE: Final = "page-token"
MOST_CONNECTIONS: Final = 64
_TOKEN_BYTES: Final = 24
_GRACE_S: Final = 1
_TYPES: Final = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript",
    ".css": "text/css",
    ".txt": "text/plain; charset=utf-8",
    ".wasm": "application/wasm",
}
_COMPRESSED: Final = ".wasm"
"""Files of this kind are kept compressed by gzip, which every browser reads."""


def application(routes: list[BaseRoute], facts: dict[str, Any]) -> Starlette:
    """Return the application of a page: the front end, its ``facts`` (which page it is), and ``routes``.

    Errors of ours become JSON with the words for a person.
    """

    async def built(request: Request) -> Response:
        name = request.path_params.get("name") or "index.html"
        kind = Path(name).suffix
        path = BUILT / (f"{name}.gz" if kind == _COMPRESSED else name)
        if path.parent != BUILT or kind not in _TYPES or not path.is_file():
            return JSONResponse({"error": "there is no such file"}, status_code=404)
        headers = {"content-encoding": "gzip"} if kind == _COMPRESSED else None
        return FileResponse(path, media_type=_TYPES[kind], headers=headers)

    async def who(request: Request) -> Response:
        return JSONResponse(facts)

    async def refused(request: Request, error: Exception) -> Response:
        retry = isinstance(error, IsthmusError) and error.retryable
        return JSONResponse({"error": str(error)}, status_code=503 if retry else 409)

    return Starlette(
        routes=[Route("/", built), Route("/api/page", who), *routes, Route("/{name}", built)],
        exception_handlers={IsthmusError: refused, ValueError: refused},
    )


def token_in(folder: Path) -> str:
    """Return the page's token, which is kept in a file that only its owner can read; make one at first.

    It stays the same, so that a page that is open finds the server again after a restart.
    """
    path = folder / TOKEN_FILE
    with suppress(OSError):
        token = path.read_text(encoding="ascii", errors="replace").strip()
        if len(token) >= _TOKEN_BYTES and token.isascii() and token.replace("-", "").replace("_", "").isalnum():
            path.chmod(0o600)
            return token
    token = secrets.token_urlsafe(_TOKEN_BYTES)
    write_atomically(path, f"{token}\n", mode=0o600)
    return token


def serve(app: Any, token: str, port: int, say: Callable[[str], None]) -> None:
    """Serve ``app`` behind the gate on loopback and ``say`` its address. Raises InvalidInput without the port."""
    # With its protocol named, asyncio sends small parts of an answer at once (TCP_NODELAY).
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((HOST, port))
        except OSError as error:
            why = f"port {port} cannot be used, {error.strerror}: give another one with --port, or 0 for any"
            raise InvalidInput(why) from error
        port = listening.getsockname()[1]
        say(f"http://{HOST}:{port}/{token}/")
        asyncio.run(_serving(Gate(app, token, port), listening))


async def _serving(app: Any, listening: socket.socket) -> None:
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
        limit_concurrency=MOST_CONNECTIONS,
        timeout_graceful_shutdown=_GRACE_S,
        ws="none",
    )
    await uvicorn.Server(config).serve([listening])
