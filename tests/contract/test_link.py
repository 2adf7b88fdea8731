"""One suite for every Link: the one in memory, and the one over gRPC against a real server on a free port."""

import contextlib
import socket
import threading
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
import pytest

from isthmus.edge.link import over_grpc
from isthmus.edge.link.interface import Link, MemoryCloud, MemoryLink
from isthmus.edge.link.over_grpc import GrpcLink, open_channel
from isthmus.proto import keepalive
from isthmus.proto.codec import pack_frame
from isthmus.proto.errors import (
    NAME_KEY,
    RETRY_KEY,
    Busy,
    InvalidInput,
    NotYours,
    TooLate,
    Unauthenticated,
    Unavailable,
    WrongState,
)
from isthmus.proto.messages import FeatureFrame, Features, NumberType, Prototypes, Stage, UploadMode
from isthmus.proto.v1 import isthmus_pb2_grpc as rpc
from tests.rigs.edge.faulty_link import faulty_link
from tests.rigs.edge.memory_service import Servicer, served
from tests.rigs.project.patience import HANGS_S

PROTOTYPES = Prototypes(
    np.array([[0.5, 0.5, 0.0]], np.float32), np.array([4], np.int32), UploadMode.PROTOTYPES, min_cluster=3
)


@dataclass
class Shore:
    """A cloud and a link to it; ``stall`` stops its answers if the link can notice that."""

    cloud: MemoryCloud
    link: Link
    stall: threading.Event | None = None


@pytest.fixture(params=["memory", "grpc"])
def shore(request: pytest.FixtureRequest, students: Any) -> Iterator[Shore]:
    cloud = students.cloud()
    if request.param == "memory":
        yield Shore(cloud, MemoryLink(cloud))
        return
    with served(cloud) as (port, servicer):
        link = GrpcLink(open_channel(f"127.0.0.1:{port}"))
        yield Shore(cloud, link, servicer.stall)
        servicer.stall.set()
        link.close()


@pytest.fixture
def known(shore: Shore) -> Shore:
    shore.link.authenticate(shore.link.enrol("kiosk", "").token)
    return shore


def frame(ratio: float = 1.0, width: int = 12) -> bytes:
    return pack_frame(
        FeatureFrame(Features(np.ones(width, np.float32), np.ones(width, np.float32)), ratio, NumberType.FP16)
    )


def test_enrolment(shore: Shore) -> None:
    enrolment = shore.link.enrol("kiosk", "")
    assert enrolment == shore.cloud.enrolment
    with pytest.raises(Unauthenticated):
        shore.link.enrol("kiosk", "a wrong key")


def test_an_unknown_token_reaches_nothing(shore: Shore) -> None:
    with pytest.raises(Unauthenticated):
        shore.link.describe_student("")
    shore.link.authenticate("another token")
    with pytest.raises(Unauthenticated):
        shore.link.start_personalisation("k", PROTOTYPES, rounds=1, seed=0)
    with pytest.raises(Unauthenticated):
        list(shore.link.watch_job("job-1"))


def test_the_same_key_is_the_same_job(known: Shore) -> None:
    first = known.link.start_personalisation("k", PROTOTYPES, rounds=2, seed=1)
    assert known.link.start_personalisation("k", PROTOTYPES, rounds=2, seed=1).job_id == first.job_id
    assert known.link.start_personalisation("other", PROTOTYPES, rounds=2, seed=1).job_id != first.job_id
    assert len(known.cloud.uploads) == 2
    assert known.link.traffic.up_bytes["prototypes"] > 0


def test_a_device_that_has_forgotten_itself_is_unknown(known: Shore) -> None:
    known.link.start_personalisation("k", PROTOTYPES, rounds=2, seed=1)
    known.link.forget()
    assert not known.cloud.uploads
    assert not known.cloud.jobs
    with pytest.raises(Unauthenticated):
        known.link.describe_student("")


def test_a_job_is_watched_to_its_next_question(known: Shore) -> None:
    job_id = known.link.start_personalisation("k", PROTOTYPES, rounds=2, seed=1).job_id
    seen = list(known.link.watch_job(job_id))
    assert [status.stage for status in seen] == [Stage.SELECTING, Stage.DISTILLING, Stage.AWAITING_PROTOTYPES]
    assert seen[-1].student_id == "interim"
    known.link.upload_prototypes(job_id, 1, PROTOTYPES)
    assert list(known.link.watch_job(job_id))[-1].stage is Stage.READY
    with pytest.raises(WrongState):
        known.link.upload_prototypes(job_id, 1, PROTOTYPES)
    with pytest.raises(NotYours):
        list(known.link.watch_job("another-job"))


def test_a_student_in_chunks_from_any_offset(known: Shore) -> None:
    known.cloud.chunk_bytes = 100
    assert known.link.describe_student("") == known.cloud.students["base"]
    assert known.link.describe_student("final") == known.cloud.students["final"]
    content = known.cloud.files["base", "local_head.onnx"]
    for offset in (0, 150, len(content) - 1):
        chunks = list(known.link.fetch_file("base", "local_head.onnx", offset))
        assert b"".join(chunk.data for chunk in chunks) == content[offset:]
        assert [chunk.crc32 for chunk in chunks] == [zlib.crc32(chunk.data) for chunk in chunks]
        assert chunks[0].offset_bytes == offset
    with pytest.raises(NotYours):
        known.link.describe_student("somebody-elses")
    with pytest.raises(NotYours):
        list(known.link.fetch_file("base", "other.onnx", 0))
    with pytest.raises(InvalidInput):
        list(known.link.fetch_file("base", "local_head.onnx", len(content) + 1))


def test_answers_and_a_refused_frame_in_one_session(known: Shore) -> None:
    session = known.link.open_infer("final", timeout_s=HANGS_S)
    answered = session.ask(1, frame(), timeout_s=HANGS_S)
    assert answered.sequence == 1
    assert answered.probabilities_C is not None
    assert answered.probabilities_C.sum() == pytest.approx(1)
    refused = session.ask(2, frame(ratio=3.0), timeout_s=HANGS_S)
    assert refused.probabilities_C is None
    assert "ratio 3 is unknown" in refused.error_message
    assert session.ask(3, frame(), timeout_s=HANGS_S).probabilities_C is not None
    session.close()
    assert known.link.traffic.up_bytes["inference"] >= 3 * len(frame())


def test_the_cloud_gone_in_mid_session_and_back(known: Shore) -> None:
    session = known.link.open_infer("final", timeout_s=HANGS_S)
    assert session.ask(1, frame(), timeout_s=HANGS_S).probabilities_C is not None
    known.cloud.reachable = False
    with pytest.raises(Unavailable):
        session.ask(2, frame(), timeout_s=HANGS_S)
    session.close()
    known.cloud.reachable = True
    again = known.link.open_infer("final", timeout_s=HANGS_S)
    assert again.ask(1, frame(), timeout_s=HANGS_S).probabilities_C is not None
    again.close()


def test_an_answer_that_does_not_come_in_time(known: Shore) -> None:
    if known.stall is None:
        pytest.skip("a call in memory cannot hang")
    known.stall.clear()
    session = known.link.open_infer("final", timeout_s=HANGS_S)
    with pytest.raises(TooLate, match="no answer within"):
        session.ask(1, frame(), timeout_s=0.05)
    with pytest.raises(TooLate):
        session.ask(2, frame(), timeout_s=HANGS_S)
    session.close()


def test_a_late_answer_ends_nothing_and_is_found_later(known: Shore) -> None:
    if known.stall is None:
        pytest.skip("a call in memory cannot hang")
    session = known.link.open_infer("final", timeout_s=HANGS_S)
    session.send(1, frame())
    assert session.receive(1, timeout_s=HANGS_S).probabilities_C is not None
    known.stall.clear()
    session.send(2, frame())
    with pytest.raises(TooLate, match="no answer within"):
        session.receive(2, timeout_s=0.05)
    assert session.late() == []
    known.stall.set()
    session.send(3, frame())
    assert session.receive(3, timeout_s=HANGS_S).sequence == 3
    (late,) = session.late()
    assert late[0] == 2 and 0 <= late[1] < HANGS_S
    session.close()


def test_a_link_whose_connection_is_renewed_goes_on(known: Shore) -> None:
    known.link.renew()
    session = known.link.open_infer("final", timeout_s=HANGS_S)
    assert session.ask(1, frame(), timeout_s=HANGS_S).probabilities_C is not None
    session.close()


def test_no_cloud_at_all() -> None:
    link = GrpcLink(open_channel("127.0.0.1:1"))
    with pytest.raises(Unavailable, match="cannot be reached"):
        link.enrol("kiosk", "")
    with pytest.raises(Unavailable):
        list(link.watch_job("job"))
    link.close()


@pytest.mark.parametrize("address", ["", "nowhere", "host:", "host:port", ":80", "127.0.0.1:65536", "127.0.0.1:²"])
def test_an_invalid_address(address: str) -> None:
    with pytest.raises(InvalidInput, match="HOST:PORT"):
        open_channel(address)


def test_beyond_this_machine_tls_is_required() -> None:
    with pytest.raises(InvalidInput, match="--tls"):
        open_channel("cloud.example:443")
    open_channel("cloud.example:443", tls=True).close()


def answered(link: GrpcLink) -> Any:
    """The base student's manifest. A busy machine may be silent for so long that a sound connection is given up."""
    for _ in range(10):
        with contextlib.suppress(Unavailable):
            return link.describe_student("")
    pytest.fail("no connection was answered")


def test_a_connection_that_swallows_everything_is_replaced(students: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keepalive, "PING_AFTER_S", 1.0)
    monkeypatch.setattr(keepalive, "PING_TIMEOUT_S", 2.0)
    servicer = Servicer(students.cloud())
    options = [("grpc.http2.min_ping_interval_without_data_ms", 100), ("grpc.http2.max_ping_strikes", 0)]
    server = grpc.server(ThreadPoolExecutor(4), options=options)
    rpc.add_PersonalisationServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with faulty_link(port) as faulty:
        link = GrpcLink(open_channel(faulty.address))
        link.authenticate(link.enrol("kiosk", "").token)
        faulty.do(faulty.link.half_open)
        with pytest.raises(Unavailable):
            link.describe_student("")
        assert answered(link).manifest_bytes, "the same link has another connection"
        assert faulty.link.counts.connections >= 2
        link.close()
    server.stop(None).wait()


def test_a_call_without_an_answer_replaces_the_channel(students: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(over_grpc, "CALL_TIMEOUT_S", 0.3)
    silent = socket.create_server(("127.0.0.1", 0))  # Accepts connections, and says nothing.
    server = grpc.server(ThreadPoolExecutor(2))
    rpc.add_PersonalisationServiceServicer_to_server(Servicer(students.cloud()), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    link = GrpcLink(
        open_channel(f"127.0.0.1:{silent.getsockname()[1]}"), reopen=lambda: open_channel(f"127.0.0.1:{port}")
    )
    with pytest.raises(Unavailable, match="in time"):
        link.enrol("kiosk", "")
    monkeypatch.setattr(over_grpc, "CALL_TIMEOUT_S", HANGS_S)
    assert link.enrol("kiosk", "").device_id == "device-1"
    link.close()
    silent.close()
    server.stop(None).wait()


def test_a_busy_cloud_says_when_to_try_again(students: Any) -> None:
    class Full(Servicer):
        def DescribeStudent(self, request: Any, context: Any) -> Any:
            context.set_trailing_metadata(((NAME_KEY, "Busy"), (RETRY_KEY, "2500")))
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "full")

        FetchStudent = DescribeStudent

    server = grpc.server(ThreadPoolExecutor(1))
    rpc.add_PersonalisationServiceServicer_to_server(Full(students.cloud()), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    link = GrpcLink(open_channel(f"127.0.0.1:{port}"))
    for call in (lambda: link.describe_student(""), lambda: list(link.fetch_file("base", "teacher_head.onnx", 0))):
        with pytest.raises(Busy, match="full") as refused:
            call()
        assert refused.value.retry_after_s == 2.5
    link.close()
    server.stop(None).wait()


def test_a_cloud_that_does_not_know_a_request_is_called_older(students: Any) -> None:
    server = grpc.server(ThreadPoolExecutor(1))
    rpc.add_PersonalisationServiceServicer_to_server(rpc.PersonalisationServiceServicer(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    link = GrpcLink(open_channel(f"127.0.0.1:{port}"))
    with pytest.raises(WrongState, match="older version"):
        link.forget()
    link.close()
    server.stop(None).wait()


def test_grpcs_own_overload_is_busy(students: Any) -> None:
    server = grpc.server(ThreadPoolExecutor(1), maximum_concurrent_rpcs=1)
    servicer = Servicer(students.cloud())
    rpc.add_PersonalisationServiceServicer_to_server(servicer, server)
    rpc.add_InferenceServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    link = GrpcLink(open_channel(f"127.0.0.1:{port}"))
    link.authenticate(link.enrol("kiosk", "").token)
    session = link.open_infer("base", timeout_s=HANGS_S)
    assert session.ask(1, frame(), timeout_s=HANGS_S).probabilities_C is not None
    with pytest.raises(Busy, match="limit exceeded"):
        link.describe_student("")
    session.close()
    link.close()
    server.stop(None).wait()
