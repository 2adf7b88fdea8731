"""Sessions and the cache of heads, tested without a server."""

import asyncio
from pathlib import Path

import numpy as np
import pytest

from isthmus.cloud.inference import HeadCache, Session
from isthmus.cloud.personalise.students import HEADS_FILE, Shelf
from isthmus.cloud.store import devices, students
from isthmus.cloud.store.artefacts import Artefacts
from isthmus.cloud.store.database import Database
from isthmus.cloud.store.devices import Device
from isthmus.cloud.store.students import StudentRow
from isthmus.proto.codec import pack_frame
from isthmus.proto.convert_student import manifest_to_bytes
from isthmus.proto.errors import NotYours, WrongState
from isthmus.proto.messages import (
    Captured,
    FeatureFrame,
    Features,
    FloatArray,
    NumberType,
    SignedManifest,
    StudentFile,
    StudentManifest,
)


class FixedHeads:
    ratios = (1.0,)

    def __init__(self, answer: FloatArray | Exception) -> None:
        self.answer = answer

    def probabilities(self, values_F: FloatArray, captured: Captured, ratio: float) -> FloatArray:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


FRAME = pack_frame(FeatureFrame(Features(np.ones(8, np.float32), np.ones(8, np.float32)), 1.0, NumberType.FP16))
WIDTHS = {"mine": 16}
HALF = np.array([0.5, 0.5], np.float32)


def test_a_request_that_would_come_too_late_is_not_computed() -> None:
    session = Session(FixedHeads(AssertionError("computed all the same")), feature_width=8)
    reply = session.reply(1, FRAME, remaining_s=0.0)
    assert (reply.error_code, reply.probabilities_C) == (4, None)
    assert session.reply(1, FRAME, remaining_s=None).error_code == 13
    session = Session(FixedHeads(HALF), feature_width=8)
    assert session.reply(1, FRAME, remaining_s=5.0).probabilities_C is HALF


def test_an_internal_failure_is_reported_without_details(caplog: pytest.LogCaptureFixture) -> None:
    reply = Session(FixedHeads(RuntimeError("secret")), feature_width=8).reply(0, FRAME, None)
    assert reply.error_code == 13
    assert "secret" not in reply.error_message
    assert "secret" in caplog.text


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    database = Database(f"sqlite:///{tmp_path / 'isthmus.db'}")
    database.migrate()
    shelf = Shelf(database, Artefacts(str(tmp_path / "artefacts")))
    (tmp_path / HEADS_FILE).write_bytes(b"heads")
    for device_id in ("me", "you"):
        devices.add(database, Device(device_id, "", bytes(32), 1.0), at_most=9)
    for student_id, owner, kind in (
        ("base", None, "base"),
        ("mine", "me", "final"),
        ("yours", "you", "final"),
        ("half", "me", "interim"),
    ):
        sha256 = shelf.artefacts.put(student_id, HEADS_FILE, tmp_path / HEADS_FILE)
        width = WIDTHS.get(student_id, 8)
        file = StudentFile("audio_encoder.onnx", 1, bytes(32))
        manifest = StudentManifest(student_id, kind, (file,), (1.0,), ("a", "b"), "{}", width, 1.0)
        signed = SignedManifest(manifest_to_bytes(manifest), b"s")
        students.put(database, StudentRow(student_id, owner, kind, signed, 1.0, sha256, f"of {student_id}"))
    return shelf


def test_heads_are_loaded_once_and_the_least_used_are_dropped(shelf: Shelf, tmp_path: Path) -> None:
    loaded: list[str] = []

    def load(path: Path) -> FixedHeads:
        loaded.append(path.parent.name)
        return FixedHeads(HALF)

    async def scenario() -> None:
        cache = HeadCache(shelf, load, scratch=tmp_path, capacity=1)
        one, two = await asyncio.gather(cache.heads("me", "base"), cache.heads("you", "base"))
        assert one is two
        assert (one.feature_width, one.release) == (8, "of base")
        await cache.heads("me", "mine")
        await cache.heads("me", "mine")
        await cache.heads("me", "base")
        other = await cache.heads("me", "mine")
        assert (other.feature_width, other.release) == (16, "of mine"), "each student as its own release has it"

    asyncio.run(scenario())
    assert loaded == ["base", "mine", "base", "mine"]


def test_heads_of_another_device_and_of_interim_students_are_refused(shelf: Shelf, tmp_path: Path) -> None:
    cache = HeadCache(shelf, lambda path: FixedHeads(HALF), scratch=tmp_path, capacity=9)
    for student_id in ("yours", "nobodys"):
        with pytest.raises(NotYours, match="no such student"):
            asyncio.run(cache.heads("me", student_id))
    with pytest.raises(WrongState, match="interim"):
        asyncio.run(cache.heads("me", "half"))
    assert asyncio.run(cache.heads("you", "yours")).heads.ratios == (1.0,)
