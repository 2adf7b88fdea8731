"""A request on its way from one replica to another: the length of its state, the state as JSON, then the rest.

A front passes it on without reading the rest, so this module is free of torch.
"""

import json
import struct
from collections.abc import Mapping
from typing import Any, Final

from isthmus.proto.errors import InvalidInput

MAX_STATE_BYTES: Final = 4 << 20


def framed(state: Mapping[str, Any], rest: bytes = b"") -> bytes:
    """Returns a state and what follows it as bytes."""
    head = json.dumps(state).encode()
    return struct.pack("<Q", len(head)) + head + rest


def unframed(body: bytes | bytearray) -> tuple[dict[str, Any], bytes]:
    """Returns what ``framed`` was given.

    Raises InvalidInput for anything else.

    >>> unframed(framed({"tokens": 3}, b"rest"))
    ({'tokens': 3}, b'rest')
    """
    try:
        (size,) = struct.unpack_from("<Q", body)
        if size > min(MAX_STATE_BYTES, len(body) - 8):
            raise ValueError("the state is too long")
        state = json.loads(bytes(body[8 : 8 + size]))
        if not isinstance(state, dict):
            raise TypeError("the state is no object")
    except (ValueError, TypeError, struct.error, RecursionError) as error:
        raise InvalidInput(f"not a request that is moved: {type(error).__name__}") from error
    return state, bytes(body[8 + size :])
