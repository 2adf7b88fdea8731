"""The device's page as a web application: each route asks the device, or shows one of its stored clips."""

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from isthmus.edge.agent.device_state import DeviceState
from isthmus.edge.own_clips.store import ClipStore
from isthmus.edge.page.watching import Watching
from isthmus.edge.requests.requests import ask
from isthmus.page.serve import application
from isthmus.page.student import BrowserStudent, student_routes
from isthmus.proto.errors import InvalidInput

READS: Final = frozenset({"status", "mine", "link", "sent", "sent_content", "clips"})
CHANGES: Final = frozenset(
    {
        "correct",
        "undo_correction",
        "question",
        "rollback",
        "personalise",
        "delete_clips",
        "keep_clips",
        "pause_capture",
    }
)
STRIP_PICTURES: Final = 6
STRIP_PX: Final = 96


def device_page(state: DeviceState, name: str) -> Starlette:
    """Return the page of the device in ``state``; ``name`` is shown in its title."""
    watching = Watching(state)
    store = ClipStore(state.root / "clips")

    async def do(request: Request) -> Response:
        return JSONResponse(await asyncio.to_thread(_asked, state, await request.body()))

    async def watch(request: Request) -> Response:
        events = watching.open(look=request.query_params.get("look") == "1")
        return StreamingResponse(events, media_type="text/event-stream")

    async def sound(request: Request) -> Response:
        clip = request.path_params["clip"]
        store.check([clip])
        path = store.folder / f"{clip}.wav"
        if not path.is_file():
            raise InvalidInput("this clip has no sound")
        return FileResponse(path, media_type="audio/wav")

    async def pictures(request: Request) -> Response:
        clip = request.path_params["clip"]
        store.check([clip])
        return Response(await asyncio.to_thread(_strip, store, clip), media_type="image/jpeg")

    routes = [
        Route("/api/do", do, methods=["POST"]),
        Route("/api/watch", watch),
        Route("/api/clips/{clip}/sound.wav", sound),
        Route("/api/clips/{clip}/pictures.jpg", pictures),
        *student_routes(lambda: _student(state, name)),
    ]
    return application([*routes], {"page": "device", "name": name, "folder": str(state.root)})


def _asked(state: DeviceState, body: bytes) -> dict[str, Any]:
    """Return the answer to a request of the page. Raises InvalidInput for anything that the page does not offer."""
    try:
        wanted = json.loads(body)
        name, arguments = wanted["request"], wanted.get("arguments", {})
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise InvalidInput("a request is a JSON object with 'request' and 'arguments'") from error
    if not isinstance(name, str) or name not in READS | CHANGES or not isinstance(arguments, dict):
        raise InvalidInput("the page offers no such request")
    return ask(state, name, **{str(key): value for key, value in arguments.items()})


def _student(state: DeviceState, name: str) -> BrowserStudent:
    """Return the student in use. Raises WrongState without one, Corrupt if its files are damaged."""
    known = ask(state, "student")
    shown = f"the {known['kind']} student of {name}"
    return BrowserStudent(Path(known["folder"]), shown, tuple(known["classes"]), known["input_spec_json"])


def _strip(store: ClipStore, clip: str) -> bytes:
    """Return some pictures of a clip side by side as JPEG. Raises InvalidInput without pictures."""
    import cv2
    import numpy as np

    from isthmus.data.clip import ClipError
    from isthmus.data.media.decode import decode
    from isthmus.data.transforms import InputSpec

    ref = next((each for each in store.refs() if each.name == clip), None)
    if ref is None or ref.video_path is None:
        raise InvalidInput("this clip has no pictures")
    spec = InputSpec(frame_px=STRIP_PX, stored_px=STRIP_PX, frames_stored=STRIP_PICTURES)
    try:
        frames_KHWC = decode(replace(ref, audio_path=None), spec).frames_KHWC
    except ClipError as error:
        raise InvalidInput(f"this clip cannot be shown: {error.reason}") from error
    assert frames_KHWC is not None
    _, jpeg = cv2.imencode(".jpg", np.concatenate([*frames_KHWC], axis=1)[:, :, ::-1])
    return jpeg.tobytes()
