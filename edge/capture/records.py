"""The pipe from the child that captures to the device: one record per picture, block of sound, or note in plain words.

A record is a head of fixed size and a payload. Sizes are checked before memory is taken: the child may be a driver that
has gone mad.
"""

import struct
from dataclasses import dataclass
from enum import Enum
from typing import IO, Final

import numpy as np

from isthmus.edge.capture.assembly import Block, StampedPicture

_HEAD: Final = struct.Struct("<cdIII")
MOST_BYTES: Final = 4 << 20
MOST_NOTE_BYTES: Final = 500


class BadRecord(ValueError):
    """Bytes that are no record."""


class Source(Enum):
    CAMERA = "camera"
    MICROPHONE = "microphone"


@dataclass(frozen=True)
class Note:
    """What is wrong with a source, for a person; "" once it works."""

    source: Source
    text: str


Record = Block | StampedPicture | Note


def packed(record: Record) -> bytes:
    """Return a record as bytes."""
    match record:
        case StampedPicture(at_s, picture_HWC):
            height, width = picture_HWC.shape[:2]
            payload = picture_HWC.tobytes()
            return _HEAD.pack(b"P", at_s, height, width, len(payload)) + payload
        case Block(at_s, rate_hz, samples_T):
            payload = np.asarray(samples_T, "<f4").tobytes()
            return _HEAD.pack(b"S", at_s, rate_hz, 0, len(payload)) + payload
        case Note(source, text):
            payload = text.encode()[:MOST_NOTE_BYTES]
            return _HEAD.pack(b"N", 0.0, list(Source).index(source), 0, len(payload)) + payload


def read_record(pipe: IO[bytes]) -> Record | None:
    """Return the next record; blocks. Returns None at the end of the pipe. Raises BadRecord."""
    head = pipe.read(_HEAD.size)
    if len(head) < _HEAD.size:
        return None
    kind, at_s, first, second, size = _HEAD.unpack(head)
    if size > MOST_BYTES or not at_s >= 0:
        raise BadRecord(f"a record of {size} bytes at {at_s} s")
    payload = pipe.read(size)
    if len(payload) < size:
        return None
    if kind == b"P" and first and second and first * second * 3 == size:
        return StampedPicture(at_s, np.frombuffer(payload, np.uint8).reshape(first, second, 3))
    if kind == b"S" and 0 < first <= 192_000 and size % 4 == 0:
        samples_T = np.frombuffer(payload, "<f4")
        if np.isfinite(samples_T).all():
            return Block(at_s, first, samples_T)
    if kind == b"N" and first < len(Source) and size <= MOST_NOTE_BYTES:
        return Note(list(Source)[first], payload.decode(errors="replace"))
    raise BadRecord(f"a record of kind {kind!r} with {size} bytes")
