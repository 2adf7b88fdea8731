"""The serving side's page as a web application."""

import asyncio

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from isthmus.cloud.page.numbers import read_numbers
from isthmus.page.serve import application
from isthmus.page.student import BrowserStudent, student_routes


def cloud_page(metrics_port: int, student: BrowserStudent | None = None) -> Starlette:
    """Return the page of the service whose metrics are on this port of this machine.

    ``student``: the base student, which people may try in their browser; None offers none.
    """

    async def numbers(request: Request) -> Response:
        return JSONResponse(await asyncio.to_thread(read_numbers, metrics_port))

    routes: list[BaseRoute] = [Route("/api/numbers", numbers)]
    if student is not None:
        routes += student_routes(lambda: student)
    name = f"service with metrics on port {metrics_port}"
    return application(routes, {"page": "cloud", "name": name, "student": student is not None})
