"""Every message that this device has sent to its cloud: when, how many bytes, and what it held.

A message is written down before it goes, so one that never arrived is listed too. The table has sizes, hashes and
facts, but nothing that was learned of the user. The bytes of the newest messages are in memory alone: they are
forgotten when the device ends, and when the person deletes clips.
"""

import contextlib
import hashlib
import json
import logging
import sqlite3
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from google.protobuf.message import Message

from isthmus.data.files import move
from isthmus.proto.codec import unpack_frame
from isthmus.proto.convert import prototypes_from_pb
from isthmus.proto.errors import BadFrame, InvalidInput, IsthmusError
from isthmus.proto.messages import FeatureFrame
from isthmus.proto.v1 import isthmus_pb2 as pb

log = logging.getLogger(__name__)

MOST_ROWS: Final = 20_000
"""The newest messages that are listed one by one. Older ones stay in the totals."""

MOST_KEPT: Final = 100
MOST_KEPT_BYTES: Final = 2 << 20
"""Of each kind of message, the bytes of so many are kept in memory."""

MOST_DRAWN: Final = 4_096
"""The most numbers of one message that are shown."""

_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS sent (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    sent_s REAL NOT NULL,
    name TEXT NOT NULL,
    bytes INTEGER NOT NULL,
    sha256 TEXT NOT NULL,
    held TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS totals (name TEXT PRIMARY KEY, messages INTEGER NOT NULL, bytes INTEGER NOT NULL);
"""


Frames = Callable[[], tuple[int, Collection[float]] | None]
"""Returns feature width and ratios of the student in use; None if there is none."""


@dataclass(frozen=True)
class Sent:
    """One message. ``sent_s``: Unix time. ``name``: of its type in the contract. ``held``: facts about its content.

    ``size_bytes`` and ``sha256`` are of the message as it is on the wire, without HTTP/2. An enrolment may hold a
    secret key, so it has no hash.
    """

    number: int
    sent_s: float
    name: str
    size_bytes: int
    sha256: str
    held: dict[str, Any]


class SentMessages:
    """The list, in an SQLite database at ``path``. Any thread may use it.

    A damaged database is set aside as ``<name>.damaged`` and a new one begins. A full disk stops nothing: a message
    that could not be written down is counted in ``unwritten``. ``frames`` says how to read feature frames.
    """

    def __init__(self, path: Path, *, unix_clock: Callable[[], float] = time.time) -> None:
        self._unix_clock = unix_clock
        self._lock = threading.Lock()
        self._kept: dict[str, OrderedDict[int, bytes]] = {}
        self.frames: Frames = lambda: None
        self.unwritten = 0
        try:
            self._database = _opened(path)
        except sqlite3.DatabaseError as error:
            log.warning("the list of sent messages is damaged and starts over: %s", error)
            for suffix in ("", "-wal", "-shm"):
                beside = path.with_name(path.name + suffix)
                if beside.exists():
                    move(beside, path.with_name(f"{path.name}.damaged{suffix}"))
            self._database = _opened(path)

    def note(self, message: Message) -> None:
        """Write a message down that is about to go."""
        name, content = message.DESCRIPTOR.name, message.SerializeToString()
        secret = isinstance(message, pb.EnrolRequest)
        with self._lock:
            digest = "" if secret else hashlib.sha256(content).hexdigest()
            try:
                number = self._written(name, len(content), digest, json.dumps(self._facts(message)))
            except sqlite3.Error as error:
                self.unwritten += 1
                log.warning("a sent message could not be written down: %s", error)
                return
            if secret:
                return
            self._keep(name, number, content)

    def note_state(self, content: bytes) -> None:
        """Write down what goes with a request for a reply: how the user feels. What it says is not in the table."""
        with self._lock:
            try:
                held = json.dumps({"fields": ["class", "probability"]})
                number = self._written("SharedState", len(content), hashlib.sha256(content).hexdigest(), held)
            except sqlite3.Error as error:
                self.unwritten += 1
                log.warning("a sent message could not be written down: %s", error)
                return
            self._keep("SharedState", number, content)

    def newest(self, before: int = 0, most: int = 50) -> list[Sent]:
        """Return the newest messages, newest first; those with a number under ``before`` if it is above 0."""
        query = (
            "SELECT number, sent_s, name, bytes, sha256, held FROM sent WHERE number < ? ORDER BY number DESC LIMIT ?"
        )
        with self._lock:
            rows = self._database.execute(query, (before or 1 << 62, most)).fetchall()
        return [
            Sent(number, sent_s, name, size, digest, json.loads(held))
            for number, sent_s, name, size, digest, held in rows
        ]

    def totals(self) -> dict[str, tuple[int, int]]:
        """Return the number of messages and of bytes since the first, by the messages' name."""
        with self._lock:
            rows = self._database.execute("SELECT name, messages, bytes FROM totals ORDER BY name").fetchall()
        return {name: (messages, size) for name, messages, size in rows}

    def content(self, number: int) -> tuple[bytes, list[tuple[str, list[float]]]]:
        """Return a message's bytes, and its numbers by what they are. Raises InvalidInput if they are not kept."""
        with self._lock:
            found = next(((name, kept[number]) for name, kept in self._kept.items() if number in kept), None)
        if found is None:
            raise InvalidInput(
                f"the bytes of message {number} are not kept: only the newest {MOST_KEPT} of a kind are, until the "
                "device ends or clips are deleted"
            )
        return found[1], self._numbers(*found)

    def forget_content(self) -> None:
        """Forget the bytes of all messages. The list stays."""
        with self._lock:
            self._kept.clear()

    def close(self) -> None:
        with self._lock:
            self._database.close()

    def _keep(self, name: str, number: int, content: bytes) -> None:
        kept = self._kept.setdefault(name, OrderedDict())
        kept[number] = content
        while len(kept) > MOST_KEPT or sum(map(len, kept.values())) > MOST_KEPT_BYTES:
            kept.popitem(last=False)

    def _written(self, name: str, size: int, digest: str, held: str) -> int:
        with self._database:  # one transaction
            cursor = self._database.execute(
                "INSERT INTO sent (sent_s, name, bytes, sha256, held) VALUES (?, ?, ?, ?, ?)",
                (self._unix_clock(), name, size, digest, held),
            )
            self._database.execute(
                "INSERT INTO totals VALUES (?, 1, ?) ON CONFLICT (name) DO UPDATE "
                "SET messages = messages + 1, bytes = bytes + excluded.bytes",
                (name, size),
            )
            number = int(cursor.lastrowid or 0)
            self._database.execute("DELETE FROM sent WHERE number <= ?", (number - MOST_ROWS,))
        return number

    def _facts(self, message: Message) -> dict[str, Any]:
        match message:
            case pb.EnrolRequest():
                return {"device_name": message.device_name, "key": bool(message.enrolment_key)}
            case pb.StartPersonalisationRequest():
                return {"round": 0, **_prototype_facts(message.prototypes)}
            case pb.UploadPrototypesRequest():
                return {"round": message.round, **_prototype_facts(message.prototypes)}
            case pb.FetchStudentRequest():
                names = {"student": message.student_id, "file": message.file_name}
                return {**names, "offset_bytes": message.offset_bytes}
            case pb.InferRequest():
                return self._frame_facts(message.frame)
            case pb.WatchJobRequest():
                return {"job": message.job_id}
            case pb.DescribeStudentRequest():
                return {"student": message.student_id}
        return {}

    def _frame_facts(self, content: bytes) -> dict[str, Any]:
        frame = self._frame(content)
        if frame is None:
            return {}
        vectors = [each for each in (frame.features.audio_D, frame.features.visual_D) if each is not None]
        return {
            "ratio": frame.ratio,
            "number_type": frame.number_type.value,
            "sound": frame.features.audio_D is not None,
            "picture": frame.features.visual_D is not None,
            "numbers": sum(len(each) for each in vectors),
        }

    def _frame(self, content: bytes) -> FeatureFrame | None:
        """Return the frame; None if it is not one of the student in use."""
        known = self.frames()
        if known is None:
            return None
        try:
            return unpack_frame(content, feature_width=known[0], ratios=known[1])
        except BadFrame:
            return None

    def _numbers(self, name: str, content: bytes) -> list[tuple[str, list[float]]]:
        with contextlib.suppress(IsthmusError):
            match name:
                case "InferRequest":
                    frame = self._frame(pb.InferRequest.FromString(content).frame)
                    if frame is not None:
                        vectors = (("sound", frame.features.audio_D), ("picture", frame.features.visual_D))
                        return [(what, each[:MOST_DRAWN].tolist()) for what, each in vectors if each is not None]
                case "StartPersonalisationRequest" | "UploadPrototypesRequest":
                    request = getattr(pb, name).FromString(content)
                    made = prototypes_from_pb(request.prototypes)
                    shown = max(1, MOST_DRAWN // made.values_KC.shape[1])
                    pairs = zip(made.sizes_K[:shown], made.values_KC, strict=False)
                    return [(f"mean of {size} clips", row_C.tolist()) for size, row_C in pairs]
        return []


def _prototype_facts(prototypes: pb.Prototypes) -> dict[str, Any]:
    return {
        "rows": prototypes.rows,
        "classes": prototypes.classes,
        "clips": sum(prototypes.sizes),
        "smallest": min(prototypes.sizes, default=0),
        "mode": pb.Prototypes.Mode.Name(prototypes.mode).removeprefix("MODE_").lower(),
        "epsilon": prototypes.epsilon or None,
        "features": prototypes.feature_values,
    }


def _opened(path: Path) -> sqlite3.Connection:
    database = sqlite3.connect(path, check_same_thread=False)
    try:
        path.chmod(0o600)
        database.execute("PRAGMA journal_mode=WAL")
        database.execute("PRAGMA synchronous=NORMAL")  # A power cut may lose the newest rows, never the file.
        database.executescript(_SCHEMA)
        (verdict,) = database.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise sqlite3.DatabaseError(verdict)
        database.execute("SELECT number, sent_s, name, bytes, sha256, held FROM sent LIMIT 1").fetchone()
    except sqlite3.Error:
        database.close()
        raise
    return database
