"""The interface between a replica and the front that moves requests between replicas. It has a key of its own.

It exists only if the operator gives that key, because who may move requests may also read them and put text into them.
"""

from collections.abc import Awaitable, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from isthmus.cloud.generation.serve.moving import Moves
from isthmus.cloud.http.calls import Door, bytes_of, guarded
from isthmus.proto.errors import InvalidInput

MAX_NAME_CHARS = 64
Streamed = Callable[[Request, Any, str], Awaitable[Response]]


def move_routes(moves: Moves, key: str, streamed: Streamed) -> list[Route]:
    """Returns the routes. ``streamed`` answers with the events of a reply, as a chat or as a text."""
    door = Door(key)

    async def costs(request: Request) -> Response:
        return JSONResponse(moves.costs())

    async def part(request: Request) -> Response:
        return Response(await moves.part(_name(request)), media_type="application/octet-stream")

    async def leave(request: Request) -> Response:
        given = request.query_params.get("first")
        if given is not None and not (given.isdecimal() and len(given) < 10):
            raise InvalidInput("first: must be a whole number")
        body = await moves.leave(_name(request), None if given is None else int(given))
        return Response(body, media_type="application/octet-stream")

    async def stay(request: Request) -> Response:
        await moves.stay(_name(request))
        return Response(status_code=204)

    async def keep(request: Request) -> Response:
        await moves.keep_part(_name(request), await bytes_of(request, moves.most_bytes, door))
        return Response(status_code=204)

    async def arrive(request: Request) -> Response:
        form = request.query_params.get("form")
        if form not in ("chat", "text"):
            raise InvalidInput("form: must be chat or text")
        reply = await moves.arrive(_name(request), await bytes_of(request, moves.most_bytes, door))
        return await streamed(request, reply, form)

    prefix = "/isthmus/moves"
    return [
        Route(f"{prefix}/costs", guarded(costs, door)),
        Route(f"{prefix}/requests/{{name}}/part", guarded(part, door)),
        Route(f"{prefix}/requests/{{name}}/leave", guarded(leave, door), methods=["POST"]),
        Route(f"{prefix}/requests/{{name}}/stay", guarded(stay, door), methods=["POST"]),
        Route(f"{prefix}/parts/{{name}}", guarded(keep, door), methods=["PUT"]),
        Route(f"{prefix}/arrivals/{{name}}", guarded(arrive, door), methods=["POST"]),
    ]


def _name(request: Request) -> str:
    name = str(request.path_params["name"])
    if len(name) > MAX_NAME_CHARS:
        raise InvalidInput("the name of a request is too long")
    return name
