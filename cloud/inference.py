"""Answer features with the heads of their student. Plain functions and a cache, without grpc."""

import asyncio
import logging
import math
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from isthmus.cloud.personalise.students import HEADS_FILE, Shelf, reachable
from isthmus.cloud.store.students import StudentRow
from isthmus.proto.codec import check_values, unpack_values
from isthmus.proto.convert_student import manifest_from_bytes
from isthmus.proto.errors import BadFrame, Internal, IsthmusError, OutOfOrder, TooLate, WrongState
from isthmus.proto.messages import Captured, FloatArray, InferReply

log = logging.getLogger(__name__)

_ANSWER_S: Final = 0.001
"""Shortest time in which an answer can be computed and sent."""


class Heads(Protocol):
    """What answering needs of ``isthmus.distill.models.heads.FrozenHeads``."""

    @property
    def ratios(self) -> Sequence[float]: ...

    def probabilities(self, values_F: FloatArray, captured: Captured, ratio: float) -> FloatArray: ...


@dataclass(frozen=True)
class Served:
    """The cloud's part of a student. ``feature_width`` and ``release`` are those of its release; see StudentRow."""

    heads: Heads
    feature_width: int
    release: str


@dataclass
class Session:
    """The student of one stream, and the last sequence number received on it."""

    heads: Heads
    feature_width: int
    last_sequence: int = -1

    def reply(self, sequence: int, frame: bytes, remaining_s: float | None) -> InferReply:
        """Answer one request. A request that cannot be answered is refused in its reply; nothing is raised.

        ``remaining_s`` is the time until the caller's deadline (None: no deadline). A request that would miss its
        deadline is refused before anything is computed.
        """
        began_s = time.perf_counter()
        try:
            if remaining_s is not None and remaining_s < _ANSWER_S:
                raise TooLate("the deadline leaves no time to answer")
            if sequence <= self.last_sequence:
                raise OutOfOrder(f"sequence {sequence} does not follow {self.last_sequence}")
            self.last_sequence = sequence
            unpacked = unpack_values(frame, feature_width=self.feature_width, ratios=self.heads.ratios)
            probabilities_C = self.heads.probabilities(unpacked.values_F, unpacked.captured, unpacked.ratio)
            if math.isnan(probabilities_C[0]):
                check_values(unpacked.values_F)
                raise BadFrame("the features are too large: the student's heads overflow on them")
        except IsthmusError as error:
            return refusal(sequence, error, began_s)
        except Exception:
            reference = secrets.token_hex(4)
            log.exception("inference failed (reference %s)", reference)
            return refusal(sequence, Internal(f"the server failed; tell its operator reference {reference}"), began_s)
        return InferReply(sequence, probabilities_C, server_ms=_ms_since(began_s))


class HeadCache:
    """Heads of the students in use, for one event loop. Each is loaded once; the least recently used goes first."""

    def __init__(self, shelf: Shelf, load: Callable[[Path], Heads], *, scratch: Path, capacity: int) -> None:
        self._shelf = shelf
        self._load = load
        self._scratch = scratch
        self._capacity = capacity
        self._heads: OrderedDict[str, Served] = OrderedDict()
        self._loading: dict[str, asyncio.Lock] = {}

    async def heads(self, device_id: str, student_id: str) -> Served:
        """Return the heads of a student, of whichever release it is, loading them if necessary.

        Raises NotYours for another device's student, WrongState for a student without heads (an interim
        student), Corrupt if the heads are damaged.
        """
        row = await asyncio.to_thread(reachable, self._shelf, device_id, student_id)
        if row.kind == "interim":
            raise WrongState("an interim student has no heads; wait for the finished one, or name the base student")
        lock = self._loading.setdefault(student_id, asyncio.Lock())
        try:
            async with lock:
                if student_id not in self._heads:
                    self._heads[student_id] = await asyncio.to_thread(self._read, row)
                    while len(self._heads) > self._capacity:
                        self._heads.popitem(last=False)
                self._heads.move_to_end(student_id)
                return self._heads[student_id]
        finally:
            if not lock.locked():
                self._loading.pop(student_id, None)

    def _read(self, row: StudentRow) -> Served:
        width = manifest_from_bytes(row.signed.manifest_bytes).feature_width
        with self._shelf.artefacts.on_disk(row.student_id, HEADS_FILE, self._scratch, row.heads_sha256) as path:
            return Served(self._load(path), width, row.release)


def refusal(sequence: int, error: IsthmusError, began_s: float) -> InferReply:
    """Return the reply that refuses a request, which arrived at ``began_s`` of the performance counter."""
    return InferReply(
        sequence,
        None,
        error_code=error.code,
        error_message=str(error),
        retryable=error.retryable,
        server_ms=_ms_since(began_s),
    )


def _ms_since(began_s: float) -> float:
    return (time.perf_counter() - began_s) * 1e3
