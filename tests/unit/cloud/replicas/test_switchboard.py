"""An application that is called without a socket: what is asked reaches it, and what it says is heard in order."""

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from isthmus.cloud.replicas.switchboard import Switchboard

WAIT_S = 30.0


class Served:
    """An application with three paths, on a loop in a thread of its own."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.left = threading.Event()
        self.go_on = threading.Event()
        routes = [
            Route("/echo", self.echo, methods=["POST"]),
            Route("/pieces", self.pieces),
            Route("/fails", self.fails),
        ]
        self.board = Switchboard(Starlette(routes=routes), self.loop)
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()

    async def echo(self, request: Request) -> Response:
        body = await request.body()
        return JSONResponse(
            {"body": body.decode(), "asked": dict(request.query_params), "key": request.headers["authorization"]}, 201
        )

    async def pieces(self, request: Request) -> Response:
        async def three() -> Any:
            try:
                yield b"one"
                await asyncio.to_thread(self.go_on.wait, WAIT_S)
                yield b"two"
                yield b"three"
            finally:
                self.left.set()

        return StreamingResponse(three())

    async def fails(self, request: Request) -> Response:
        raise RuntimeError("no answer")


@pytest.fixture
def served() -> Iterator[Served]:
    made = Served()
    yield made
    made.go_on.set()
    asyncio.run_coroutine_threadsafe(made.board.close(), made.loop).result(WAIT_S)
    made.loop.call_soon_threadsafe(made.loop.stop)
    made.thread.join(WAIT_S)
    made.loop.close()


def heard(board: Switchboard, number: int) -> tuple[int | None, bytes]:
    """Hears one request to its end."""
    status, body = None, b""
    while True:
        for at, found, part, over in board.hear(WAIT_S):
            assert at == number
            status, body = found, body + part
            if over:
                return status, body


def test_method_path_query_headers_and_body_arrive(served: Served) -> None:
    served.board.begin(7, "POST", "/echo?form=chat&first=3", {"Authorization": "Bearer k"}, "wörds".encode())
    status, body = heard(served.board, 7)
    assert status == 201
    assert body == '{"body":"wörds","asked":{"form":"chat","first":"3"},"key":"Bearer k"}'.encode()


def test_a_stream_is_heard_as_it_comes(served: Served) -> None:
    served.board.begin(1, "GET", "/pieces", {}, b"")
    got = b""
    while not got:
        for _, status, part, over in served.board.hear(WAIT_S):
            assert status == 200 and not over
            got += part
    assert got == b"one" and served.board.hear(0.0) == []
    served.go_on.set()
    assert heard(served.board, 1) == (200, b"twothree")


def test_one_look_brings_what_all_requests_have_got(served: Served) -> None:
    served.go_on.set()
    for number in range(20):
        served.board.begin(number, "GET", "/pieces", {}, b"")
    bodies = dict.fromkeys(range(20), b"")
    ended: set[int] = set()
    while len(ended) < 20:
        for number, _, part, over in served.board.hear(WAIT_S):
            bodies[number] += part
            ended |= {number} if over else set()
    assert set(bodies.values()) == {b"onetwothree"}


def test_who_leaves_ends_the_answer_and_hears_nothing_more(served: Served) -> None:
    served.board.begin(1, "GET", "/pieces", {}, b"")
    while not served.board.hear(WAIT_S):
        pass
    served.board.leave(1)
    served.board.leave(1)  # it has left already
    served.go_on.set()
    assert served.left.wait(WAIT_S)
    served.board.begin(2, "POST", "/echo", {"authorization": ""}, b"")
    assert heard(served.board, 2)[0] == 201


def test_a_request_that_fails_ends(served: Served) -> None:
    served.board.begin(1, "GET", "/fails", {}, b"")
    assert heard(served.board, 1)[0] == 500, "the application says so"
    broken = Switchboard(None, served.loop)
    broken.begin(2, "GET", "/fails", {}, b"")
    assert heard(broken, 2) == (None, b"")
