"""The list of sent messages: what it says of each, what it keeps, and what it forgets."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from isthmus.edge.link import sent
from isthmus.edge.link.sent import SentMessages
from isthmus.proto.codec import pack_frame
from isthmus.proto.convert import prototypes_to_pb
from isthmus.proto.errors import InvalidInput
from isthmus.proto.messages import FeatureFrame, Features, NumberType, Prototypes, UploadMode
from isthmus.proto.v1 import isthmus_pb2 as pb

VALUES_KC = np.array([[0.25, 0.75], [0.5, 0.5]], np.float32)


def a_frame() -> pb.InferRequest:
    features = Features(np.arange(4, dtype=np.float32), None)
    return pb.InferRequest(sequence=1, frame=pack_frame(FeatureFrame(features, 2.0, NumberType.FP16)))


def prototypes() -> pb.StartPersonalisationRequest:
    made = Prototypes(VALUES_KC, np.array([3, 5], np.int32), UploadMode.PROTOTYPES, 3)
    return pb.StartPersonalisationRequest(idempotency_key="k", prototypes=prototypes_to_pb(made))


def test_each_message_is_listed_with_its_bytes_and_what_it_held(tmp_path: Path) -> None:
    messages = SentMessages(tmp_path / "sent.sqlite", unix_clock=lambda: 7.0)
    messages.frames = lambda: (8, (1.0, 2.0))
    for each in (pb.WatchJobRequest(job_id="job-1"), prototypes(), a_frame()):
        messages.note(each)
    frame, upload, watch = messages.newest()
    assert (frame.name, frame.size_bytes, frame.sent_s) == ("InferRequest", a_frame().ByteSize(), 7.0)
    assert frame.sha256 == hashlib.sha256(a_frame().SerializeToString()).hexdigest()
    assert frame.held == {"ratio": 2.0, "number_type": "fp16", "sound": True, "picture": False, "numbers": 4}
    assert (upload.held["rows"], upload.held["clips"], upload.held["smallest"]) == (2, 8, 3)
    assert watch.held == {"job": "job-1"}
    assert messages.newest(before=upload.number, most=5) == [watch]
    assert messages.content(frame.number) == (a_frame().SerializeToString(), [("sound", [0.0, 1.0, 2.0, 3.0])])
    assert messages.content(upload.number)[1] == [("mean of 3 clips", [0.25, 0.75]), ("mean of 5 clips", [0.5, 0.5])]
    messages.close()


def test_the_list_outlives_the_device_and_the_content_does_not(tmp_path: Path) -> None:
    messages = SentMessages(tmp_path / "sent.sqlite")
    messages.note(a_frame())
    messages.forget_content()
    with pytest.raises(InvalidInput, match="not kept"):
        messages.content(1)
    messages.close()
    again = SentMessages(tmp_path / "sent.sqlite")
    assert [each.name for each in again.newest()] == ["InferRequest"]
    assert (tmp_path / "sent.sqlite").stat().st_mode & 0o777 == 0o600
    again.close()


def test_an_enrolment_key_is_neither_kept_nor_hashed(tmp_path: Path) -> None:
    messages = SentMessages(tmp_path / "sent.sqlite")
    messages.note(pb.EnrolRequest(device_name="kiosk", enrolment_key="tall-secret"))
    (enrolled,) = messages.newest()
    assert enrolled.sha256 == "" and enrolled.held == {"device_name": "kiosk", "key": True}
    with pytest.raises(InvalidInput):
        messages.content(enrolled.number)
    messages.close()
    assert b"tall-secret" not in b"".join(path.read_bytes() for path in tmp_path.iterdir())


def test_old_messages_leave_the_list_and_stay_in_the_totals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sent, "MOST_ROWS", 3)
    monkeypatch.setattr(sent, "MOST_KEPT", 2)
    messages = SentMessages(tmp_path / "sent.sqlite")
    for number in range(5):
        messages.note(pb.WatchJobRequest(job_id=f"job-{number}"))
    assert [each.number for each in messages.newest()] == [5, 4, 3]
    assert messages.totals() == {"WatchJobRequest": (5, 5 * pb.WatchJobRequest(job_id="job-0").ByteSize())}
    assert messages.content(4)[0] == pb.WatchJobRequest(job_id="job-3").SerializeToString()
    with pytest.raises(InvalidInput, match="newest 2"):
        messages.content(3)
    messages.close()


def test_a_damaged_list_is_set_aside(tmp_path: Path) -> None:
    (tmp_path / "sent.sqlite").write_bytes(b"no database at all, but something else" * 200)
    messages = SentMessages(tmp_path / "sent.sqlite")
    messages.note(a_frame())
    assert len(messages.newest()) == 1
    assert (tmp_path / "sent.sqlite.damaged").exists()
    messages.close()


def test_what_cannot_be_written_down_stops_nothing(tmp_path: Path) -> None:
    messages = SentMessages(tmp_path / "sent.sqlite")
    messages._database.execute("DROP TABLE sent")
    messages.note(a_frame())
    assert messages.unwritten == 1
    messages.close()
