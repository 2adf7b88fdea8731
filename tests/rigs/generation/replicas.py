"""A relay over HTTP on loopback, and a server with OpenAI's interface whose answers and failures a test chooses."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Route

from isthmus.cloud.generation.policies.by_name import make_order
from isthmus.cloud.generation.scheduling.policy import Limits
from isthmus.cloud.generation.serve.relay import Relay
from isthmus.cloud.generation.serve.upstream import Upstream
from isthmus.cloud.http.calls import Door
from isthmus.cloud.http.openai import openai_app
from isthmus.cloud.http.server import HttpServer
from tests.rigs.project.patience import HANGS_S


@contextmanager
def on_loop(
    make: Callable[[], Any], start: Callable[[Any], Any], stop: Callable[[Any], Any]
) -> Iterator[tuple[Any, Any]]:
    """Runs what ``make`` returns on a loop in a thread of its own; yields it and what ``start`` returned."""
    ready: Future[tuple[Any, Any]] = Future()
    loop = asyncio.new_event_loop()
    ends = asyncio.Event()

    async def run() -> None:
        try:
            made = make()
            found = await start(made)
        except BaseException as error:
            ready.set_exception(error)
            return
        ready.set_result((made, found))
        try:
            await ends.wait()
        finally:
            await stop(made)

    thread = threading.Thread(target=lambda: loop.run_until_complete(run()), daemon=True)
    thread.start()
    try:
        yield ready.result(timeout=HANGS_S)
    finally:
        loop.call_soon_threadsafe(ends.set)
        thread.join(timeout=HANGS_S)
        loop.close()


@contextmanager
def serving_relay(
    urls: Sequence[str],
    *,
    rows: int = 4,
    policy: str = "fused",
    move_key: str | None = None,
    context: int = 256,
    # It stands still, so a replica that failed is left alone however slow the test is.
    clock: Callable[[], float] = lambda: 0.0,
) -> Iterator[tuple[Relay, str]]:
    """Yields a relay in front of ``urls``, and its address."""
    servers: list[HttpServer] = []

    def make() -> Relay:
        upstreams = [Upstream(url, move_key=move_key) for url in urls]
        limits = Limits(rows=rows, blocks=context // 4)
        order = make_order(policy)
        return Relay("words", upstreams, limits, order, context=context, max_tokens=200, max_waiting=8, clock=clock)

    async def start(relay: Relay) -> str:
        await relay.start()
        servers.append(HttpServer(openai_app(relay, Door()), "127.0.0.1", 0))
        return f"http://127.0.0.1:{await servers[0].start()}"

    async def stop(relay: Relay) -> None:
        await relay.stop()
        await servers[0].stop()

    with on_loop(make, start, stop) as (relay, url):
        yield relay, url


@dataclass
class Script:
    """How the chosen server answers: ``pieces`` of text, then the end; it breaks off after ``breaks_after`` of them.

    ``status`` other than 200 refuses. ``raw`` is sent in place of everything. ``seen`` collects the requests. ``then``
    takes its place after the first request.
    """

    pieces: Sequence[str] = ()
    breaks_after: int | None = None
    status: int = 200
    raw: bytes | None = None
    hold: threading.Event | None = None
    then: "Script | None" = None
    seen: list[dict[str, Any]] = field(default_factory=list)


@contextmanager
def scripted(script: Script) -> Iterator[str]:
    """Serves as the script says and yields the address."""

    async def answer(request: Request) -> Response:
        now = script.then if script.then is not None and script.seen else script
        now.seen.append(await request.json())
        if now.status != 200:
            return JSONResponse({"error": {"message": "no room\\x00 for this"}}, now.status)
        return StreamingResponse(_events(now), media_type="text/event-stream")

    async def models(request: Request) -> Response:
        return JSONResponse({"data": [{"id": "theirs"}]})

    def make() -> HttpServer:
        routes = [
            Route("/v1/chat/completions", answer, methods=["POST"]),
            Route("/v1/completions", answer, methods=["POST"]),
            Route("/v1/models", models),
        ]
        return HttpServer(Starlette(routes=routes), "127.0.0.1", 0)

    async def start(server: HttpServer) -> int:
        return await server.start()

    with on_loop(make, start, lambda server: server.stop()) as (_, port):
        yield f"http://127.0.0.1:{port}"


@contextmanager
def redirecting(target: str) -> Iterator[str]:
    """Serves on an address that it yields, and sends every request on to the same path at ``target``."""

    async def elsewhere(request: Request) -> Response:
        return RedirectResponse(f"{target}{request.url.path}", 307)

    def make() -> HttpServer:
        routes = [Route("/{rest:path}", elsewhere, methods=["GET", "POST", "PUT"])]
        return HttpServer(Starlette(routes=routes), "127.0.0.1", 0)

    with on_loop(make, lambda server: server.start(), lambda server: server.stop()) as (_, port):
        yield f"http://127.0.0.1:{port}"


async def _events(script: Script) -> AsyncIterator[bytes]:
    if script.raw is not None:
        yield script.raw
        return
    for at, piece in enumerate(script.pieces):
        if at == script.breaks_after:
            raise ConnectionError("killed")
        if script.hold is not None and at:
            await asyncio.to_thread(script.hold.wait, HANGS_S)
        event = {"choices": [{"index": 0, "delta": {"content": piece}, "text": piece, "finish_reason": None}]}
        yield f"data: {json.dumps(event)}\n\n".encode()
    yield b'data: {"choices": [{"index": 0, "delta": {}, "text": "", "finish_reason": "stop"}]}\n\n'
    yield b'data: {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 7}}\n\ndata: [DONE]\n\n'
