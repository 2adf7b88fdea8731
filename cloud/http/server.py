"""One HTTP server on one socket, on the event loop that starts it. uvicorn does the protocol."""

import asyncio
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import uvicorn

from isthmus.proto.errors import InvalidInput

MAX_CONNECTIONS: Final = 1_024
_IDLE_S: Final = 20
_GRACE_S: Final = 2


def under_prefix(prefix: str, inner: Any | None, others: Any | None) -> Any:
    """Returns an application that passes calls of ``prefix`` to ``inner``, and all others to ``others``.

    If one of the two is None, the other one gets every call. Raises ValueError if both are.
    """
    if inner is None or others is None:
        if inner is None and others is None:
            raise ValueError("there is no application to serve")
        return others if inner is None else inner

    async def app(scope: Any, receive: Any, send: Any) -> None:
        path = scope.get("path", "")
        chosen = inner if path == prefix or path.startswith(f"{prefix}/") else others
        await chosen(scope, receive, send)

    return app


class HttpServer:
    """Serves an ASGI application. Call ``start`` once and ``stop`` once; nothing is bound before ``start``."""

    def __init__(
        self, app: Any, host: str, port: int, *, tls_cert: Path | None = None, tls_key: Path | None = None
    ) -> None:
        self._app = app
        self._host, self._port = host, port
        self._tls = (tls_cert, tls_key)
        self._server: _Quiet | None = None
        self._serving: asyncio.Task[None] | None = None

    async def start(self) -> int:
        """Starts to listen and returns the port. Raises InvalidInput if the address cannot be used."""
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        # asyncio sends small parts of an answer at once (TCP_NODELAY) only if the socket names its protocol. Else a
        # kept connection waits 40 ms per answer for the client's acknowledgement.
        listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind((self._host, self._port))
        except OSError as error:
            listening.close()
            raise InvalidInput(
                f"cannot listen on {self._host}:{self._port}: the port is taken, or the address is not one of this "
                "machine"
            ) from error
        cert, key = self._tls
        config = uvicorn.Config(
            self._app,
            log_config=None,
            access_log=False,
            lifespan="off",
            server_header=False,
            limit_concurrency=MAX_CONNECTIONS,
            timeout_keep_alive=_IDLE_S,
            timeout_graceful_shutdown=_GRACE_S,
            ssl_certfile=None if cert is None else str(cert),
            ssl_keyfile=None if key is None else str(key),
        )
        self._server = _Quiet(config)
        self._serving = asyncio.create_task(self._server.serve([listening]), name="http")
        while not self._server.started:
            if self._serving.done():
                listening.close()
                self._serving.result()
                raise InvalidInput("the HTTP server ended at its start")
            await asyncio.sleep(0.01)
        port: int = listening.getsockname()[1]
        return port

    async def stop(self) -> None:
        """Gives requests a moment to end, then closes the connections."""
        if self._server is not None and self._serving is not None:
            self._server.should_exit = True
            await self._serving


class _Quiet(uvicorn.Server):
    """A server that leaves the signals to the process that runs it."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
