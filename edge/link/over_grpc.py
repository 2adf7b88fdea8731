"""The Link over gRPC: the only file of the device that imports grpc.

All calls use one channel. A connection that swallows everything is noticed by keepalive pings in every call
(``isthmus.proto.keepalive``), and gRPC connects again. If a call still gets no answer, the whole channel is replaced.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc

from isthmus.edge.link.interface import Traffic
from isthmus.edge.link.unreachable import why
from isthmus.proto import convert, convert_student, keepalive, trace
from isthmus.proto.errors import (
    NAME_KEY,
    RETRY_KEY,
    Internal,
    InvalidInput,
    IsthmusError,
    TooLate,
    Unavailable,
    WrongState,
    from_status,
)
from isthmus.proto.limits import MAX_MESSAGE_BYTES
from isthmus.proto.messages import Chunk, Enrolment, InferReply, JobStatus, Prototypes, SignedManifest
from isthmus.proto.v1 import isthmus_pb2 as pb
from isthmus.proto.v1 import isthmus_pb2_grpc as rpc

CALL_TIMEOUT_S = 20.0
FETCH_TIMEOUT_S = 300.0
"""A file that takes longer continues from its last byte in another call."""
WATCH_TIMEOUT_S = 300.0
"""A watch is renewed this often."""

_LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


def open_channel(
    address: str, *, tls_ca: Path | None = None, tls: bool = False, own: tuple[Path, Path] | None = None
) -> grpc.Channel:
    """Return a channel to ``address`` (host:port). Without TLS only this machine is allowed: calls carry tokens.

    ``tls_ca`` is a PEM file that replaces the system's authorities. ``own``: PEM files of the certificate that the
    device shows, and of its key. Raises InvalidInput.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or len(port) > 5 or int(port) > 65_535:
        raise InvalidInput(f"the cloud's address is {address!r}; expected HOST:PORT")
    options: list[tuple[str, Any]] = [
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        *keepalive.device_options(),
        ("grpc.use_local_subchannel_pool", 1),
    ]
    if tls or tls_ca is not None:
        try:
            authorities = None if tls_ca is None else tls_ca.read_bytes()
        except OSError as error:
            raise InvalidInput(f"the file of TLS authorities cannot be read: {error.strerror}") from error
        try:
            chain, key = (None, None) if own is None else (own[0].read_bytes(), own[1].read_bytes())
        except OSError as error:
            raise InvalidInput(f"the device's certificate or its key cannot be read: {error.strerror}") from error
        return grpc.secure_channel(address, grpc.ssl_channel_credentials(authorities, key, chain), options)
    if own is not None:
        raise InvalidInput("a certificate is shown over TLS alone: give --tls or --tls-ca FILE")
    if host not in _LOOPBACK:
        raise InvalidInput(f"{host} is not this machine, so the connection needs TLS: give --tls or --tls-ca FILE")
    options.append(("grpc.enable_http_proxy", 0))
    return grpc.insecure_channel(address, options)


class GrpcLink:
    """See ``interface.Link``. If a call gets no answer, ``reopen`` (if given) opens another channel.

    Closing the link closes the channel.

    >>> link = GrpcLink(open_channel("127.0.0.1:50051"))  # connects at the first call
    >>> link.close()
    """

    def __init__(self, channel: grpc.Channel, reopen: Callable[[], grpc.Channel] | None = None) -> None:
        self._reopen = reopen
        self._token = ""
        self.traffic = Traffic()
        self._use(channel)

    def _use(self, channel: grpc.Channel) -> None:
        self._channel = channel
        self._personalisation = rpc.PersonalisationServiceStub(self._channel)
        self._inference = rpc.InferenceServiceStub(self._channel)

    def authenticate(self, token: str) -> None:
        self._token = token

    def enrol(self, device_name: str, enrolment_key: str) -> Enrolment:
        request = pb.EnrolRequest(device_name=device_name, enrolment_key=enrolment_key)
        return convert.enrolment_from_pb(self._call(self._personalisation.Enrol, request, "control"))

    def start_personalisation(
        self, idempotency_key: str, prototypes: Prototypes, *, rounds: int, seed: int
    ) -> JobStatus:
        request = pb.StartPersonalisationRequest(
            idempotency_key=idempotency_key,
            prototypes=convert.prototypes_to_pb(prototypes),
            rounds=rounds,
            seed=seed,
        )
        reply = self._call(self._personalisation.StartPersonalisation, request, "prototypes")
        return convert.job_status_from_pb(reply.job)

    def upload_prototypes(self, job_id: str, round: int, prototypes: Prototypes) -> JobStatus:
        request = pb.UploadPrototypesRequest(
            job_id=job_id, round=round, prototypes=convert.prototypes_to_pb(prototypes)
        )
        reply = self._call(self._personalisation.UploadPrototypes, request, "prototypes")
        return convert.job_status_from_pb(reply.job)

    def watch_job(self, job_id: str) -> Iterator[JobStatus]:
        try:
            request = pb.WatchJobRequest(job_id=job_id)
            for reply in self._stream(self._personalisation.WatchJob, request, "control", WATCH_TIMEOUT_S):
                yield convert.job_status_from_pb(reply.job)
        except TooLate:
            return  # The caller renews the watch.

    def describe_student(self, student_id: str) -> SignedManifest:
        request = pb.DescribeStudentRequest(student_id=student_id)
        return convert_student.signed_manifest_from_pb(
            self._call(self._personalisation.DescribeStudent, request, "student")
        )

    def describe_offered(self) -> SignedManifest:
        request = pb.DescribeStudentRequest(offered=True)
        return convert_student.signed_manifest_from_pb(
            self._call(self._personalisation.DescribeStudent, request, "control")
        )

    def fetch_file(self, student_id: str, file_name: str, offset_bytes: int) -> Iterator[Chunk]:
        request = pb.FetchStudentRequest(student_id=student_id, file_name=file_name, offset_bytes=offset_bytes)
        try:
            for reply in self._stream(self._personalisation.FetchStudent, request, "student", FETCH_TIMEOUT_S):
                yield convert_student.chunk_from_pb(reply)
        except TooLate as error:
            raise Unavailable("the download took too long; it continues from its last byte") from error

    def forget(self) -> None:
        self._call(self._personalisation.Forget, pb.ForgetRequest(), "control")

    def open_infer(self, student_id: str, *, timeout_s: float) -> "GrpcInferSession":
        metadata = (*self._metadata(), ("isthmus-student", student_id))

        def start(requests: Iterator[pb.InferRequest]) -> Any:
            return self._inference.Infer(requests, timeout=timeout_s, metadata=metadata)

        return GrpcInferSession(start, self.traffic)

    def renew(self) -> None:
        if self._reopen is not None:
            self._channel.close()
            self._use(self._reopen())

    def close(self) -> None:
        self._channel.close()

    def _metadata(self) -> tuple[tuple[str, str], ...]:
        traced = ((trace.KEY, trace.outgoing().header),)
        return (("authorization", f"Bearer {self._token}"), *traced) if self._token else traced

    def _call(self, method: Any, request: Any, kind: str) -> Any:
        self.traffic.sends(kind, request)
        try:
            reply = method(request, timeout=CALL_TIMEOUT_S, metadata=self._metadata())
        except grpc.RpcError as error:
            mapped = _mapped(error)
            if isinstance(mapped, TooLate):
                # The call has no latency budget of its own, so this is a fault of the link.
                self.renew()
                raise Unavailable("the cloud did not answer in time") from error
            raise mapped from error
        self.traffic.down_bytes[kind] += reply.ByteSize()
        return reply

    def _stream(self, method: Any, request: Any, kind: str, timeout_s: float) -> Iterator[Any]:
        self.traffic.sends(kind, request)
        replies = method(request, timeout=timeout_s, metadata=self._metadata())
        try:
            for reply in replies:
                self.traffic.down_bytes[kind] += reply.ByteSize()
                yield reply
        except grpc.RpcError as error:
            raise _mapped(error) from error
        finally:
            replies.cancel()


class GrpcInferSession:
    """One bidirectional stream. A thread reads the answers, so that each request can have its own timeout."""

    def __init__(self, start: Callable[[Iterator[pb.InferRequest]], Any], traffic: Traffic) -> None:
        self._traffic = traffic
        self._requests: queue.SimpleQueue[pb.InferRequest | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[tuple[float, InferReply | IsthmusError]] = queue.SimpleQueue()
        self._late: list[tuple[int, float]] = []
        self._over: IsthmusError | None = None
        self._replies = start(iter(self._requests.get, None))
        self._reader = threading.Thread(target=self._read, name="isthmus-answers", daemon=True)
        self._reader.start()

    def ask(self, sequence: int, frame: bytes, *, timeout_s: float) -> InferReply:
        self.send(sequence, frame)
        try:
            return self.receive(sequence, timeout_s=timeout_s)
        except TooLate as error:
            self._end(error)
            raise

    def send(self, sequence: int, frame: bytes) -> None:
        if self._over is not None:
            raise self._over
        request = pb.InferRequest(sequence=sequence, frame=frame)
        self._traffic.sends("inference", request)
        self._requests.put(request)

    def receive(self, sequence: int, *, timeout_s: float) -> InferReply:
        until_s = time.monotonic() + timeout_s
        while True:
            try:
                at_s, answer = self._answers.get(timeout=max(0.0, until_s - time.monotonic()))
            except queue.Empty:
                raise TooLate(f"no answer within {timeout_s:g} s") from None
            if isinstance(answer, InferReply) and answer.sequence > sequence:
                answer = InvalidInput(f"the cloud answered {answer.sequence} where {sequence} was asked")
            if isinstance(answer, IsthmusError):
                self._end(answer)
                raise answer
            if answer.sequence == sequence:
                return answer
            self._late.append((answer.sequence, at_s))

    def late(self) -> list[tuple[int, float]]:
        now_s = time.monotonic()
        while not self._answers.empty():
            at_s, answer = self._answers.get()
            if isinstance(answer, IsthmusError):
                self._end(answer)
                raise answer
            self._late.append((answer.sequence, at_s))
        found, self._late = self._late, []
        return [(sequence, max(0.0, now_s - at_s)) for sequence, at_s in found]

    def close(self) -> None:
        self._requests.put(None)
        self._replies.cancel()
        self._reader.join(timeout=CALL_TIMEOUT_S)

    def _end(self, error: IsthmusError) -> None:
        self._over = error
        self._replies.cancel()

    def _read(self) -> None:
        try:
            for reply in self._replies:
                self._traffic.down_bytes["inference"] += reply.ByteSize()
                self._put(convert.infer_reply_from_pb(reply))
        except grpc.RpcError as error:
            self._put(_mapped(error))
        except IsthmusError as error:
            self._put(error)
        else:
            self._put(Unavailable("the cloud closed the stream"))

    def _put(self, answer: InferReply | IsthmusError) -> None:
        self._answers.put((time.monotonic(), answer))


def _mapped(error: grpc.RpcError) -> IsthmusError:
    """Turn a failed call into an error of our tree, from the status code and its message."""
    call: object = error
    if not isinstance(call, grpc.Call):
        return Internal("the call failed without a status")
    code, details = call.code(), call.details()
    if code is grpc.StatusCode.UNAVAILABLE:
        return Unavailable(why(details or ""))
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return WrongState(
            "no Isthmus cloud answers there, or one of an older version, which does not know this request"
        )
    if code is grpc.StatusCode.CANCELLED:
        # Never by the device itself, which no longer reads then. So ends a call that a stopping server had not begun.
        return Unavailable("the cloud stopped before it answered")
    trailing = {key: str(value) for key, value in call.trailing_metadata() or ()}
    words = details or code.name.lower().replace("_", " ")
    return from_status(code.value[0], words, trailing.get(NAME_KEY, ""), trailing.get(RETRY_KEY, ""))
