"""The serving side's page as a web application."""

import asyncio

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from isthmus.cloud.page.numbers import read_numbers
from isthmus.page.serve import application


def cloud_page(metrics_port: int) -> Starlette:
    """Return the page of the service whose metrics are on this port of this machine."""

    async def numbers(request: Request) -> Response:
        return JSONResponse(await asyncio.to_thread(read_numbers, metrics_port))

    return application(
        [Route("/api/numbers", numbers)], {"page": "cloud", "name": f"service with metrics on port {metrics_port}"}
    )
