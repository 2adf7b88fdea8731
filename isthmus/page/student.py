"""Hands a student to the browser, which runs it: its files, and the graphs that prepare pictures and sound for it.

The page ``browser.html`` fetches all of it before it opens camera and microphone, and cannot connect anywhere from then
on (``gate.py``).
"""

import asyncio
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import BaseRoute, Route

from isthmus.data.transforms import InputSpec, frame_positions
from isthmus.page.graphs import picture_graph, spectrogram_graph
from isthmus.proto.errors import InvalidInput

FILES: Final = ("audio_encoder", "visual_encoder", "local_head")
GRAPHS: Final = {"spectrogram": spectrogram_graph, "picture": picture_graph}
_ONNX: Final = "application/octet-stream"


@dataclass(frozen=True)
class BrowserStudent:
    """A student as a browser needs it: the folder of its ONNX files, the names of its classes, and its input.

    ``name`` tells a person which student it is.
    """

    folder: Path
    name: str
    classes: tuple[str, ...]
    input_spec_json: str


def student_routes(find: Callable[[], BrowserStudent]) -> list[BaseRoute]:
    """Return the routes of a student: ``/api/student`` and its files.

    ``find`` returns the student, or raises an IsthmusError; it runs in a thread. The files are those of the student
    whose facts were asked for last, so that a new one that comes meanwhile does not mix with it.
    """
    shown: list[BrowserStudent] = []

    async def facts(request: Request) -> Response:
        student = await asyncio.to_thread(find)
        known = await asyncio.to_thread(_facts, student)
        shown[:] = [student]
        return JSONResponse(known)

    async def file(request: Request) -> Response:
        name = request.path_params["name"]
        if not shown:
            raise InvalidInput("which student it is must be asked first: open the page again")
        (student,) = shown
        if name in GRAPHS:
            return Response(await asyncio.to_thread(_graph, name, student.input_spec_json), media_type=_ONNX)
        path = student.folder / f"{name}.onnx"
        if name not in FILES or not path.is_file():
            raise InvalidInput("this student has no such file")
        return FileResponse(path, media_type=_ONNX)

    return [Route("/api/student", facts), Route("/api/student/{name}.onnx", file)]


def _facts(student: BrowserStudent) -> dict[str, Any]:
    spec = InputSpec.from_json(student.input_spec_json)
    try:
        sizes = {name: (student.folder / f"{name}.onnx").stat().st_size for name in FILES}
    except OSError as error:
        raise InvalidInput(f"{student.name} has no files that a browser can run") from error
    sizes |= {name: len(_graph(name, student.input_spec_json)) for name in GRAPHS}
    return {
        "name": student.name,
        "classes": list(student.classes),
        "sample_rate_hz": spec.sample_rate_hz,
        "samples": spec.samples,
        "duration_s": spec.duration_s,
        "frame_times_s": [(int(place) + 0.5) / spec.frames_stored * spec.duration_s for place in frame_positions(spec)],
        "spectrogram": [spec.spectrogram_bins, spec.spectrogram_columns],
        "files": sizes,
    }


@functools.lru_cache(maxsize=4)
def _graph(name: str, input_spec_json: str) -> bytes:
    try:
        return GRAPHS[name](InputSpec.from_json(input_spec_json))
    except ImportError as error:
        raise InvalidInput("to run the student in a browser, the page needs: pip install 'isthmus[page]'") from error
