"""Requests of other processes to a device: the running device answers them, or if none runs, its state folder does.

To add a request, write one function in the module of its subject and decorate it with ``@request``. Its name is the
request's name. Its first parameter is the ``Device``; the others are the arguments, each a ``str``, ``int``, ``float``,
``bool`` or ``list``, checked before the call. It returns what JSON can hold, and raises an IsthmusError to refuse. A
command then calls ``ask(device, "name", argument=value)``. If a request needs something else of the running process,
that becomes another field of ``Device``.
"""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from isthmus.edge.agent.device_state import DeviceState
from isthmus.edge.requests import clips, facts, person, student, watching
from isthmus.edge.requests.device import Device
from isthmus.edge.requests.local_socket import MOST_ANSWER_BYTES, LocalSocket, call
from isthmus.edge.requests.table import perform, wanted_of
from isthmus.proto.errors import Internal, InvalidInput, IsthmusError, from_status

log = logging.getLogger(__name__)

SUBJECTS: Final = (clips, facts, person, student, watching)
"""The modules of the requests: importing one enters its requests in the table."""


def ask(state: DeviceState, name: str, /, **arguments: Any) -> dict[str, Any]:
    """Return the running device's answer to a request; if none runs, do what is asked on the folder.

    Raises what the request raises, what ``local_socket.call`` raises, and Locked if another process holds the folder
    without answering requests.
    """
    question = {"request": name, "arguments": arguments}
    line = call(state.root, json.dumps(question).encode())
    if line is None:
        wanted = wanted_of(question)
        if not wanted[0].changes:
            return perform(Device(state), *wanted)
        with state.held():
            return perform(Device(state), *wanted)
    reply = _object(line)
    if isinstance(answer := reply.get("answer"), dict):
        return answer
    raise from_status(int(reply.get("code", Internal.code)), str(reply.get("message")), str(reply.get("error")))


@contextmanager
def answered(device: Device) -> Iterator[None]:
    """Answer requests of other processes during the block. The caller holds the folder. Raises as LocalSocket does."""
    with LocalSocket(device.state.root, lambda line: _reply(device, line)):
        yield


def _reply(device: Device, line: bytes) -> bytes:
    try:
        reply: dict[str, Any] = {"answer": perform(device, *wanted_of(_object(line)))}
    except IsthmusError as error:
        reply = {"error": type(error).__name__, "code": error.code, "message": str(error)}
    except Exception as error:
        log.exception("a request failed")
        message = f"the device failed to answer: {type(error).__name__}; its own output says more"
        reply = {"error": Internal.__name__, "code": Internal.code, "message": message}
    made = json.dumps(reply).encode()
    if len(made) > MOST_ANSWER_BYTES:
        reply = {"error": Internal.__name__, "code": Internal.code, "message": "the answer is too long to be sent"}
        made = json.dumps(reply).encode()
    return made


def _object(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (RecursionError, ValueError) as error:
        raise InvalidInput("a request is one line that holds a JSON object") from error
    if not isinstance(value, dict):
        raise InvalidInput("a request is one line that holds a JSON object")
    return value
