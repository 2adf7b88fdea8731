"""The HTTP server: answers are sent at once, and an address that is taken is refused."""

import asyncio
import http.client
import socket
from typing import Any

import pytest

from isthmus.cloud.http.server import HttpServer
from isthmus.proto.errors import InvalidInput


async def app(_scope: Any, _receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


def test_small_parts_of_an_answer_are_sent_at_once() -> None:
    """Without TCP_NODELAY the body waits until the client acknowledges the headers, which it does after 40 ms."""

    async def check() -> None:
        server = HttpServer(app, "127.0.0.1", 0)
        connection = http.client.HTTPConnection("127.0.0.1", await server.start())

        def ask() -> bytes:
            connection.request("GET", "/")
            return connection.getresponse().read()

        try:
            assert await asyncio.to_thread(ask) == b"ok"
            assert server._server is not None
            (open_one,) = server._server.server_state.connections
            end: Any = open_one.transport.get_extra_info("socket")
            assert end.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        finally:
            connection.close()
            await server.stop()

    asyncio.run(check())


def test_a_port_that_is_taken_is_refused() -> None:
    async def check() -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(InvalidInput, match="the port is taken"):
            await HttpServer(app, "127.0.0.1", taken.getsockname()[1]).start()

    asyncio.run(check())
